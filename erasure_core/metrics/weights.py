"""Measures that need no picture: how far the weights moved, and what the change does to states that should or shouldn't.

Exact, deterministic and free. They tell two erasures apart and say where to look; no picture was judged.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptSpec, Rows, rows_of
from ..operators.residual import Residual
from ..port import ModelPort, Site


@dataclass(frozen=True)
class WeightChange:
    """One matrix: ||dW||_F / ||W||_F, the rank of dW, and the spectral norm of dW over that of W."""

    site: str
    drift: float
    rank: int
    largest: float


def weight_changes(base: ModelPort, erased: ModelPort) -> list[WeightChange]:
    """Of the matrices that read the text, in network order; unchanged ones are zero throughout."""
    return [
        _change(site, base.weight(site).cpu().double(), erased.weight(site).cpu().double()) for site in base.sites()
    ]


def _change(site: Site, before: Tensor, after: Tensor) -> WeightChange:
    values = torch.linalg.svdvals(after - before)
    top = torch.linalg.svdvals(before)[0].clamp_min(1e-300)
    rank = int((values > values[0] * max(before.shape) * torch.finfo(torch.float32).eps).sum()) if values[0] > 0 else 0
    drift = float(values.square().sum().sqrt() / before.norm().clamp_min(1e-300))
    return WeightChange(site.name, drift, rank, float(values[0] / top))


def total_drift(base: ModelPort, erased: ModelPort) -> float:
    """||all dW|| / ||all W|| over the matrices that read the text."""
    moved, norm = 0.0, 0.0
    for site in base.sites():
        before, after = (port.weight(site).cpu().double() for port in (base, erased))
        moved += float((after - before).square().sum())
        norm += float(before.square().sum())
    return (moved / norm) ** 0.5 if norm else 0.0


def output_change(base: ModelPort, erased: ModelPort, rows: Tensor) -> Tensor:
    """sum_i ||dW_i c||^2 / sum_i ||W_i c||^2 for each row c of ``rows`` [n, D], under its root: [n].

    Of kept rows it should be 0, of erased ones not.
    """
    rows = rows.detach().double().cpu()
    moved = torch.zeros(len(rows), dtype=torch.float64)
    norm = torch.zeros(len(rows), dtype=torch.float64)
    for site in base.sites():
        before, after = (port.weight(site).cpu().double() for port in (base, erased))
        moved += ((after - before) @ rows.T).square().sum(0)
        norm += (before @ rows.T).square().sum(0)
    return (moved / norm.clamp_min(1e-300)).sqrt()


@dataclass(frozen=True)
class TextMeasures:
    """What an erasure does to the outputs of the text projections, as shares of the base model's."""

    erased: float
    """Root mean square change for the erased words: near 0 nothing was erased here."""
    kept: float | None
    """For the kept words: should be near 0. None where there are none."""
    kept_worst: float | None
    empty: float
    """Root mean square change for all rows of the empty prompt, which every guided picture is drawn with."""
    residual: float
    """How far the nearest other text states stay from bringing the erased words back through the edited projections: near 0
    they are all still reachable (RECE's derivation), near 1 they are gone."""


def text_measures(base: ModelPort, erased: ModelPort, spec: ConceptSpec, damping: float = 1e-6) -> TextMeasures:
    """All of them: of words over the last content row of each that ``spec`` names, of the empty prompt over all its rows."""
    words, kept = [w for c in spec.erase for w in c.words], list(spec.keep)
    c, empty = _rows(base, words), base.text([""])[0].states
    k = output_change(base, erased, _rows(base, kept)) if kept else None
    residual = Residual(base, erased)
    left = residual.misfit(c, residual.rows(c, damping)).mean().sqrt()
    return TextMeasures(
        float(output_change(base, erased, c).square().mean().sqrt()),
        None if k is None else float(k.square().mean().sqrt()), None if k is None else float(k.max()),
        float(output_change(base, erased, empty).square().mean().sqrt()), float(left),
    )  # fmt: skip


def _rows(port: ModelPort, prompts: Sequence[str]) -> Tensor:
    return torch.cat([rows_of(text, Rows.LAST) for text in port.text(prompts)])


def stored_energy(erasure: Erasure) -> dict[str, float]:
    """||dW||_F of every matrix of an erasure, by name: where it acts, without any model."""
    return {name: float(_norm(delta.up, delta.down)) for name, delta in erasure.deltas.items()}


def _norm(up: Tensor, down: Tensor | None) -> Tensor:
    """||up down||_F from r x r products only."""
    if down is None:
        return up.double().norm()
    up, down = up.double(), down.double()
    return ((up.T @ up) * (down @ down.T)).sum().clamp_min(0).sqrt()
