"""SPEED, Scalable, Precise and Efficient Concept Erasure (Li et al., ICLR 2026, arXiv:2503.07392).

A closed-form edit that cannot touch what is kept: the change is confined to the null space of the kept rows. With
C1 the edited rows and C* what they become (columns, [D, n]; products below are means over rows), R the second moment of
the retained rows, P the projector on R's (nearly) null space and K2 the rows of the empty prompt:

    M  = (C1 C1^T P + r I)^-1
    dW = W (C* C1^T - C1 C1^T) P [I - M K2 (K2^T P M K2 + l I)^-1 K2^T P] M

so dW k = 0 for every retained row in the row space of R and for the empty prompt, exactly (l = 0).
IPF (influence-based prior filtering) drops retained rows that the unconstrained edit hardly moves; DPA (directed prior
augmentation) adds noisy copies along the direction that the layer reads least.

Departures: r and the null-space threshold are relative (to mean squared norms), so one default fits every text width;
K2 is by default an orthonormal basis of all rows of the empty prompt instead of BOS and three cluster centres, because
then the unconditional half of guidance does not move at all; keys are edited too if asked for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ..artifact import Erasure
from ..concept import TEMPLATES, ConceptError, ConceptSpec, EditRows, Rows, edit_rows
from ..operators.linear_edit import ContextMap, compress, mean_square, solve
from ..port import ModelPort, Role, Site
from ._closed_form import Templates, build, energy_setting, rows_setting, templates_setting, text_sites
from .registry import Aids, MethodSpec, Progress, setting


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
    w = weight.cpu().double()
    if d_out < width:  # any vector of the null space
        return _silent_input(w, x)
    gram = w.T @ w
    gram.diagonal().add_(1e-10 * float(gram.diagonal().mean()))
    factor = torch.linalg.cholesky(gram)
    for _ in range(30):  # inverse iteration
        x = torch.cholesky_solve(x[:, None], factor)[:, 0]
        x = x / x.norm()
    return x


def _silent_input(w: Tensor, x: Tensor) -> Tensor:
    """A unit vector with W y = 0 for a wide W: entries of ``x`` for the surplus columns, the others solved for."""
    d_out = w.shape[0]
    factors, pivots, failed = torch.linalg.lu_factor_ex(w[:, :d_out].float())
    y = torch.cat([torch.zeros_like(x[:d_out]), x[d_out:]])
    for _ in range(4 * (not int(failed))):  # factors of half the precision, corrected
        y[:d_out] -= torch.linalg.lu_solve(factors, pivots, (w @ y).float()[:, None])[:, 0]
    y = y / y.norm()
    if torch.isfinite(y).all() and float((w @ y).norm()) <= 1e-9 * float(w.norm()):
        return y
    q, _ = torch.linalg.qr(w.T)  # these columns are dependent
    x = x - q @ (q.T @ x)
    return x / x.norm()


def influential(moved: Tensor) -> Tensor:
    """IPF: which rows the unconstrained edit moves more than the mean, for the lengths of their moves."""
    return moved > moved.mean() if len(moved) > 1 else torch.ones_like(moved, dtype=torch.bool)


def carried(rows: Tensor, threshold: float) -> Tensor:
    """Orthonormal basis [k, p] of the directions in which ``rows`` [m, k] carry more than ``threshold`` of their mean
    squared norm; P projects on its complement."""
    if not len(rows):
        return rows.T
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return vectors[:, values > max(threshold, 1e-14) * mean_square(rows)]


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


def solve_constrained(source: Tensor, target: Tensor, used: Tensor, fixed: Tensor, ridge: float) -> ContextMap:
    """The G of dW = W G above, for the projector P = I - U U^T with U = ``used`` [D, p].

    Everything happens inside the null space: with S = C1^T P, K = P K2 and H = (S^T S / n + r I)^-1 the bracket is a
    Schur complement, and

        G = (C* - C1) S [H - H K (K^T H K)^-1 K^T H] / n.

    With fewer rows than columns, H comes from the n x n system of the Woodbury identity.
    """
    n, width = source.shape
    s = source - (source @ used) @ used.T  # [n, D]
    k = fixed.T - used @ (used.T @ fixed.T)  # [D, f]
    if k.numel():  # only the span of K matters
        u, sizes, _ = torch.linalg.svd(k, full_matrices=False)
        k = u[:, sizes > 1e-9 * max(1.0, float(sizes.max()))]
    if used.shape[1] + k.shape[1] >= width:  # no direction is free
        return ContextMap.zero(width)
    if n < width:
        inner = s @ s.T / n
        inner.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(inner)
        hs = torch.cholesky_solve(s, factor).T
        hk = (k - hs @ (s @ k) / n) / ridge
    else:
        gram = s.T @ s / n
        gram.diagonal().add_(ridge)
        factor = torch.linalg.cholesky(gram)
        hs, hk = torch.cholesky_solve(s.T, factor), torch.cholesky_solve(k, factor)
    if k.shape[1]:
        hs = hs - hk @ torch.linalg.solve(k.T @ hk, hk.T @ s.T)
    return compress((target - source).T / n, hs.T)


class LayerEdits:
    """The edit of one layer after the other: filter and augmentation depend on its weight, the rest is shared.

    All retained rows lie in the span of the kept rows and of one direction a layer, so their second moment is
    decomposed there instead of in all D directions.
    """

    def __init__(self, rows: EditRows, empty: Tensor, settings: Settings) -> None:
        self.rows, self.empty, self.settings = rows, empty, settings
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.unit = mean_square(rows.source)
        # The edit without constraint, W E with E = (C* - C1) C1^T (C1 C1^T + n I)^-1, and what it does to kept rows.
        self.pull = solve(rows.source, rows.target, rows.keep[:0], ridge=len(rows.source) * self.unit)
        self.shift = self._pulled(rows.keep.T)  # [D, m]
        few = len(rows.keep) < rows.keep.shape[1]
        self.span = torch.linalg.qr(rows.keep.T).Q if few else torch.eye(rows.keep.shape[1], dtype=rows.keep.dtype)
        self.coordinates = rows.keep @ self.span

    def _pulled(self, columns: Tensor) -> Tensor:
        return self.pull.left @ (self.pull.right @ columns)

    @staticmethod
    def _outputs(weight: Tensor, columns: Tensor) -> Tensor:
        return (weight @ columns.to(weight)).T.cpu().double()

    def __call__(self, site: Site, weight: Tensor) -> ContextMap:
        settings, span, retained = self.settings, self.span, self.coordinates
        moved = self._outputs(weight, self.shift)
        if settings.filter:
            chosen = influential(moved.norm(dim=1))
            moved, retained = moved[chosen], retained[chosen]
        if settings.augment:
            direction = weakest_input(weight, self.generator)
            # A normal vector's share of one direction is a normal number.
            noise = torch.randn(len(retained) * settings.augment, dtype=span.dtype, generator=self.generator)
            span, retained, along = self._with(direction, retained)
            copies = retained.repeat_interleave(settings.augment, 0) + noise[:, None] * along
            if settings.filter:
                moved = moved.repeat_interleave(settings.augment, 0) + noise[:, None] * self._outputs(
                    weight, self._pulled(direction[:, None])
                )
                copies = copies[influential(moved.norm(dim=1))]
            retained = torch.cat([retained, copies])
        used = span @ carried(retained, settings.threshold)
        ridge = settings.retain_scale * self.unit
        return solve_constrained(self.rows.source, self.rows.target, used, self.empty, ridge).truncated(settings.energy)

    def _with(self, direction: Tensor, retained: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The span with ``direction`` in it, ``retained`` in its coordinates, and the direction's own coordinates."""
        inside = self.span.T @ direction
        beyond = direction - self.span @ inside
        beyond = beyond - self.span @ (self.span.T @ beyond)
        size = beyond.norm()
        if size < 1e-9:
            return self.span, retained, inside
        span = torch.cat([self.span, (beyond / size)[:, None]], dim=1)
        return span, torch.nn.functional.pad(retained, (0, 1)), torch.cat([inside, size[None]])


def run(port: ModelPort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with SPEED. Seconds; needs no pictures and no network passes."""
    sites = [s for s in text_sites(port) if settings.params != Params.VALUES or s.role is Role.TEXT_VALUE]
    rows = edit_rows(port, spec, rule=settings.rows, templates=TEMPLATES[settings.templates], dark=aids.dark)
    empty = empty_rows(port.text([""])[0].states.cpu().double(), settings.empty_prompt)
    result = build(port, spec, "speed", asdict(settings), LayerEdits(rows, empty, settings), progress, sites)
    if not any(delta.rank for delta in result.deltas.values()):
        raise ConceptError(
            f"keep: {len(spec.keep)} kept words leave no direction in which SPEED could erase. Keep fewer words, raise its "
            "threshold, or use another method"
        )
    return result


SPEC = MethodSpec(
    name="speed",
    title="SPEED",
    summary="Erases only in directions that the kept words don't use, so these hardly change (not at all with the filter "
    "off): the choice when many things must not change. Give it a good list of words to keep.",
    paper="https://arxiv.org/abs/2503.07392",
    settings=Settings,
    run=run,
)
