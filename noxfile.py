"""All commands of this project.

    nox -s demo                         see it work
    nox -s tests                        every test but the slow ones
    nox -s tests -- -m core             only what needs no ComfyUI; any pytest option goes behind the --
    nox -s tests -- -m slow             the slow ones
    nox -s tests -- -n 0                one after the other, for a debugger
    nox -s bench -- NAME ...            one experiment on the EmojiCanvas testbed
    nox -s bench -- speed sd15 sdxl     how long erasing takes on checkpoints of full size
    nox -s bench -- receipt             how long a receipt takes on the demo model
    nox -s train                        rebuild the EmojiCanvas model from the drawings
    nox -s lint

PyTorch takes gigabytes, so everything but lint shares one environment, `.nox/host`; it is set up on first use and
again whenever the requirements change. The project itself is not installed there: ComfyUI runs in it, and our `nodes/`
on its path would hide ComfyUI's own `nodes.py`.
"""

from __future__ import annotations

import hashlib
import os
import sys
from pathlib import Path

import nox
from nox.project import load_toml

nox.needs_version = ">=2024.10.9"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).resolve().parent
HOST = ROOT / ".nox" / "host"
HOST_PYTHON = HOST / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
STAMP = HOST / "requirements.sha256"
# Only nodes for sound need it, and ComfyUI starts without them.
NOT_NEEDED = ("torchaudio",)
EXTRAS = ("test", "emojicanvas")
TRAINING = ("data", "train_vae", "train_unet", "bundle", "train_judge")


def host(session: nox.Session) -> str:
    """Make the shared environment if need be and return its Python."""
    if not HOST_PYTHON.exists():
        session.run(sys.executable, "-m", "virtualenv", "--quiet", str(HOST))
    python = str(HOST_PYTHON)
    answer = str(session.run(python, "tools/comfy_tree.py", silent=True))
    comfyui = Path(answer.splitlines()[-1])
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line.strip() for line in lines if line.strip() and not line.startswith(("#", *NOT_NEEDED))]
    project = load_toml(ROOT / "pyproject.toml")["project"]
    requirements += project["dependencies"]
    for extra in EXTRAS:
        requirements += project["optional-dependencies"][extra]
    digest = hashlib.sha256("\n".join(requirements).encode()).hexdigest()
    if not STAMP.exists() or STAMP.read_text(encoding="utf-8") != digest:
        session.run(python, "-m", "pip", "install", "--disable-pip-version-check", *requirements)
        STAMP.write_text(digest, encoding="utf-8")
    return python


@nox.session(venv_backend="none")
def tests(session: nox.Session) -> None:
    """Run pytest, on all tests unless paths are given, in a few processes side by side."""
    python = host(session)
    paths = [] if any(arg.startswith("tests/") for arg in session.posargs) else ["tests"]
    # By file: what a file's tests share is made once. Each process starts a ComfyUI of its own, hence no more than four.
    side_by_side = ["-n", str(min(4, os.cpu_count() or 1)), "--dist", "loadfile"]
    session.run(python, "-m", "pytest", "-c", "tests/pytest.ini", *side_by_side, *paths, *session.posargs)


@nox.session(venv_backend="none")
def demo(session: nox.Session) -> None:
    """Start ComfyUI with this pack and show it at work."""
    session.run(host(session), "tools/demo.py", *session.posargs)


@nox.session(venv_backend="none")
def bench(session: nox.Session) -> None:
    """Run one experiment: `nox -s bench -- NAME ...`."""
    name, *rest = session.posargs or ["--help"]
    in_comfyui = {"speed": "tools/bench_speed.py", "receipt": "tools/bench_receipt.py"}
    command = [in_comfyui[name]] if name in in_comfyui else ["-m", "erasure_core.emojicanvas.bench", name]
    session.run(host(session), *command, *rest)


@nox.session(venv_backend="none")
def train(session: nox.Session) -> None:
    """Rebuild the EmojiCanvas model: pictures, VAE, UNet, the file of them all, judge."""
    python = host(session)
    for part in TRAINING:
        session.run(python, "-m", f"erasure_core.emojicanvas.training.{part}")


@nox.session(reuse_venv=True)
def lint(session: nox.Session) -> None:
    """Style and types. PyTorch and ComfyUI are not installed here, so their types count as Any."""
    session.install(*load_toml(ROOT / "pyproject.toml")["project"]["optional-dependencies"]["lint"])
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    # As a package: given as a folder, it would be taken for a part of the root package.
    session.run("mypy", "-p", "erasure_core")
    # The nodes import the core from the root package, which is called as this folder is.
    session.run("mypy", "-p", f"{ROOT.name}.nodes", env={"MYPYPATH": str(ROOT.parent)})
