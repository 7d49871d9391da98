"""The core knows no host: what it imports, read from its source and from a fresh process."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import erasure_core

pytestmark = pytest.mark.core
ROOT = Path(erasure_core.__file__).parent
ALLOWED = {"torch", "safetensors", "numpy", "einops", *sys.stdlib_module_names}
FILES = sorted(p for p in ROOT.rglob("*.py") if p.relative_to(ROOT).parts[0] not in ("emojicanvas", "integrations"))


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_a_core_file_imports_only_what_is_promised(path: Path) -> None:
    assert imported(path) <= ALLOWED


def test_there_are_files_to_check() -> None:
    assert {"api.py", "formats.py", "uce.py", "linear_edit.py"} <= {p.name for p in FILES}


def test_importing_it_loads_no_host() -> None:
    code = (
        "import sys, erasure_core; erasure_core.all_methods();"
        "print([m for m in ('comfy', 'diffusers', 'transformers', 'peft', 'tokenizers', 'nodes') if m in sys.modules])"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT.parent)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("there", "version", "sentence"),
    [
        ([], (3, 10, 9), "needs Python 3.11 or newer, and this is Python 3.10. Install"),
        (["folder_paths.py"], (3, 12, 0), "needs ComfyUI 0.3.75 or newer, and this one is older"),
        (["folder_paths.py", "comfy_api/__init__.py"], (3, 12, 0), "needs ComfyUI 0.3.75 or newer, and this one is older"),
        ([], (3, 12, 0), ""),
    ],
)  # fmt: skip
def test_an_old_python_or_comfyui_is_a_sentence(
    tmp_path: Path, there: list[str], version: tuple, sentence: str
) -> None:
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    code = f"import runpy, sys; sys.version_info = {version}; runpy.run_path({str(ROOT.parent / '__init__.py')!r})"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    last = run.stderr.strip().rpartition("\n")[2]
    assert last.startswith("ImportError: ComfyUI Concept Erasure " + sentence) if sentence else not last


def test_nothing_unpickles_or_evaluates() -> None:
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {a.name for a in node.names} | {getattr(node, "module", None) or ""}
                assert not names & {"pickle", "dill", "marshal", "shelve"}, path
            if isinstance(node, ast.Call):
                called = ast.unparse(node.func)
                assert called not in ("eval", "exec"), f"{path}: {called}"
                if called == "torch.load":  # training's own checkpoints in .cache; never a user's file
                    assert "emojicanvas" in path.parts and "weights_only=True" in ast.unparse(node), path


def test_what_the_registry_leaves_out_is_not_imported_by_the_rest() -> None:
    root = ROOT.parent
    left_out = [root / x for x in (root / ".comfyignore").read_text().splitlines() if x.startswith("erasure_core/")]
    assert len(left_out) == 2 and all(folder.is_dir() for folder in left_out)
    for path in (p for part in ("nodes", "erasure_core") for p in (root / part).rglob("*.py")):
        if any(folder in path.parents for folder in left_out):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom):
                start = path.parents[node.level - 1] if node.level else root
                module = start.joinpath(*(node.module or "").split("."))
                meant = [module, *(module / alias.name for alias in node.names)]
                assert not any(folder in (m, *m.parents) for folder in left_out for m in meant), path


def test_what_is_exported_is_there() -> None:
    assert all(hasattr(erasure_core, name) for name in erasure_core.__all__)


def test_training_makes_the_file_of_the_model() -> None:
    """What ``nox -s train`` runs, one after the other: each is a program, one of them writes the file."""
    source = (ROOT.parent / "noxfile.py").read_text(encoding="utf-8")
    (parts,) = (
        ast.literal_eval(line.partition("=")[2].strip()) for line in source.splitlines() if line.startswith("TRAINING")
    )
    for part in parts:
        assert 'if __name__ == "__main__":' in (ROOT / "emojicanvas/training" / f"{part}.py").read_text(
            encoding="utf-8"
        ), part
    assert parts.index("train_vae") < parts.index("train_unet") < parts.index("bundle")


def test_linters_are_of_one_version() -> None:
    lint = tomllib.loads((ROOT.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]["lint"]
    (ruff,) = (tool for tool in lint if tool.startswith("ruff"))
    hooks = (ROOT.parent / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert hooks.count(f"[{ruff}]") == hooks.count("[ruff") == 2
