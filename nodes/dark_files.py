"""Save Dark Embeddings and Load Dark Embeddings."""

from __future__ import annotations

import re
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..erasure_core import FileError
from ..erasure_core.dark import load_dark, read_dark_header, save_dark, save_words
from ..erasure_core.formats import check_file_name
from .mine import conditioning_of
from .modes import ordinary_tensors
from .saved import Saved, check_name, place
from .types import CATEGORY, Dark

SAVED = Saved("dark embeddings", "Save Dark Embeddings", ("erasure",), read_dark_header)


def _check_word_name(stem: str) -> None:
    """Raise where ComfyUI would not find ``embedding:`` with this name: a blank ends it, and brackets mean something else."""
    if re.search(r"[\s(){}]", stem):
        better = "-".join(re.findall(r"[^\s(){}-]+", stem)) or "dark"
        raise FileError(
            f"name: {stem!r} has blanks or brackets, and embedding:{stem}-1 can't be read in a prompt then. "
            f"Take {better!r} instead"
        )


class SaveDarkEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureSaveDarkEmbeddings",
            display_name="Save Dark Embeddings",
            category=CATEGORY,
            description="Keeps mined embeddings in models/erasure. Those in the form of words are also written to "
            "models/embeddings, so that embedding:name-1 brings them into any prompt.",
            is_output_node=True,
            inputs=[
                Dark.Input(
                    "dark", tooltip="From Mine Dark Embeddings, or from Erase Concept with the method Dark Miner."
                ),
                io.String.Input("name", default="cigarette-dark", tooltip="File name, without folders."),
                io.Boolean.Input("overwrite", default=False, tooltip="Replace files of the same name."),
            ],
            outputs=[io.String.Output(display_name="file", tooltip="folder/file, as Load Dark Embeddings lists it.")],
        )

    @classmethod
    def validate_inputs(cls, name):
        return check_name(name)

    @classmethod
    def execute(cls, dark, name, overwrite) -> io.NodeOutput:
        if dark is None:  # Erase Concept's output, of a method that doesn't mine
            raise ValueError("dark: nothing was found, so there is nothing to save. Only the method Dark Miner and Mine Dark "
                "Embeddings find some; where a report says that the words alone were enough, all is well")  # fmt: skip
        stem = check_file_name(name)
        if dark.words:
            _check_word_name(stem)
        root, embeddings = (Path(folder_paths.get_folder_paths(x)[0]) for x in ("erasure", "embeddings"))
        names = [f"{stem}-{i + 1}" for i in range(len(dark))] if dark.words else []
        targets = [root / f"{stem}.safetensors", *(embeddings / f"{n}.safetensors" for n in names)]
        if not overwrite and (there := [t for t in targets if t.exists()]):
            raise FileError(
                f"name: {there[0].name} is already in {place(there[0].parent)}. Choose another name or switch overwrite on"
            )
        for folder in (root, embeddings):
            folder.mkdir(parents=True, exist_ok=True)
        with ordinary_tensors():
            save_dark(dark, targets[0])
            if names:
                save_words(dark, embeddings, stem)
        lines = [f"saved {place(targets[0])}", *(f"embedding:{n}" for n in names)]
        return io.NodeOutput(f"erasure/{stem}.safetensors", ui=ui.PreviewText("\n".join(lines)))


class LoadDarkEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureLoadDarkEmbeddings",
            display_name="Load Dark Embeddings",
            category=CATEGORY,
            description="Reads mined embeddings that you or somebody else saved, and says what they bring back.",
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP that belongs to the model."),
                io.Combo.Input(
                    "file",
                    options=SAVED.options(),
                    tooltip="Sets in models/erasure, newest first. Press R to refresh the list.",
                ),
            ],
            outputs=[
                Dark.Output(display_name="dark", tooltip="For Erase Concept."),
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The best find, in place of a positive prompt."
                ),
                io.String.Output(display_name="report", tooltip="What the file says of itself."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file):
        return SAVED.check(file)

    @classmethod
    def fingerprint_inputs(cls, file, clip=None):
        return SAVED.stamp(file)

    @classmethod
    def execute(cls, clip, file) -> io.NodeOutput:
        with ordinary_tensors():
            dark = load_dark(SAVED.path(file))
            conditioning = conditioning_of(clip, dark.states[0], dark.header.family)
        return io.NodeOutput(dark, conditioning, dark.summary(), ui=ui.PreviewText(dark.summary()))
