"""Save Prompt Memory and Load Prompt Memory."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..erasure_core.operators.memory import SavedMemory, load_memory, read_memory_header, save_memory
from .erase_notes import doubted
from .modes import ordinary_tensors
from .saved import Saved, check_name, place, target
from .types import CATEGORY, Memory

SAVED = Saved("prompt memory", "Save Prompt Memory", ("erasure",), read_memory_header)


class SavePromptMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureSavePromptMemory",
            display_name="Save Prompt Memory",
            category=CATEGORY,
            description="Writes a memory as one small file in models/erasure. A memory of key mode is what restores "
            "the concept: keep its file apart from the erasure that you share.",
            is_output_node=True,
            inputs=[
                Memory.Input("memory", tooltip="From Learn Safe Prompt Memory."),
                io.String.Input("name", default="no-cigarette-memory", tooltip="File name, without folders."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace a file of the same name."),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="folder/file, as Load Prompt Memory lists it.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        return check_name(name)

    @classmethod
    def execute(cls, memory, name, overwrite) -> io.NodeOutput:
        file = target("erasure", name, overwrite)
        save_memory(memory, file)
        shown = f"saved {place(file)} ({file.stat().st_size / 1e3:.0f} KB)"
        return io.NodeOutput(f"erasure/{file.name}", ui=ui.PreviewText(shown))


class LoadPromptMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureLoadPromptMemory",
            display_name="Load Prompt Memory",
            category=CATEGORY,
            description="Reads a memory that you or somebody else saved, and says what it does. Connect it to Apply Safe "
            "Prompt Memory.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=SAVED.options(),
                    tooltip="Prompt memories in models/erasure, newest first. Press R to refresh the list.",
                )
            ],
            outputs=[
                Memory.Output(display_name="memory", tooltip="For Apply Safe Prompt Memory."),
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
            memory: SavedMemory = load_memory(SAVED.path(file))
        report = memory.summary(doubted(memory.header.spec, memory.header.family))
        return io.NodeOutput(memory, report, ui=ui.PreviewText(report))
