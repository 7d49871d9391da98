"""What pictures with and without an erasure are measured by: shares that show a thing, and how far kept ones moved."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...metrics.distances import kernel_distance
from ...metrics.rates import Rate, rate
from ..judge import Judge, Verdict
from ..splits import Erasing, Questions, Shot
from ..studio import Studio
from . import perceptual

MEASURES = {
    "direct": "direct",
    "named": "named words",
    "unseen": "unseen words",
    "neighbours": "neighbours",
    "kept_objects": "kept objects",
    "kept_styles": "kept styles",
    "beside": "rest of the picture",
}
"""Shares of pictures. The first three should fall to 0, the others stay as in the base model."""
DISTANCES = {"kept_distance": "kept distance", "kept_kernel_distance": "kernel distance"}
"""How far kept pictures moved: one by one at the same noise, and as a set."""


def flags(verdict: Verdict, names: Sequence[str]) -> Tensor:
    """[B] bool: picture b shows ``names[b]``."""
    shown = {name: verdict.shows(name) for name in set(names)}
    return torch.tensor([bool(shown[name][b]) for b, name in enumerate(names)], dtype=torch.bool)


def figures(asked: Questions, erasing: Erasing, pictures: Mapping[str, Tensor], judge: Judge) -> dict[str, Rate]:
    """The :data:`MEASURES` of one set of pictures. An object is shown if the judge names it, a style likewise."""
    by_style = bool(erasing.styles)
    verdicts = {k: judge.judge(v) for k, v in pictures.items()}

    def of(group: str, style: bool) -> Rate:
        shots = asked.groups()[group]
        if not shots:
            return Rate(0, 0)
        return rate(flags(verdicts[group], [s.style if style else s.object for s in shots]))

    return {
        "direct": of("direct", by_style),
        "named": of("named", by_style),
        "unseen": of("unseen", by_style),
        "neighbours": of("neighbours", False),
        "kept_objects": of("kept", False),
        "kept_styles": of("kept", True),
        "beside": of("direct", not by_style),
    }


def measure(
    studio: Studio, asked: Questions, erasing: Erasing, draw: Callable[[Sequence[Shot]], Tensor]
) -> tuple[dict[str, Rate], dict[str, float]]:
    """The figures of what ``draw`` makes of shots, and the :data:`DISTANCES` of kept pictures from the base's."""
    groups = {k: v for k, v in asked.groups().items() if v}
    drawn = draw([s for g in groups.values() for s in g]).split([len(g) for g in groups.values()])
    pictures = dict(zip(groups, drawn, strict=True))
    base = studio.draw(groups["kept"], None)
    moved = {
        "kept_distance": float(perceptual.distance(pictures["kept"], base).mean()),
        "kept_kernel_distance": kernel_distance(*map(perceptual.embedding, (pictures["kept"], base)), paired=True),
    }
    return figures(asked, erasing, pictures, studio.judge), {name: round(x, 4) for name, x in moved.items()}


def mean_of(rows: Sequence[Mapping[str, Any]], what: str) -> float | None:
    """The mean of a figure over rows; None where one of them, an older result, doesn't have it."""
    known = [row[what] for row in rows if what in row]
    return statistics.fmean(known) if known and len(known) == len(rows) else None


def told(figure: float | None) -> str:
    """A distance as tables show it."""
    return "-" if figure is None else f"{figure:.3f}"


def distances_of(rows: Iterable[Mapping[str, float | None]]) -> dict[str, str]:
    """Those of :data:`DISTANCES` that any row has: older results don't have all."""
    found = list(rows)
    return {what: name for what, name in DISTANCES.items() if any(row.get(what) is not None for row in found)}
