"""Mine, Save and Load Dark Embeddings."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..erasure_core import ConceptError, ConceptSpec, FileError
from ..erasure_core.dark import load_dark, read_dark_header, save_dark, save_words
from ..erasure_core.formats import check_file_name
from ..erasure_core.metrics.judges import look_through, word_for
from ..erasure_core.mining import Settings, mine
from ..erasure_core.operators.changes import Layers, LoRA
from ..erasure_core.operators.cond import Cond
from ..erasure_core.operators.trainable import TrainableModel
from ..erasure_core.port import Family
from .attack_run import check_base
from .footprint import Demand
from .methods import widget
from .modes import host_mode, ordinary_tensors
from .patching import check_ungated, note_unheard
from .port import ComfyPort, family_of
from .replica import latent_shape
from .saved import Saved, place
from .towers import pseudo_words
from .training import Watcher, decoder, making_room
from .types import CATEGORY, Dark, Judge

_FREE, _WORDS = "free", "words"
_SHOWN = ("count", "steps", "learning_rate", "batch", "looks", "seed")
"""Settings with a widget; the others stand at what suits every model."""
_AT_ONCE = 8


class _Watcher(Watcher):
    """Shows what a search has found so far."""

    captions = ("found so far: ", "")

    def searching(self, model: TrainableModel, cond: Cond, done: int, loss: float, null: Cond) -> None:
        self.encode(lambda _prompts: [cond, null])
        self.watch(model, done, {"loss": loss})


def one_concept(text: str) -> ConceptSpec:
    """The concept of a node that searches for one.

    Raises:
        ConceptError: none, or more than one.
    """
    spec = ConceptSpec.parse(text, "", "")
    if len(spec.erase) != 1:
        raise ConceptError("concept: one at a time. Write other words for it behind commas, on the same line")
    return spec


class MineDarkEmbeddings(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        shown = {f.name: f for f in dataclasses.fields(Settings)}
        return io.Schema(
            node_id="ErasureMineDarkEmbeddings",
            display_name="Mine Dark Embeddings",
            category=CATEGORY,
            description="Searches for what still makes a model draw something, whatever its words do: put it behind an erasure "
            "to see how much is left. Shows pictures of each find. Feed the finds back into Erase Concept to erase them too.",
            inputs=[
                io.Model.Input("model", tooltip="The model to search, usually an erased one."),
                io.Clip.Input("clip", tooltip="The CLIP that belongs to it."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to it; draws the pictures."),
                io.String.Input(
                    "concept",
                    default="",
                    placeholder="cigarette, cigar",
                    tooltip="What to look for; other words for it behind commas.",
                ),
                io.Combo.Input(
                    "form",
                    options=[_FREE, _WORDS],
                    default=_FREE,
                    tooltip="free: anything that the network can read, the strongest search. words: pseudo-words that fit into "
                    "any prompt and can be saved as embeddings.",
                ),
                io.Int.Input(
                    "words",
                    default=2,
                    min=1,
                    max=8,
                    tooltip="Form words only: how many pseudo-words a find has. More can say more.",
                ),
                *(widget(shown[name]) for name in _SHOWN),
                io.Model.Input(
                    "base_model",
                    optional=True,
                    tooltip="The model before the erasure: it draws pictures of the concept and shows the search what to aim "
                    "at, which finds more in fewer steps. Takes as much memory again.",
                ),
                io.Image.Input(
                    "images", optional=True, tooltip="Pictures of the concept, not drawn ones. Eight or more."
                ),
                Judge.Input(
                    "judge",
                    optional=True,
                    tooltip="Sorts out drawn pictures without the concept, and scores each find by its pictures.",
                ),
            ],
            outputs=[
                Dark.Output(
                    display_name="dark", tooltip="All finds, best first: for Erase Concept and Save Dark Embeddings."
                ),
                io.Conditioning.Output(
                    display_name="conditioning", tooltip="The best find, in place of a positive prompt."
                ),
                io.Image.Output(display_name="images", tooltip="Pictures of each find, best first."),
                io.String.Output(display_name="report", tooltip="The score of each find, and how they were searched."),
                io.Float.Output(
                    display_name="score",
                    tooltip="Of the best find. With a judge: how likely its pictures show the concept. Without: how much "
                    "better than the empty prompt it explains the pictures, a few percent where something was found.",
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, concept):
        if concept is None:  # linked: known only when the graph runs
            return True
        try:
            one_concept(concept)
        except ConceptError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, concept, form, words, base_model=None, images=None, judge=None, **settings
    ) -> io.NodeOutput:
        spec = one_concept(concept)
        if form not in (_FREE, _WORDS):  # ComfyUI 0.3.75 does not look at what API calls send for a choice
            raise ValueError(f"form: {form!r} is not one of {_FREE}, {_WORDS}")
        if base_model is not None and family_of(base_model) != family_of(model):
            raise ValueError(
                f"base_model: it is {family_of(base_model)}, the model under test {family_of(model)}. Connect the same one"
            )
        check_ungated(model=model, base_model=base_model)
        if base_model is not None:
            check_base(base_model, spec)
        chosen, decode = Settings(**settings), decoder(model, vae)
        watcher = _Watcher([spec.erase[0].name], decode)
        demand = Demand(LoRA(Layers.TEXT, 1), pictures=chosen.batch, relief="Lower the batch")
        with ordinary_tensors():
            port = ComfyPort(model, clip, demand=demand, opened=watcher.opened)
            look = None
            if judge is not None:
                word = word_for(judge, spec.erase[0].words)
                look = making_room(look_through(judge, lambda z: decode(z).movedim(-1, 1), word))
            null = port.conditions([""])[0]
            found = mine(
                port,
                spec,
                chosen,
                watcher.progress,
                base=None if base_model is None else ComfyPort(base_model, clip, demand=demand),
                pictures=None if images is None else latents_of(model, vae, port.family.name, images),
                look=look,
                threshold=0.5 if judge is None else judge.threshold,
                words=pseudo_words(clip, words) if form == _WORDS else None,
                searching=lambda net, cond, done, loss: watcher.searching(net, cond, done, loss, null),
            )
            drawn = torch.cat([decode(part) for part in found.pictures.flatten(0, 1).split(_AT_ONCE)])
            conditioning = conditioning_of(clip, found.dark.states[0], found.dark.header.family)
        report = f"{found.dark.summary()}\n{_source(base_model, images, judge)}"
        report += note_unheard(model=model, base_model=base_model)
        shown = ui.PreviewImage(drawn, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(found.dark, conditioning, drawn, report, found.dark.scores[0], ui=shown)


def latents_of(model, vae, family: str, images: Tensor) -> Tensor:
    """IMAGE [N, H, W, 3] -> clean, scaled latents of the size that the model is searched at; cut about the middle."""
    _, h, w = latent_shape(model, family)
    scaled = comfy.utils.common_upscale(images[..., :3].movedim(-1, 1).clone(), 8 * w, 8 * h, "lanczos", "center")
    with host_mode():
        parts = [vae.encode(part) for part in scaled.movedim(1, -1).contiguous().split(_AT_ONCE)]
    latents = torch.cat([part.float().cpu() for part in parts])
    return model.model.latent_format.process_in(latents)


def conditioning_of(clip, states: Tensor, family: Family) -> list:
    """Text states [L, D] as CONDITIONING; everything but the states is the empty prompt's, the pooled output too.

    Raises:
        ValueError: the CLIP is not of the family that they were mined in, which a sampler would call a matter of shapes.
    """
    with host_mode():
        (empty, options), *_ = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    if empty.shape[-1] != states.shape[-1]:
        raise ValueError(
            f"clip: its text width is {empty.shape[-1]}, and these dark embeddings were mined in {family}. Connect the CLIP "
            "of a model of that family, and use them there"
        )
    return [[states[None].clone(), dict(options)]]


def _check_word_name(stem: str) -> None:
    """Raise where ComfyUI would not find ``embedding:`` with this name: a blank ends it, and brackets mean something else."""
    if re.search(r"[\s(){}]", stem):
        better = "-".join(re.findall(r"[^\s(){}-]+", stem)) or "dark"
        raise FileError(
            f"name: {stem!r} has blanks or brackets, and embedding:{stem}-1 can't be read in a prompt then. "
            f"Take {better!r} instead"
        )


def _source(base_model, images, judge) -> str:
    if images is not None:
        return f"searched with {len(images)} given images"
    if base_model is not None:
        return "searched with pictures that base_model drew"
    seen = "" if judge is not None else "; if it no longer can, connect base_model or images"
    return f"searched with pictures that the model drew itself{seen}"


SAVED = Saved("dark embeddings", "Save Dark Embeddings", ("erasure",), read_dark_header)


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
        if name is None:
            return True
        try:
            check_file_name(name)
        except FileError as error:
            return str(error)
        return True

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
