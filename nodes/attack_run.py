"""What an attack on the user's models is made of: prompts, budget, memory, and what the node shows meanwhile."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from enum import Enum
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..erasure_core import ConceptSpec, Erasure
from ..erasure_core.attack_record import LONGEST
from ..erasure_core.attacks import AttackSpec, Knowledge
from ..erasure_core.methods import settings_from
from ..erasure_core.methods.registry import typed
from ..erasure_core.operators.changes import Layers, LoRA
from ..erasure_core.operators.cond import Cond
from ..erasure_core.operators.memory import Mode, PromptMemory
from ..erasure_core.operators.trainable import TrainableModel
from .footprint import Demand
from .patching import carried
from .reading import uses_of
from .sampling import PLACE, template
from .training import Decode, Watcher

_MOST = 64
_TICKS = 1000


class AttackWatcher(Watcher):
    """Shows the best find so far: what a search is at, then the pictures that are counted."""

    captions = ("best so far: ", "")

    def __init__(self, name: str, decode: Decode, memory: PromptMemory | None) -> None:
        super().__init__([name], decode)
        self._memory, self._best = memory, -math.inf

    def opened(self, model: TrainableModel) -> None:
        super().opened(model)
        model.reads = self._memory

    def search(self, null: Cond):
        """What an attack calls: ``watch`` of :class:`AttackTarget`."""

        def watch(cond: Cond, score: float | None) -> None:
            if score is None or score >= self._best:
                self._best = self._best if score is None else score
                self.encode(lambda _prompts: [cond, null])

        return watch

    def afresh(self) -> None:
        """Another stage: what is shown has to be found anew."""
        self._conds, self._best = [], -math.inf

    def counted(self, pictures: Tensor, probability: Tensor) -> None:
        """Pictures [N, H, W, 3] of one way, and what the judge says of each."""
        if float(probability.mean()) > self._best:
            self._best = float(probability.mean())
            clearest = (pictures[int(probability.argmax())] * 255).round().to(torch.uint8).numpy()
            self._pictures, self._fresh = [Image.fromarray(clearest).resize((256, 256))], True

    def stage(self, start: float, share: float):
        """Progress of a part of the run, on one bar."""
        return lambda done, total: self.progress(round(_TICKS * (start + share * done / max(1, total))), _TICKS)


def prompts_of(text: str, spec: ConceptSpec) -> tuple[str, ...]:
    """The prompts to attack, one a line, with the concept's name in its place.

    Raises:
        ValueError: none, or too many.
    """
    lines = [template(line.strip()).replace(PLACE, spec.erase[0].name) for line in text.splitlines()]
    prompts = tuple(dict.fromkeys(line for line in lines if line))
    if not 1 <= len(prompts) <= _MOST:
        raise ValueError(f"prompts: {len(prompts)} given, 1 to {_MOST} can be attacked. Write one a line: a {PLACE}")
    for prompt in prompts:
        if len(prompt) > LONGEST:
            raise ValueError(f"prompts: {prompt[:40]!r} ... has {len(prompt)} characters, at most {LONGEST} fit")
    return prompts


def settings_of(chosen: AttackSpec, effort: float, seed: int, synonyms: str, written: str) -> dict[str, Any]:
    """The attack's settings with its default budget scaled; that of a quick attack is never cut. What is ``written``, a line
    ``name = value`` for each, comes last.

    Raises:
        ValueError: an effort that is no share, a seed out of range, or a line that sets nothing.
    """
    if not 0 < effort <= 2:
        raise ValueError(f"effort: {effort:g} must lie between 0.001 and 2; 1 is the attack's own budget")
    fields = {f.name: f for f in dataclasses.fields(chosen.settings)}
    budget, share = fields[chosen.budget], max(1.0, effort) if chosen.quick else effort
    usual: int = getattr(chosen.settings(), chosen.budget)
    scaled = min(max(round(usual * share), budget.metadata["low"]), budget.metadata["high"])
    made: dict[str, Any] = {chosen.budget: scaled}
    if "seed" in fields:
        made["seed"] = seed
    if isinstance(fields.get("words", budget).default, str):
        made["words"] = synonyms
    for line in filter(None, map(str.strip, written.splitlines())):
        name, equals, value = (part.strip() for part in line.partition("="))
        if not equals or name not in fields:
            known = ", ".join(fields)
            raise ValueError(
                f"settings: {line[:60]!r} sets nothing. Write a line such as {chosen.budget} = 500; there are {known}"
            )
        try:
            made[name] = typed(value, fields[name].default)
        except ValueError as error:
            kind = type(fields[name].default)
            choices = (
                f", one of {', '.join(x.value for x in kind)}"
                if issubclass(kind, Enum)
                else f", such as {fields[name].default}"
            )
            raise ValueError(f"settings: {name} = {value[:60]!r} can't be read. It takes a value{choices}") from error
    settings_from(chosen, made)
    return made


def demand_of(chosen: AttackSpec, settings: Any, gated: Sequence[Erasure] = ()) -> Demand:
    """What an attack holds beside the network: relearning trains a LoRA, the others an input; gated erasures lie beside it."""
    rank = getattr(settings, "rank", 0)
    what = LoRA(settings.layers, rank) if rank else LoRA(Layers.TEXT, 1)
    relief = "Choose an attack that only asks, such as synonyms or rece_residual, or close what else uses that memory"
    numbers = sum(d.up.numel() + (0 if d.down is None else d.down.numel()) for e in gated for d in e.deltas.values())
    pictures = getattr(settings, "batch", 1) if chosen.knowledge is Knowledge.WHITE_BOX else 1
    return Demand(what, beside=numbers, relief=relief, pictures=pictures)


def check_base(base_model, spec: ConceptSpec) -> None:
    """Raise where what ``base_model`` carries suppresses the concept: it is an erased model, not one from before."""
    words = {w.casefold() for w in spec.erase[0].words}
    rows = [use.memory.header for use in uses_of(base_model) if use.memory.mode is Mode.SUPPRESS]
    for what, headers in (("an erasure", carried(base_model)), ("a prompt memory", rows)):
        for header in headers:
            if found := [w for c in header.spec.erase for w in c.words if w.casefold() in words]:
                raise ValueError(
                    f"base_model: it carries {what} of {found[0]!r}, so it is no model from before that. Connect the model "
                    "that Erase Concept or Apply Erasure was given, for example that of the checkpoint loader"
                )
