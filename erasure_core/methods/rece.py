"""RECE, Reliable and Efficient Concept Erasure (Gong et al., ECCV 2024, arXiv:2407.12383).

After a UCE edit, some other text embedding may still produce the concept. RECE derives the worst one in closed form and
erases it too, round after round:

    c' = argmin_x sum_i ||W_i x - W_i^o c||^2 + lambda ||x||^2 = (lambda I + A)^-1 M c,
    A = sum_i W_i^T W_i,  M = sum_i W_i^T W_i^o

with W_i^o the original and W_i the current weights, then a UCE edit of c' anchored to the current weights.

Every edit is W (I + G), so with A0 = sum_i W_i^o^T W_i^o only D x D algebra is left: for T = I + G, A = T^T A0 T and
M = T^T A0. Rows that are held enter as their sum of squares, P^T P.

Departures: solved by Cholesky in float64 (the authors' float32 inverse of near-singular matrices loses three digits);
lambda and the ridge are relative (to trace(A)/D and to the concept rows' mean square); derived rows are sent to the
concept's replacement rather than to a single space; besides the replacement's rows, every round holds the user's kept
words, all of the empty prompt and the rows erased before; no detector picks the round, so the number of rounds is a setting
(theirs: 3 for nudity, 2 for unsafe content, 1 otherwise); what is kept weighs as much as what goes (theirs: a tenth).
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ..artifact import Erasure
from ..concept import TEMPLATES, ConceptSpec, EditRows, Rows, edit_rows
from ..devices import has_float64
from ..operators.linear_edit import (
    ContextMap,
    add_gram,
    factor,
    gram,
    mean_square,
    mirrored,
    solve,
    solve_factored,
)
from ..port import ModelPort, Site
from ._closed_form import Templates, build, energy_setting, rows_setting, templates_setting, text_sites
from .registry import Aids, MethodSpec, Progress, setting


class Derivation(StrEnum):
    """How far the derived embedding may lie from where; ``regzero`` is what the authors' README runs."""

    REGZERO = "regzero"
    """(lambda I + A)^-1 M c: pulled to zero."""
    SURROGATE_OUTPUT = "surrogate, output"
    """((1 + lambda) A)^-1 (M + lambda A) c: its outputs pulled to those of c ("surrogate 1st")."""
    SURROGATE_INPUT = "surrogate, input"
    """(lambda I + A)^-1 (lambda I + M) c: itself pulled to c ("surrogate 2nd")."""
    SURROGATE_BOTH = "surrogate, both"
    """(lambda I + (1 + lambda) A)^-1 (lambda I + M + lambda A) c."""
    STANDARD = "standard"
    """(lambda I + A)^-1 (lambda g + M c): pulled to the replacement's row g."""


@dataclass(frozen=True)
class Settings:
    rounds: int = setting(
        3, "How many derived embeddings per word are erased in turn. More catch more unnamed words and disturb more.",
        low=0, high=20, step=1,
    )  # fmt: skip
    damping: float = setting(
        0.1,
        "Shrinks the derived embeddings (lambda). Raise it to disturb other things less.",
        low=1e-8,
        high=100.0,
        step=0.01,
    )
    derivation: Derivation = setting(
        Derivation.REGZERO,
        "What the derived embeddings are pulled towards: regzero (the authors' choice) nothing, surrogate the word itself or "
        "what it is read as, standard the replacement.",
    )
    ridge: float = setting(
        1e-3, "How firmly the weights stay put. Raise it if other things change, lower it if the concept remains.",
        low=1e-8, high=10.0, step=1e-4,
    )  # fmt: skip
    keep_weight: float = setting(
        1.0, "How hard the kept words and the empty prompt are held.", low=0.0, high=100.0, step=0.1
    )
    rows: Rows = rows_setting()
    templates: Templates = templates_setting()
    energy: float = energy_setting()


def derive(rows: Tensor, guide: Tensor, heard: Tensor, a: Tensor, damping: float, derivation: Derivation) -> Tensor:
    """The rows [n, D] that bring ``rows`` back through the edited weights.

    Args:
        guide: [n, D], the replacement's rows; used by STANDARD only.
        heard: A0 T, the transpose of M, [D, D] float64.
        a: A = T^T A0 T, [D, D] float64.
        damping: lambda, in units of trace(A)/D.
    """
    unit = float(a.diagonal().mean())
    at_zero, at_input, times_a = damping * unit, 0.0, 1.0  # left = times_a A + at_zero I, right = M c + ...
    right = rows @ heard
    match derivation:
        case Derivation.REGZERO:
            pass
        case Derivation.SURROGATE_OUTPUT:
            at_zero, times_a = 0.0, 1 + damping
        case Derivation.SURROGATE_INPUT:
            at_input = at_zero
        case Derivation.SURROGATE_BOTH:
            at_input, times_a = at_zero, 1 + damping
        case Derivation.STANDARD:
            right += at_zero * guide
    if at_input:
        right += at_input * rows
    if times_a != 1:
        right += (times_a - 1) * (rows @ a)
    # A alone is singular where all layers together have fewer outputs than the text is wide.
    return torch.cholesky_solve(right.T, factor(times_a * a, at_zero + 1e-12 * unit)).T


def squared(port: ModelPort, sites: list[Site], progress: Progress) -> Tensor:
    """A0, [D, D] float64: products in the weights' own float32, in which those of half-precision weights are exact."""
    upper = None
    for i, site in enumerate(sites):
        progress(i, len(sites))
        weight = port.weight(site)
        if upper is None:
            where = weight.device if has_float64(weight.device) else "cpu"
            upper = torch.zeros(site.d_in, site.d_in, dtype=torch.float64, device=where)
        add_gram(upper, weight.to(upper.device))
    assert upper is not None, "text_sites refuses models without"
    return mirrored(upper).cpu()


def rotated(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """At most D rows that ask for the same edit: it depends on C^T C and C*^T C only, which an orthogonal matrix from
    the left does not change."""
    if len(source) <= source.shape[1]:
        return source, target
    q, r = torch.linalg.qr(source)
    return r, q.T @ target


def context_map(rows: EditRows, weights: Tensor, settings: Settings, progress: Progress) -> ContextMap:
    """UCE, then ``rounds`` times derive and erase.

    Args:
        weights: A0 = sum_i W_i^o^T W_i^o, [D, D] float64.
    """
    ridge = settings.ridge * mean_square(rows.source)
    source, target = rows.source, rows.target
    if settings.derivation is not Derivation.STANDARD:  # that mixes the rows of both
        source, target = rotated(source, target)
    held = gram(torch.cat([rows.held, rows.target, source]))
    edit = solve(source, target, rows.held, ridge=ridge, keep_weight=settings.keep_weight)
    for done in range(settings.rounds):
        progress(done, settings.rounds)
        heard = edit.after(weights)
        derived = derive(source, target, heard, edit.after(heard.T), settings.damping, settings.derivation)
        own = gram(derived)
        factored = factor(own + settings.keep_weight * held, ridge)
        edit = edit.then(solve_factored(target - derived, derived, factored))
        held += own  # what is done stays done, else the next round undoes this one
    return edit


def run(port: ModelPort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with RECE. Seconds; needs no pictures and no network passes."""
    sites = text_sites(port)
    total = 2 * len(sites) + settings.rounds
    rows = edit_rows(port, spec, rule=settings.rows, templates=TEMPLATES[settings.templates], dark=aids.owned)
    edit = context_map(
        rows,
        squared(port, sites, lambda done, _: progress(done, total)),
        settings,
        lambda done, _: progress(len(sites) + done, total),
    )
    return build(port, spec, "rece", asdict(settings), edit, lambda done, n: progress(total - n + done, total))


SPEC = MethodSpec(
    name="rece",
    title="RECE",
    summary="UCE, then finds the embeddings that would bring the concept back and erases those too: firmer on styles, still "
    "in seconds, at some cost to similar things.",
    paper="https://arxiv.org/abs/2407.12383",
    settings=Settings,
    run=run,
    version=2,
)
