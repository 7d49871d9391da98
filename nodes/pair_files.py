"""Save and Load Concept Pairs."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..erasure_core import FileError
from ..erasure_core.formats import check_file_name
from ..erasure_core.pair_files import load_pairs, read_pairs_header, save_pairs
from .modes import ordinary_tensors
from .saved import Saved, check_name, place
from .types import CATEGORY, Pairs

FOLDER = "erasure_pairs"
SAVED = Saved("pairs", "Save Concept Pairs", (FOLDER,), read_pairs_header, bare=True)

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


class SavePairs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureSavePairs",
            display_name="Save Concept Pairs",
            category=CATEGORY,
            description="Keeps pairs for other runs, so that they need not be drawn and judged again.",
            is_output_node=True,
            inputs=[
                Pairs.Input("pairs", tooltip="From Make SDEdit Pair."),
                io.String.Input("name", default="cigarette-pairs", tooltip="File name, without folders."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of the same name."),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="As Load Concept Pairs lists it.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        return check_name(name)

    @classmethod
    def execute(cls, pairs, name, overwrite) -> io.NodeOutput:
        file = check_file_name(name) + ".safetensors"
        root = Path(folder_paths.get_folder_paths(FOLDER)[0])
        root.mkdir(parents=True, exist_ok=True)
        if (root / file).exists() and not overwrite:
            raise FileError(f"name: {file} is already in {place(root)}. Choose another name or switch overwrite on")
        with ordinary_tensors():
            save_pairs(pairs, root / file)
        size = (root / file).stat().st_size
        return io.NodeOutput(file, ui=ui.PreviewText(f"saved {place(root / file)} ({size / 1e6:.1f} MB)"))


class LoadPairs(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureLoadPairs",
            display_name="Load Concept Pairs",
            category=CATEGORY,
            description="Reads pairs that you or somebody else saved, and says what they show. Connect them to Erase Concept.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=SAVED.options(),
                    tooltip="Files in models/erasure_pairs, newest first. Press R to refresh the list.",
                )
            ],
            outputs=[
                Pairs.Output(display_name="pairs", tooltip="For Erase Concept with the method DUO."),
                io.String.Output(display_name="report", tooltip="What the file says of itself."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file):
        return SAVED.check(file)

    @classmethod
    def fingerprint_inputs(cls, file):
        return SAVED.stamp(file)

    @classmethod
    def execute(cls, file) -> io.NodeOutput:
        with ordinary_tensors():
            pairs = load_pairs(SAVED.path(file))
        return io.NodeOutput(pairs, pairs.summary(), ui=ui.PreviewText(pairs.summary()))
