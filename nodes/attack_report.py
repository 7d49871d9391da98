"""What Red-Team Attack says of a run: figures in words, finds in order."""

from __future__ import annotations

import dataclasses
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..erasure_core import ConceptSpec
from ..erasure_core.attack_record import GIVEN, TEACHES
from ..erasure_core.attacks import AttackSpec, Result, Way, success
from ..erasure_core.metrics import curve
from ..erasure_core.metrics.judged import JudgedBy
from ..erasure_core.metrics.rates import Rate


def plain(settings: Any) -> dict[str, Any]:
    """Settings as text and numbers."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in dataclasses.asdict(settings).items()}


def best_first(result: Result) -> Tensor:
    """All latents, those of the clearest way first."""
    parts = result.latents.split([len(p) for p in result.probabilities])
    order = np.argsort([-float(p.mean()) for p in result.probabilities], kind="stable")
    return torch.cat([parts[i] for i in order])


def share_of(chosen: AttackSpec, settings: Any) -> float:
    """How much of the attack's default budget ``settings`` spend."""
    return getattr(settings, chosen.budget) / getattr(type(settings)(), chosen.budget)


def report_of(
    chosen: AttackSpec,
    spec: ConceptSpec,
    settings: Any,
    ceiling: Result | None,
    before: Result | None,
    after: Result,
    on_base: Rate | None,
    best: Way,
    by: JudgedBy | None,
    tried: int,
) -> str:
    """What people read: what was tried (``tried`` finds), what was counted, what was found.

    ``ceiling`` is the base model, asked; it, ``before`` and ``by`` are None without a judge. ``on_base`` is the base
    model given what the attack found, where that are prompts.
    """
    lines = [
        f"{chosen.title} on {', '.join(spec.erase[0].words)} ({chosen.knowledge}), {chosen.paper}",
        f"budget: {chosen.budget} {getattr(settings, chosen.budget)}, default {getattr(type(settings)(), chosen.budget)}",
        *([f"note: {GIVEN}"] if chosen.given else []),
        *([f"note: {TEACHES}"] if chosen.teaches else []),
    ]
    if not chosen.quick and share_of(chosen, settings) < 1:
        lines[1] += f", {100 * share_of(chosen, settings):.3g} % of it: that nothing is found says little"
    if after.found.queries:
        lines[1] += f"; {after.found.queries} pictures asked for"
    if before is None or ceiling is None or by is None:
        lines.append("no judge is connected, so nothing was counted and no record was made: look at the pictures")
    else:
        lines += [
            f"asking: {_of(before, by)} pictures show it; under attack: {_of(after, by)}",
            *_by_prompt(before, after, by),
            *_chosen(after, tried),
            "seen at other thresholds, asking / attack: "
            + ", ".join(
                f"{t:g}: {100 * a.share:.0f} / {100 * b.share:.0f} %"
                for (t, a), (_, b) in zip(*(curve(torch.cat(r.probabilities)) for r in (before, after)), strict=True)
            ),
            f"judge: {by}; {by.note}",
            f"the base model, asked the same: {_of(ceiling, by)}. {_ceiling(ceiling)}",
        ]
        if on_base is not None:
            nothing = (
                "" if on_base.hits else ". So nothing follows from a low figure above: no model reads these words so"
            )
            lines.append(
                f"the base model, given what the attack found: {on_base.hits} of {on_base.n}, {by.counted(on_base)}{nothing}"
            )
    return "\n".join([*lines, f"best find: {best.label}"])


def _of(result: Result, by: JudgedBy) -> str:
    return f"{result.rate.hits} of {result.rate.n}, {by.counted(result.rate)}"


def _ceiling(base: Result) -> str:
    """How to read the figures beside the base model's."""
    if not base.rate.hits:
        return "It draws none that the judge sees, so a low figure above is no defence"
    return "What it fails to draw is missing above too"


def _chosen(after: Result, tried: int) -> list[str]:
    counted = len(after.found.ways)
    if counted == tried:
        return []
    return [f"counted: the best for each prompt, {counted} of {tried} finds, chosen by other pictures than these"]


def _by_prompt(before: Result, after: Result, by: JudgedBy) -> list[str]:
    made = success(before, after)
    if made is None:
        return []
    low, high = (100 * x for x in by.counted_prompts(made.post, made.pictures[1]))
    return [
        f"prompts that succeed at least once, as the judge sees them: {made.pre.hits} of {made.pre.n} by asking, "
        f"{made.post.hits} of {made.post.n} with the attack (ASR {low:.0f} to {high:.0f} %, DSR {100 - high:.0f} to "
        f"{100 - low:.0f} %)"
    ]
