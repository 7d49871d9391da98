"""SPEED, Scalable, Precise and Efficient Concept Erasure (Li et al., ICLR 2026, arXiv:2503.07392).

A closed-form edit that spares what is kept: the change is confined to the (nearly) null space of the kept rows. With
C1 the edited rows and C* what they become (columns, [D, n]; products below are means over rows), R the second moment of
the retained rows, P the projector on R's (nearly) null space and K2 the rows of the empty prompt:

    M  = (C1 C1^T P + r I)^-1
    dW = W (C* C1^T - C1 C1^T) P [I - M K2 (K2^T P M K2 + l I)^-1 K2^T P] M

so dW k = 0 for the empty prompt, exactly (l = 0), and for what of a retained row lies in the directions that R uses by more
than ``threshold``: all of it at 0, where a trained text encoder may leave no direction to erase in.
IPF (influence-based prior filtering) drops retained rows that the unconstrained edit hardly moves; DPA (directed prior
augmentation) adds noisy copies along the direction that the layer reads least.

Departures: r and the null-space threshold are relative (to mean squared norms), so one default fits every text width; K2 is by
default an orthonormal basis of all rows of the empty prompt instead of BOS and three cluster centres, because then the
unconditional half of guidance does not move at all; keys are edited too if asked for. Everyday words
(``ConceptSpec.everyday``) are not held: they would use up the directions in which it may erase.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..artifact import Erasure
from ..concept import TEMPLATES, ConceptError, ConceptSpec, EditRows, Rows, edit_rows
from ..operators.linear_edit import ContextMap, add_gram, factor, gram, mean_square, solve_factored, solve_vector
from ..port import ModelPort, Role, Site
from ._closed_form import Templates, build, energy_setting, rows_setting, templates_setting, text_sites
from .registry import Aids, MethodSpec, Progress, setting

_FILTER_RIDGE = 1e-3
"""The identity in IPF's edit, in the unit of ``retain_scale``: the authors' default r is that identity once."""


class Params(StrEnum):
    """Which projections are edited. The paper's default is the values."""

    VALUES = "values"
    KEYS_AND_VALUES = "keys and values"


class EmptyPrompt(StrEnum):
    """How the empty prompt is held."""

    ALL_ROWS = "all rows"
    CENTRES = "bos and 3 centres"


@dataclass(frozen=True)
class Settings:
    retain_scale: float = setting(
        1e-3, "How firmly the weights stay put (r). Lower it if the concept remains, above all with many concepts at once.",
        low=1e-8, high=10.0, step=1e-4,
    )  # fmt: skip
    threshold: float = setting(
        1e-4, "Directions in which kept words vary less than this count as free to edit. Raise it to erase more, lower it "
        "to protect more.", low=0.0, high=1.0, step=1e-5,
    )  # fmt: skip
    augment: int = setting(
        10, "Noisy copies of each kept word, to protect what lies around it. 0 switches augmentation off.",
        low=0, high=100, step=1,
    )  # fmt: skip
    filter: bool = setting(True, "Protect only the kept words that the edit would change; leaves more room to erase.")
    params: Params = setting(Params.VALUES, "'values' changes what is drawn, 'keys and values' also where.")
    empty_prompt: EmptyPrompt = setting(
        EmptyPrompt.ALL_ROWS, "Hold every row of the empty prompt, or only those that the paper holds."
    )
    rows: Rows = rows_setting()
    templates: Templates = templates_setting()
    energy: float = energy_setting()
    seed: int = setting(0, "Seed of the noisy copies.", low=0, high=2**31 - 1, step=1)


def weakest_input(weight: Tensor, generator: torch.Generator) -> Tensor:
    """The unit input direction [D] that ``weight`` [d_out, D] answers least: its smallest right-singular vector."""
    d_out, width = weight.shape
    x = torch.randn(width, dtype=torch.float64, generator=generator)
    w = weight.cpu()
    if d_out < width:  # any vector of the null space
        return _silent_input(w, x)
    upper = w.new_zeros(width, width)
    add_gram(upper, w)
    squares = upper.T  # its lower triangle is all that is read
    # Rounding may leave it indefinite by as much; directions that weak are as good as each other.
    ridge = 2 * torch.finfo(w.dtype).eps * float(squares.diagonal().double().sum())
    try:
        factored = factor(squares, ridge)
    except torch.linalg.LinAlgError:
        factored = factor(squares.double(), ridge)
    x, tried = x.to(factored), []
    for _ in range(8):  # inverse iteration
        x = solve_vector(factored, x)
        x = x / x.norm()
        tried.append(x.double())
    basis = torch.linalg.qr(torch.stack(tried, dim=1)).Q
    answers = (w @ basis.to(w)).double()
    within = answers.T @ answers
    x = basis @ torch.linalg.eigh(within).eigenvectors[:, 0]  # the best mixture of all of them
    return x / x.norm()


def _silent_input(w: Tensor, x: Tensor) -> Tensor:
    """A unit vector with W y = 0 for a wide W: entries of ``x`` for the surplus columns, the others solved for."""
    d_out = w.shape[0]
    factors, pivots, failed = torch.linalg.lu_factor_ex(w[:, :d_out].T)  # the order in which LAPACK reads them
    if not int(failed):
        rest = x[d_out:].to(w)
        first = torch.linalg.lu_solve(factors, pivots, (w[:, d_out:] @ rest)[:, None], adjoint=True)[:, 0]
        y = torch.cat([-first, rest])
        y = y / y.norm()
        if torch.isfinite(y).all():
            y = y.double()
            return y / y.norm()
    q, _ = torch.linalg.qr(w.double().T)  # these columns are dependent
    x = x - q @ (q.T @ x)
    return x / x.norm()


def influential(moved: Tensor) -> Tensor:
    """IPF: which rows the unconstrained edit moves more than the mean, for the lengths of their moves."""
    return moved > moved.mean() if len(moved) > 1 else torch.ones_like(moved, dtype=torch.bool)


def carried(mix: Tensor, span: Tensor, threshold: float) -> Tensor:
    """Orthonormal basis [k, p] of the directions in which the rows ``mix @ span`` (mix [m, a], span [a, k]) carry more than
    ``threshold`` of their mean squared norm; P projects on its complement."""
    if not len(mix):
        return span.T[:, :0]
    basis, r = torch.linalg.qr(span.T)
    rows = mix @ r.T
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return basis @ vectors[:, values > max(threshold, 1e-14) * mean_square(rows)]


def centres(rows: Tensor, k: int, steps: int = 20) -> Tensor:
    """k-means centres [k, D], started from evenly spaced rows."""
    chosen = rows[torch.linspace(0, len(rows) - 1, k).round().long()].clone()
    for _ in range(steps):
        nearest = torch.cdist(rows, chosen).argmin(1)
        chosen = torch.stack([rows[nearest == i].mean(0) if (nearest == i).any() else chosen[i] for i in range(k)])
    return chosen


def empty_rows(empty: Tensor, how: EmptyPrompt) -> Tensor:
    """K2^T [q, D] for the rows of the empty prompt, BOS first."""
    if how is EmptyPrompt.CENTRES:
        rest = empty[1:]
        return torch.cat([empty[:1], centres(rest, min(3, len(rest)))])
    _, s, vh = torch.linalg.svd(empty, full_matrices=False)
    return vh[s > 1e-9 * s[0]]


def spanned(fixed: Tensor, used: Tensor) -> Tensor:
    """Orthonormal basis [k, q] of the span of ``used`` [k, p], orthonormal itself, and of the rows ``fixed`` [f, k]."""
    rest = fixed.T - used @ (used.T @ fixed.T)
    basis, r = torch.linalg.qr(rest)
    if len(r) < rest.shape[1] or (r.diagonal().abs() < 1e-6 * max(1.0, float(r.abs().max()))).any():  # nearly dependent
        basis, sizes, _ = torch.linalg.svd(rest, full_matrices=False)
        basis = basis[:, sizes > 1e-9 * max(1.0, float(sizes.max()))]
    return torch.cat([used, basis], dim=1)


@dataclass(frozen=True)
class Frame:
    """A basis V [D, v] of where every F lies, and what is needed of it: F = V x for a layer's x [v, q]."""

    span: Tensor
    """V."""
    inner: Tensor
    """V^T B^-1 V, [v, v]."""
    solved: Tensor
    """B^-1 V, [D, v], in the precision of the edit."""
    read: Tensor
    """What is read of V, [r, v]."""

    def with_column(self, new: Tensor, solved: Tensor, read: Tensor) -> Frame:
        """V with another unit column [D] that is orthogonal to it, its B^-1 and what is read of it."""
        border = self.span.T @ solved
        corner = torch.cat([border, (new @ solved)[None]])
        inner = torch.cat([torch.cat([self.inner, border[None]]), corner[:, None]], dim=1)
        columns = (self.span, new), (self.solved, solved), (self.read, read)
        span, with_it, of_it = (torch.cat([m, c.to(m)[:, None]], dim=1) for m, c in columns)
        return Frame(span, inner, with_it, of_it)


class LayerEdits:
    """The edit of one layer after the other: filter and augmentation depend on its weight, all else is shared.

    With l = 0 the edit is the least-squares one among all that do nothing on F, an orthonormal basis of what the retained
    rows use and of the empty prompt. For B = C1^T C1 + n r I and the edit without constraint G0 = (C* - C1)^T C1 B^-1 it is

        G = G0 [I - F (F^T B^-1 F)^-1 F^T B^-1]

    Every F lies in the span of the kept rows, of the empty prompt's and of one direction a layer. So what takes D x D
    algebra is done once, on a basis V [D, v] of that span, and a layer adds one column to it.
    """

    def __init__(self, rows: EditRows, settings: Settings) -> None:
        self.settings, self.width = settings, rows.source.shape[1]
        empty = empty_rows(rows.empty, settings.empty_prompt)
        self.generator = torch.Generator().manual_seed(settings.seed)
        count, unit = len(rows.source), mean_square(rows.source)
        squares, change = gram(rows.source), rows.target - rows.source
        # The filter's edit, W E with E = (C* - C1) C1^T (C1 C1^T + I)^-1, and what it does to kept rows.
        self.source, self.change, self.damped = rows.source, change, factor(squares, _FILTER_RIDGE * count * unit)
        kept = rows.source @ torch.cholesky_solve(rows.keep.T, self.damped)
        self.shift = (change.T, kept) if count < len(rows.keep) else (change.T @ kept,)
        self.factored = factor(squares, settings.retain_scale * count * unit)  # B
        free = solve_factored(change, rows.source, self.factored)  # G0
        self.left = None if free.right is None else free.left
        self.read = free.left if free.right is None else free.right
        # In float32 where a share is dropped, which is larger than the rounding.
        self.start = self.read.float() if settings.energy < 1 else self.read
        both = torch.cat([rows.keep, empty])
        span = torch.linalg.qr(both.T).Q if len(both) < self.width else torch.eye(self.width, dtype=both.dtype)
        self.kept, self.empty = rows.keep @ span, empty @ span
        solved = torch.cholesky_solve(span, self.factored)
        self.frame = Frame(span, span.T @ solved, solved.to(self.start), self.read @ span)

    @staticmethod
    def _outputs(weight: Tensor, *columns: Tensor) -> Tensor:
        """The weight's answers, as rows, to the product of ``columns``."""
        for part in columns:
            weight = weight @ part.to(weight)
        return weight.T.cpu().double()

    def __call__(self, site: Site, weight: Tensor) -> ContextMap:
        settings, frame, rows = self.settings, self.frame, self.kept
        moved = self._outputs(weight, *self.shift)
        if settings.filter:
            chosen = influential(moved.norm(dim=1))
            moved, rows = moved[chosen], rows[chosen]
        mix = torch.eye(len(rows), dtype=rows.dtype)  # retained rows as mixtures of ``rows``
        if settings.augment:
            direction = weakest_input(weight, self.generator)
            # A normal vector's share of one direction is a normal number.
            noise = torch.randn(len(rows) * settings.augment, dtype=rows.dtype, generator=self.generator)
            frame, along = self._with(direction)
            rows = torch.cat([pad(rows, (0, len(along) - rows.shape[1])), along[None]])
            copies = torch.cat([mix.repeat_interleave(settings.augment, 0), noise[:, None]], dim=1)
            if settings.filter:
                moved = torch.cat([moved, self._outputs(weight, self._pulled(direction)[:, None])])
                lengths = ((copies @ (moved @ moved.T)) * copies).sum(1).clamp_min(0).sqrt()
                copies = copies[influential(lengths)]
            mix = torch.cat([pad(mix, (0, 1)), copies])
        used = carried(mix, rows, settings.threshold)
        empty = pad(self.empty, (0, rows.shape[1] - self.empty.shape[1]))
        return self._constrained(frame, spanned(empty, used))

    def _pulled(self, direction: Tensor) -> Tensor:
        """E ``direction``, [D]."""
        return self.change.T @ (self.source @ solve_vector(self.damped, direction))

    def _with(self, direction: Tensor) -> tuple[Frame, Tensor]:
        """The frame with ``direction`` in the span of V, and the direction's coordinates."""
        span = self.frame.span
        inside = span.T @ direction
        beyond = direction - span @ inside
        beyond = beyond - span @ (span.T @ beyond)
        size = beyond.norm()
        if size < 1e-9:
            return self.frame, inside
        new = beyond / size
        frame = self.frame.with_column(new, solve_vector(self.factored, new), self.read @ new)
        return frame, torch.cat([inside, size[None]])

    def _constrained(self, frame: Frame, fixed: Tensor) -> ContextMap:
        """G for F = V ``fixed``."""
        if fixed.shape[1] >= self.width:  # no direction is free
            return ContextMap.zero(self.width)
        factored = torch.linalg.cholesky(fixed.T @ frame.inner @ fixed)  # of F^T B^-1 F
        taken = torch.cholesky_solve((frame.read @ fixed).T, factored)
        right = torch.addmm(self.start, (fixed @ taken).T.to(self.start), frame.solved.T, alpha=-1)
        return ContextMap(right, None) if self.left is None else ContextMap(self.left, right)


def run(port: ModelPort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with SPEED. Seconds; needs no pictures and no network passes."""
    sites = [s for s in text_sites(port) if settings.params != Params.VALUES or s.role is Role.TEXT_VALUE]
    rows = edit_rows(port, spec, rule=settings.rows, templates=TEMPLATES[settings.templates], dark=aids.owned)
    result = build(port, spec, "speed", asdict(settings), LayerEdits(rows, settings), progress, sites)
    if not any(delta.rank for delta in result.deltas.values()):
        raise ConceptError(
            f"keep: {len(spec.keep)} kept words leave no direction in which SPEED could erase. Keep fewer words, raise its "
            "threshold, or use another method"
        )
    return result


SPEC = MethodSpec(
    name="speed",
    title="SPEED",
    summary="Erases only in directions that the kept words hardly use, so these hardly change (least with the filter "
    "off): the choice when many things must not change. Give it a good list of words to keep.",
    paper="https://arxiv.org/abs/2503.07392",
    settings=Settings,
    run=run,
    unread=("keep_everyday",),
    version=2,
)
