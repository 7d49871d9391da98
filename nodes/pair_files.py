"""Save and Load Concept Pairs."""

from __future__ import annotations

import os

import folder_paths
from comfy_api.latest import io, ui

from ..erasure_core.pair_files import load_pairs, read_pairs_header, save_pairs
from .modes import ordinary_tensors
from .saved import Saved, check_name, place, target
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
        file = target(FOLDER, name, overwrite)
        with ordinary_tensors():
            save_pairs(pairs, file)
        shown = f"saved {place(file)} ({file.stat().st_size / 1e6:.1f} MB)"
        return io.NodeOutput(file.name, ui=ui.PreviewText(shown))


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
