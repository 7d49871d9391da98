"""Mine Dark Embeddings."""

from __future__ import annotations

import dataclasses

import comfy.utils
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..erasure_core import ConceptError, ConceptSpec
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


def _source(base_model, images, judge) -> str:
    if images is not None:
        return f"searched with {len(images)} given images"
    if base_model is not None:
        return "searched with pictures that base_model drew"
    seen = "" if judge is not None else "; if it no longer can, connect base_model or images"
    return f"searched with pictures that the model drew itself{seen}"
