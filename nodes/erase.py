"""Erase Concept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import folder_paths
import numpy as np
import torch
from comfy_api.latest import io, ui

from ..erasure_core import Aids, ConceptError, ConceptSpec, all_methods, erase
from ..erasure_core.dark import DarkEmbeddings
from ..erasure_core.methods import MethodSpec, settings_from
from ..erasure_core.methods.registry import Look
from ..erasure_core.metrics.judges import look_through, word_for
from ..erasure_core.operators.checkpoint import Checkpoint
from ..erasure_core.presets import PRESETS
from .erase_notes import check_not_made, doubted, note_for_demo, told_of_dark
from .methods import seed_widget
from .modes import ordinary_tensors
from .patching import apply_erasure, check_ungated, note_unheard
from .port import ComfyPort, family_of
from .towers import pseudo_words
from .training import Decode, Watcher, decoder, demand_of, making_room, watcher_of
from .types import CATEGORY, Dark, Erasure, Judge, Method, Pairs

_RELIEF = (
    "Connect a Method node with a smaller batch or rank, or with fewer layers or views, where it has them; UCE, RECE and SPEED "
    "need hardly any"
)
_KEPT_EVERY = 10.0
"""Seconds from one writing of a training's state to the next."""


def check_words_are_read(port: ComfyPort, spec: ConceptSpec) -> None:
    """Raise where a word to erase encodes just as what replaces it: ComfyUI drops embeddings that it can't use, and
    then nothing would be erased without anybody noticing."""
    pairs = [(word, concept.to) for concept in spec.erase for word in concept.words]
    prompts = list(dict.fromkeys(prompt for pair in pairs for prompt in pair))
    states = dict(zip(prompts, (t.states for t in port.text(prompts)), strict=True))
    for word, to in pairs:
        if states[word].shape == states[to].shape and torch.allclose(states[word], states[to], rtol=1e-4, atol=1e-5):
            raise ConceptError(
                f"concept: to this CLIP, {word!r} means the same as {repr(to) if to else 'nothing'}, so there is nothing to "
                "erase. If it is an embedding, check that its file is in models/embeddings and fits this kind of model"
            )


def aids_of(
    port: ComfyPort, chosen: MethodSpec, spec: ConceptSpec, watcher: Watcher, decode: Decode, *, vae, pairs, dark, judge
) -> Aids:
    """What is connected beside the model, as ordinary tensors; what the method reads is checked against model and words.

    Raises:
        ValueError: something was made with another kind of model, or the judge lacks a vae or knows no word of the concept.
    """
    states: Sequence[torch.Tensor] = ()
    owners: tuple[int, ...] = ()
    if dark is not None and "dark" in chosen.unread:
        states = dark.states.clone().unbind(0)  # only to be told that they aren't read
    elif dark is not None:
        dark.check_fits(port.family)
        states, owners = dark.for_request(spec)
    if pairs is not None and chosen.needs_pairs:
        pairs.check_fits(port.family)
        if pairs.unsafe.shape[1] != port.latent_shape[0]:
            raise ValueError(
                f"pairs: their latents have {pairs.unsafe.shape[1]} channels, this model's {port.latent_shape[0]}. Make them "
                "again with this model"
            )
    looks: tuple[Look | None, ...] = ()
    if judge is not None:
        if chosen.asks_judge and vae is None:
            raise ValueError("vae: the judge looks at pictures. Connect the VAE as well")
        known = [_known(judge, concept.words) if chosen.asks_judge else None for concept in spec.erase]
        if chosen.asks_judge and not any(known):
            word_for(judge, [word for concept in spec.erase for word in concept.words])  # says why not
        looks = tuple(None if word is None else _look_for(judge, word, decode) for word in known)

    return Aids(
        dark=tuple(states),
        owners=owners,
        pairs=None if pairs is None else replace(pairs, unsafe=pairs.unsafe.clone(), safe=pairs.safe.clone()),
        looks=looks,
        watch=watcher.watch,
        drawing=watcher.drawing,
    )


def _known(judge, words: Sequence[str]) -> str | None:
    """The first of a concept's words that the judge knows."""
    try:
        return word_for(judge, words)
    except ValueError:
        return None


def _look_for(judge, word: str, decode: Decode) -> Look:
    """The judge behind the decoder."""
    return making_room(look_through(judge, lambda z: decode(z).movedim(-1, 1), word))


def unfinished(what: str) -> Checkpoint:
    """Where the state of a training of this kind, a method's or a memory's, is kept; one of them, the last."""
    folder = Path(folder_paths.get_user_directory()) / "concept_erasure"
    folder.mkdir(parents=True, exist_ok=True)
    return Checkpoint(folder / f"unfinished-{what}.safetensors", _KEPT_EVERY)


class EraseConcept(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureEraseConcept",
            display_name="Erase Concept",
            category=CATEGORY,
            description="Makes the model stop drawing something. Put it behind the checkpoint loader (and your LoRAs), type "
            "what should go, and sample as always. Your checkpoint is not changed; delete the node to undo.",
            inputs=[
                io.Model.Input("model", tooltip="The model to edit, with the LoRAs that it will be used with."),
                io.Clip.Input("clip", tooltip="The CLIP that encodes your prompts; the concept is read through it."),
                io.String.Input(
                    "concept",
                    multiline=True,
                    default="",
                    placeholder="cigarette, cigar, smoking",
                    tooltip="What must no longer appear. One concept a line, other words for it behind commas. Words that "
                    "you list are erased firmly, words that you leave out only as far as they are related.",
                ),
                io.String.Input(
                    "replace_with",
                    multiline=True,
                    default="",
                    placeholder="(nothing)",
                    tooltip="What is drawn instead. Empty: nothing in particular. Something of the same kind (dog for cat) "
                    "keeps pictures natural. One line for all concepts, or one line each.",
                ),
                io.String.Input(
                    "keep",
                    multiline=True,
                    default="",
                    placeholder="dog, tiger, horse",
                    tooltip="What must look as before, by commas or lines. Name what is similar to the concept: that is "
                    "what would suffer.",
                ),
                io.Boolean.Input(
                    "keep_everyday",
                    default=True,
                    tooltip="Also hold some 230 everyday words for things, animals, people and places, except those that mean "
                    "what is erased. Off: pictures of all that keep doesn't name may change. SPEED and DUO never "
                    "hold them, CPE always does, EAP unless its vocabulary is filled in.",
                ),
                io.Combo.Input(
                    "quality",
                    options=list(PRESETS),
                    default=next(iter(PRESETS)),
                    tooltip=" ".join(f"{name}: {p.summary}" for name, p in PRESETS.items())
                    + " A connected method overrides this.",
                ),
                Method.Input("method", optional=True, tooltip="A Method node, to choose method and settings by hand."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Draws the pictures that methods which train show meanwhile. Without it they are coarse colours.",
                ),
                Pairs.Input(
                    "pairs",
                    optional=True,
                    tooltip="From Make SDEdit Pair, for the method DUO, which learns from pictures.",
                ),
                Dark.Input(
                    "dark",
                    optional=True,
                    tooltip="What still brings the concept back, from Mine Dark Embeddings, Load Dark Embeddings or an Erase "
                    "Concept before. It is erased like further words.",
                ),
                Judge.Input(
                    "judge",
                    optional=True,
                    tooltip="Says when Dark Miner may stop with a concept: once it no longer sees it. Needs the vae.",
                ),
                seed_widget(
                    "For thorough: the same seed gives the same erasure; where the concept comes back, another may hold. A "
                    "connected method has its own.",
                    optional=True,
                ),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    optional=True,
                    tooltip="For methods that train: keeps the state of a training that is cut off, and goes on from there "
                    "when the same thing is run again. The file lies in ComfyUI's user folder until the training has ended.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model without the concept, at full strength."),
                Erasure.Output(
                    display_name="erasure",
                    tooltip="For Apply Erasure (with a strength), Save Erasure and Merge Erasures.",
                ),
                io.String.Output(display_name="report", tooltip="What was done, in words."),
                Dark.Output(
                    display_name="dark",
                    tooltip="What Dark Miner found and erased, for Save Dark Embeddings or other models; from other methods "
                    "nothing.",
                ),
            ],
        )

    # No validate_inputs: where another branch of the graph is valid, ComfyUI shows nobody what it says, and runs that branch.
    @classmethod
    def execute(
        cls,
        model,
        clip,
        concept,
        replace_with,
        keep,
        keep_everyday,
        quality,
        method=None,
        vae=None,
        pairs=None,
        dark=None,
        judge=None,
        seed=0,
        resume=False,
    ) -> io.NodeOutput:
        spec = ConceptSpec.parse(concept, replace_with, keep, everyday=keep_everyday)
        if method is None and quality not in PRESETS:
            raise ValueError(f"quality: {quality!r} is none of {', '.join(PRESETS)}")
        check_ungated(model=model)
        name, settings = method or PRESETS[quality].on(family_of(model), seed)
        chosen = all_methods()[name]
        wanted = settings_from(chosen, settings)
        check_not_made(model, name, spec, wanted)
        demand = replace(demand_of(wanted, chosen, len(spec.erase)), relief=_RELIEF)
        decode = decoder(model, vae)
        watcher = watcher_of(spec, decode)
        size = pairs.unsafe.shape[2:] if pairs is not None and chosen.needs_pairs else None
        with ordinary_tensors():
            port = ComfyPort(model, clip, demand=demand, opened=watcher.opened, size=size)
            check_words_are_read(port, spec)
            aids = aids_of(port, chosen, spec, watcher, decode, vae=vae, pairs=pairs, dark=dark, judge=judge)
            found: list[tuple[DarkEmbeddings | None, str]] = []
            aids = replace(
                aids,
                slot=lambda count: pseudo_words(clip, count).slot,
                found=lambda pool, said: found.append((pool, said)),
            )
            if resume:
                aids = replace(aids, checkpoint=unfinished(name))
            if chosen.trains:
                watcher.encode(port.conditions)
            erasure = erase(port, spec, name, settings, watcher.progress, aids)
            patched = apply_erasure(model, erasure, 1.0)
        mined, said = found[0] if found else (None, "")
        ignored = ", ".join(chosen.ignores(spec, aids))
        unread = f"{chosen.title} makes no use of: {ignored}." if ignored else ""
        trained = watcher.report() + note_unheard(model=model) if chosen.trains else ""
        doubts = doubted(spec, port.family)
        parts = [erasure.summary(doubts), told_of_dark(dark, spec, chosen), *doubts.values(), unread]
        parts += [note_for_demo(port, chosen, wanted), said, trained]
        report = "\n".join(part for part in parts if part)
        shown = ui.PreviewText(report).as_dict()
        if watcher.picture is not None:
            picture = torch.from_numpy(np.array(watcher.picture)).float()[None] / 255
            shown |= ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(patched, erasure, report, mined, ui=shown)
