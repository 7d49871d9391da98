"""Learn and Apply Safe Prompt Memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from ..erasure_core import Aids, ConceptSpec
from ..erasure_core import Erasure as CoreErasure
from ..erasure_core.methods import kpop
from ..erasure_core.operators.changes import Layers, LoRA
from ..erasure_core.operators.memory import Mode, Placement
from ..erasure_core.suppress import Settings as SuppressSettings
from ..erasure_core.suppress import suppress
from .erase import check_words_are_read, unfinished
from .erase_notes import doubted
from .footprint import Demand
from .methods import seed_widget
from .modes import ordinary_tensors
from .patching import apply_erasure, check_ungated, note_unheard
from .port import ComfyPort
from .reading import apply_memory
from .training import decoder, demand_of, watcher_of
from .types import CATEGORY, Erasure, Memory

_BLOCKS = {"all blocks": Placement.ALL, "middle and output blocks": Placement.MIDOUT, "middle block": Placement.MID}
_READERS = {"both": False, "prompt only": True}
_NEEDS = "0: as the mode needs (suppress {0}, key {1})."


def _choice(what: str, value: str, choices) -> None:
    """ComfyUI 0.3.75 does not look at what API calls send for a choice."""
    if value not in choices:
        raise ValueError(f"{what}: {value!r} is not one of {', '.join(choices)}")


def settings_of(
    mode: Mode, rows: int, placement: Placement, iterations: int, learning_rate: float, weights_rate: float, seed: int
) -> SuppressSettings | kpop.Settings:
    """Of a mode; where a number is 0 its own default stands."""
    rate = "learning_rate" if mode is Mode.SUPPRESS else "memory_rate"
    given = {"rows": rows, "iterations": iterations, rate: learning_rate}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value}
    changed |= {"placement": placement, "seed": seed}
    return (
        SuppressSettings(**changed) if mode is Mode.SUPPRESS else kpop.Settings(**changed, learning_rate=weights_rate)
    )


def _demand(settings: SuppressSettings | kpop.Settings) -> Demand:
    """What is held while learning; suppress mode trains no weights, and reads each picture with and without its prompt."""
    if isinstance(settings, SuppressSettings):
        return Demand(LoRA(Layers.TEXT, 1), pictures=4 * settings.batch)
    return demand_of(settings, kpop.SPEC, 1)


class LearnSafePromptMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureLearnSafePromptMemory",
            display_name="Learn Safe Prompt Memory",
            category=CATEGORY,
            description="Learns a few rows that cross-attention reads beside every prompt. Suppress: the rows alone push "
            "something away, the weights stay. Key: the weights hide it, and the rows are the private key that brings it "
            "back. Takes minutes; pictures show how it goes.",
            inputs=[
                io.Model.Input("model", tooltip="The model, with the LoRAs that it will be used with."),
                io.Clip.Input("clip", tooltip="The CLIP that encodes your prompts; the concept is read through it."),
                io.String.Input(
                    "concept",
                    multiline=True,
                    default="",
                    placeholder="cigarette, cigar, smoking",
                    tooltip="What must not appear. One concept a line, other words for it behind commas.",
                ),
                io.String.Input(
                    "replace_with",
                    multiline=True,
                    default="",
                    placeholder="(nothing)",
                    tooltip="What is drawn instead. Empty: nothing in particular. One line for all concepts, or one each.",
                ),
                io.String.Input(
                    "keep",
                    multiline=True,
                    default="",
                    placeholder="dog, tiger, horse",
                    tooltip="What must look as before. Every prompt reads the rows, so name many things here, above all those "
                    "that are similar. Empty: everyday words.",
                ),
                io.Combo.Input(
                    "mode",
                    options=[m.value for m in Mode],
                    default=Mode.SUPPRESS.value,
                    tooltip="suppress: apply the memory and the concept goes; take it off and it is back. key: the erasure "
                    "hides the concept from everybody, and who has the memory gets it back.",
                ),
                io.Int.Input(
                    "rows",
                    default=0,
                    min=0,
                    max=64,
                    tooltip="Size of the memory. More can do more, and every attention reads them. "
                    + _NEEDS.format(SuppressSettings.rows, kpop.Settings.rows),
                ),
                io.Combo.Input(
                    "placement",
                    options=list(_BLOCKS),
                    default=next(iter(_BLOCKS)),
                    tooltip="Which blocks of the network read the rows. All is firmest; the middle block alone hardly changes "
                    "other pictures.",
                ),
                io.Int.Input(
                    "iterations",
                    default=0,
                    min=0,
                    max=100000,
                    step=10,
                    tooltip="Training steps for each concept. More suppress (or hide) more firmly and take longer. "
                    + _NEEDS.format(SuppressSettings.iterations, kpop.Settings.iterations)
                    + " Key on EmojiCanvas: 100.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.0,
                    min=0.0,
                    max=1.0,
                    step=1e-3,
                    round=1e-8,
                    tooltip="Size of the memory's training step. Lower it if the losses jump. "
                    + _NEEDS.format(f"{SuppressSettings.learning_rate:g}", f"{kpop.Settings.memory_rate:g}"),
                ),
                io.Float.Input(
                    "weights_rate",
                    default=kpop.Settings.learning_rate,
                    min=1e-8,
                    max=1.0,
                    step=1e-5,
                    round=1e-8,
                    tooltip="Key mode only: size of the weights' training step. 1e-5 suits Stable Diffusion with 1000 "
                    "iterations, 1e-3 EmojiCanvas with 100.",
                ),
                seed_widget("The same seed gives the same memory."),
                io.Vae.Input(
                    "vae",
                    optional=True,
                    tooltip="Draws the pictures that are shown meanwhile. Without it they are coarse colours.",
                ),
                io.Boolean.Input(
                    "resume",
                    default=False,
                    optional=True,
                    tooltip="Keeps the state of a training that is cut off, and goes on from there when the same thing is run "
                    "again. The file lies in ComfyUI's user folder until the training has ended.",
                ),
            ],
            outputs=[
                io.Model.Output(
                    display_name="model",
                    tooltip="Without the concept: with the memory applied (suppress), or with the erasure (key).",
                ),
                Memory.Output(
                    display_name="memory", tooltip="For Apply and Save Prompt Memory. In key mode it is the key."
                ),
                Erasure.Output(
                    display_name="erasure",
                    tooltip="Key mode: the public change, for Apply and Save Erasure. Suppress mode changes no weight, so "
                    "it is empty.",
                ),
                io.String.Output(display_name="report", tooltip="What was done, in words."),
            ],
        )

    @classmethod
    def execute(
        cls, model, clip, concept, replace_with, keep, mode, rows, placement, iterations, learning_rate, weights_rate,
        seed, vae=None, resume=False,
    ) -> io.NodeOutput:  # fmt: skip
        spec = ConceptSpec.parse(concept, replace_with, keep)
        spec = replace(spec, everyday=not spec.keep)
        _choice("mode", mode, [m.value for m in Mode])
        _choice("placement", placement, _BLOCKS)
        check_ungated(model=model)
        settings = settings_of(Mode(mode), rows, _BLOCKS[placement], iterations, learning_rate, weights_rate, seed)
        watcher = watcher_of(spec, decoder(model, vae))
        with ordinary_tensors():
            port = ComfyPort(model, clip, demand=_demand(settings), opened=watcher.opened)
            check_words_are_read(port, spec)
            watcher.encode(port.conditions)
            kept = unfinished(f"memory-{mode}") if resume else None
            aids = Aids(watch=watcher.watch, drawing=watcher.drawing, checkpoint=kept)
            if isinstance(settings, SuppressSettings):
                memory = suppress(port, spec, settings, watcher.progress, aids)
                erasure, patched = CoreErasure(memory.header, {}), apply_memory(model, memory, 1.0)
            else:
                hidden = kpop.hide(port, spec, settings, watcher.progress, aids)
                memory, erasure = hidden.key, hidden.erasure
                patched = apply_erasure(model, erasure, 1.0)
        doubts = doubted(spec, port.family)
        report = "\n".join((memory.summary(doubts), *doubts.values(), watcher.report())) + note_unheard(model=model)
        if mode == Mode.KEY and seed == 0:
            report += "\nnote: at seed 0, where everybody begins, the key is easily learned again. Take one that nobody guesses"
        shown = ui.PreviewText(report).as_dict()
        if watcher.picture is not None:
            picture = torch.from_numpy(np.array(watcher.picture)).float()[None] / 255
            shown |= ui.PreviewImage(picture, cls=cls).as_dict()
        return io.NodeOutput(patched, memory, erasure, report, ui=shown)


class ApplySafePromptMemory(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureApplySafePromptMemory",
            display_name="Apply Safe Prompt Memory",
            category=CATEGORY,
            description="Lets the model read a learned memory beside every prompt: one that suppresses a concept, or the key "
            "that restores what an erasure hides. Several of these nodes add up. Put it behind region and attention nodes.",
            inputs=[
                io.Model.Input("model", tooltip="The model to patch, of the family that the memory was learned on."),
                Memory.Input("memory", tooltip="From Learn Safe Prompt Memory or Load Prompt Memory."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=0.0,
                    max=4.0,
                    step=0.25,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How often the rows are there, in quarters: 0 is the untouched model, 1 as learned, 2 twice as "
                    "often. Fractions make the attention to the text a little slower.",
                ),
                io.Combo.Input(
                    "read_by",
                    options=list(_READERS),
                    default=next(iter(_READERS)),
                    tooltip="Which prompts read it. Both is how it was learned, and free. Prompt only leaves the negative "
                    "prompt alone, and takes a second pass of the network in each step: up to twice the time, where prompt and "
                    "negative prompt were computed together before.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model that reads the memory.")],
        )

    @classmethod
    def execute(cls, model, memory, strength, read_by) -> io.NodeOutput:
        _choice("read_by", read_by, _READERS)
        with ordinary_tensors():
            return io.NodeOutput(apply_memory(model, memory, strength, conditional_only=_READERS[read_by]))
