"""Save and Load Erasure."""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import folder_paths
import torch
from comfy_api.latest import io, ui

from ..erasure_core import Erasure as CoreErasure
from ..erasure_core import FileError, Layout, load, read_header, save
from ..erasure_core.artifact import digest, same_base, weights_digest
from ..erasure_core.formats import check_file_name, opened, read_receipt, receipt_of, write_bytes
from ..erasure_core.methods._training import fingerprint
from ..erasure_core.receipt_file import parse_receipt, receipt_json
from .erase_notes import doubted
from .modes import ordinary_tensors
from .port import ComfyPort
from .saved import Saved, check_name, place
from .types import CATEGORY, Erasure

FOLDERS = ("loras", "erasure")
_PRECISIONS = {"full (float32)": torch.float32, "half (float16)": torch.float16}
_LAYOUTS = {
    "LoRA (ComfyUI, A1111, Forge)": Layout.LORA,
    "diffusers": Layout.DIFFUSERS,
    "full delta (large)": Layout.FULL,
}

folder_paths.add_model_folder_path("erasure", os.path.join(folder_paths.models_dir, "erasure"))


SAVED = Saved("erasure", "Save Erasure", FOLDERS, read_header)


class SaveErasure(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureSave",
            display_name="Save Erasure",
            category=CATEGORY,
            description="Writes the erasure as one file to share. In the LoRA layout in models/loras the stock Load LoRA "
            "node, A1111 and Forge can use it too: whoever loads it needs nothing of this pack.",
            is_output_node=True,
            inputs=[
                Erasure.Input("erasure", tooltip="From Erase Concept or Merge Erasures."),
                io.String.Input("name", default="no-cigarette", tooltip="File name, without folders."),
                io.Combo.Input(
                    "folder",
                    options=list(FOLDERS),
                    default="loras",
                    tooltip="models/loras is also seen by Load LoRA; models/erasure keeps it apart.",
                ),
                io.Combo.Input(
                    "layout",
                    options=list(_LAYOUTS),
                    default=next(iter(_LAYOUTS)),
                    tooltip="LoRA suits nearly everything. diffusers: for load_lora_weights; Load LoRA and A1111 don't read "
                    "this layout, Load Erasure does. Full delta: the plain change of each weight, large.",
                ),
                io.Combo.Input(
                    "precision",
                    options=list(_PRECISIONS),
                    default=next(iter(_PRECISIONS)),
                    tooltip="Half is half the size; the picture differs by about as much as a half-precision model does.",
                ),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of the same name."),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="folder/file, as Load Erasure lists it.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        return check_name(name)

    @classmethod
    def execute(cls, erasure, name, folder, layout, precision, overwrite) -> io.NodeOutput:
        file = check_file_name(name) + ".safetensors"
        # ComfyUI 0.3.75 does not look at what API calls send for a choice.
        for what, value, choices in (
            ("folder", folder, FOLDERS),
            ("layout", layout, _LAYOUTS),
            ("precision", precision, _PRECISIONS),
        ):
            if value not in choices:
                raise FileError(f"{what}: {value!r} is not one of {', '.join(choices)}")
        root = Path(folder_paths.get_folder_paths(folder)[0])
        root.mkdir(parents=True, exist_ok=True)
        written = [root / file, *_beside(root / file)]
        there = [path for path in written if path.exists()]
        with ordinary_tensors():
            saved = bool(there) and _is_saved(erasure, root / file, _LAYOUTS[layout], _PRECISIONS[precision])
        if there and not overwrite:
            if saved:
                return io.NodeOutput(
                    f"{folder}/{file}", ui=ui.PreviewText(f"{place(root / file)} has this very erasure already")
                )
            raise FileError(
                f"name: {there[0].name} is already in {place(root)}. Choose another name or switch overwrite on"
            )
        with ordinary_tensors():
            if not saved:  # Windows refuses to replace a file that Load LoRA has open
                save(erasure, root / file, layout=_LAYOUTS[layout], dtype=_PRECISIONS[precision])
            receipt = receipt_of(erasure, _LAYOUTS[layout], _PRECISIONS[precision])
        beside: tuple[Path, ...] = _beside(root / file)
        told: tuple[bytes, ...] = (
            (b"", b"") if receipt is None else (receipt_json(receipt, indent=1).encode(), receipt.sheet)
        )
        if receipt is not None and not receipt.sheet and _tells_of(beside[0], receipt.digest):
            beside, told = beside[:1], told[:1]  # a receipt from a file has no sheet; the one beside it is still right
        for path, contents in zip(beside, told, strict=True):
            if contents:
                write_bytes(path, contents)
            else:
                path.unlink(missing_ok=True)  # it would tell of the erasure that was overwritten
        size = (root / file).stat().st_size
        shown = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"
        said = [
            f"{place(root / file)} has this very erasure already" if saved else f"saved {place(root / file)} ({shown})"
        ]
        said.append("no receipt" if receipt is None else "with its receipt, inside and beside it")
        if _LAYOUTS[layout] is Layout.DIFFUSERS:  # they patch nothing, and say so in the console only
            said.append("Load LoRA and A1111 don't read this layout; Load Erasure and diffusers do")
        return io.NodeOutput(f"{folder}/{file}", ui=ui.PreviewText("\n".join(said)))


def _is_saved(erasure: CoreErasure, file: Path, layout: Layout, dtype: torch.dtype) -> bool:
    """Whether ``file`` is what saving ``erasure`` would write: the same graph, run again."""
    with TemporaryDirectory() as folder:
        again = Path(folder) / file.name
        try:
            if read_header(file).spec != erasure.header.spec:  # most others show at once, without writing anything
                return False
            save(erasure, again, layout=layout, dtype=dtype)
            return _contents(file) == _contents(again)
        except (FileError, OSError):
            return False


def _contents(file: Path) -> tuple:
    """All that two files of one erasure have in common: the names of the tensors tell the layout."""
    erasure = load(file)
    with opened(file) as f:
        return erasure.header, erasure.receipt, digest(erasure.deltas), sorted(f.keys())


def _beside(file: Path) -> tuple[Path, Path]:
    """The receipt of an erasure file as JSON and as a picture."""
    return file.with_name(f"{file.stem}.receipt.json"), file.with_name(f"{file.stem}.receipt.png")


def _tells_of(receipt: Path, digest: str) -> bool:
    """Whether a receipt beside a file is of the erasure with this digest."""
    try:
        return parse_receipt(receipt.read_text(encoding="utf-8")).digest == digest
    except (OSError, ValueError):
        return False


def model_report(port: ComfyPort, own: str, erasure: CoreErasure) -> str:
    """Whether ``erasure`` was made for the model with the fingerprint ``own``, in words. Apply Erasure refuses another family;
    here it is a note."""
    try:
        erasure.check_fits(list(port.linears()))
    except ValueError as error:
        return f"WARNING: this model can't use it. {error}"
    if same_base(erasure.header.base, own):
        return "model: the one that it was made on, or a finetune of that one"
    return (
        "WARNING: this model is of the right family, but neither the one that the erasure was made on nor a finetune of that "
        f"one (fingerprint {own}, the erasure's {erasure.header.base or 'unknown'}). It may suppress less here: try it, or "
        "erase the concept on this model"
    )


def receipt_report(path: str, erasure: CoreErasure, port: ComfyPort | None = None, own: str = "") -> str:
    """What the file's receipt says, or why it says nothing; ``port`` is of the connected model, if any, and ``own`` its
    fingerprint."""
    if erasure.receipt is None:
        try:
            found = read_receipt(path)
        except FileError as error:
            return f"receipt: it can't be read, so nothing is known of what this erasure does ({error})"
        if found is None:
            return "no receipt: nothing was measured of this erasure. Erasure Receipt makes one"
        return (
            f"WARNING: the receipt in this file is not that of this erasure: {found.mismatch(erasure)}. Don't trust it"
        )
    said = erasure.receipt.summary()
    if port is None:
        return said
    if other := erasure.receipt.other_base(own):
        return f"{said}\nWARNING: {other}"
    other = erasure.receipt.weights and erasure.receipt.other_weights(weights_digest(port))
    return said + (f"\nnote: {other}" if other else "")


class LoadErasure(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureLoad",
            display_name="Load Erasure",
            category=CATEGORY,
            description="Reads an erasure that you or somebody else saved, and says what it does. Connect it to Apply Erasure.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=SAVED.options(),
                    tooltip="Erasures in models/loras and models/erasure, newest first. Press R to refresh the list.",
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="The model that you will use it on: the report then says whether it fits, and if it or its receipt "
                    "was made on another one.",
                ),
            ],
            outputs=[
                Erasure.Output(display_name="erasure", tooltip="For Apply Erasure and Merge Erasures."),
                io.String.Output(display_name="report", tooltip="What the file and its receipt say."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file):
        return SAVED.check(file)

    @classmethod
    def fingerprint_inputs(cls, file, model=None):
        return SAVED.stamp(file)

    @classmethod
    def execute(cls, file, model=None) -> io.NodeOutput:
        path = SAVED.path(file)
        with ordinary_tensors():
            erasure = load(path)
            port, own, fits = None, "", ""
            if model is not None:
                port = ComfyPort(model)
                own = fingerprint(port)
                fits = f"\n{model_report(port, own, erasure)}"
            said = erasure.summary(doubted(erasure.header.spec, erasure.header.family))
            report = f"{said}{fits}\n\n{receipt_report(path, erasure, port, own)}"
        return io.NodeOutput(erasure, report, ui=ui.PreviewText(report))
