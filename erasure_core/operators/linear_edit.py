"""LinearEdit: closed-form least squares on the matrices that read the text.

All edits of this family multiply each weight from the right, ``W' = W (I + G)``: they change what the layer reads, not
what it writes. ``G`` [D, D] has the rank of the edited rows and is solved once, in float64, for all layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifact import Delta

RANK_TOLERANCE = 1e-12
"""Directions in which G is smaller than this share of its largest singular value are dropped as rounding. Not larger,
since a weight may answer to just the directions in which G is small."""


@dataclass(frozen=True)
class ContextMap:
    """A right-multiplication ``G = left @ right``, left [D, r], right [r, D], float64; float32 once a share
    of it is dropped.

    ``right is None`` marks a dense G in ``left``, [D, D]: cheaper where the edit has nearly full rank.
    """

    left: Tensor
    right: Tensor | None

    @property
    def rank(self) -> int:
        """Columns of ``left``: the rank, or more than it as long as the map is not :meth:`truncated`."""
        return self.left.shape[1]

    def dense(self) -> Tensor:
        return self.left if self.right is None else self.left @ self.right

    def times(self, columns: Tensor) -> Tensor:
        """G @ columns, [D, k]."""
        return self.left @ (columns if self.right is None else self.right @ columns)

    def after(self, matrix: Tensor) -> Tensor:
        """matrix (I + G): [k, D] that reads the text is edited like a weight."""
        read = matrix @ self.left
        return matrix + (read if self.right is None else read @ self.right)

    def apply_to_rows(self, rows: Tensor) -> Tensor:
        """rows [n, D] -> rows (I + G)^T, what the edited layer effectively reads."""
        return rows + self.times(rows.T).T

    def then(self, other: ContextMap) -> ContextMap:
        """(I + self)(I + other) = I + G, for an edit ``other`` solved on weights that already carry ``self``."""
        if self.right is None or other.right is None:
            return ContextMap(other.after(self.dense()) + other.dense(), None)
        left = torch.cat([self.left, other.left + self.times(other.left)], dim=1)
        return ContextMap(left, torch.cat([self.right, other.right]))

    def delta(self, weight: Tensor, down: Tensor | None) -> Delta:
        """The change of one weight [d_out, D]; ``down`` is ``self.right`` in the weight's dtype, shared by all sites."""
        return Delta((weight @ self.left.to(weight)).cpu(), down)

    def truncated(self, energy: float) -> ContextMap:
        """The fewest factors that hold ``energy`` of the squared singular values; 1 drops only rounding."""
        return compress(self.left, self.right, energy)

    @classmethod
    def zero(cls, width: int) -> ContextMap:
        return cls(torch.zeros(width, 0, dtype=torch.float64), torch.zeros(0, width, dtype=torch.float64))


def compress(left: Tensor, right: Tensor | None, energy: float = 1.0) -> ContextMap:
    """left [D, n] @ right [n, D] in its numerical rank, each singular value's root in both factors, largest first.

    ``core`` has the rows of G in an orthonormal basis. The eigenvectors U of core core^T give core = U (U^T core)
    whatever their own rounding, since U is orthogonal: half the work of an SVD. Where less than all is wanted, float32 is
    exact enough, and few rows are tried first: a random range (Halko, Martinsson and Tropp, arXiv:0909.4061) whose share is
    known exactly.
    """
    if energy < 1:
        left, right = left.float(), None if right is None else right.float()
    basis = None
    if right is None:
        core = left
    elif 2 * left.shape[1] < left.shape[0]:
        basis, mixing = torch.linalg.qr(left)
        core = mixing @ right
    else:
        core = left @ right
    total = _squares(core)
    tried = 96
    while energy < 1 and 3 * tried < len(core):
        few = _range(core, tried)
        part = few.T @ core
        if _squares(part) >= energy * total:
            basis, core = few if basis is None else basis @ few, part
            break
        tried *= 2
    _, u = torch.linalg.eigh(gram(core.T))
    spread = u.T @ core
    sizes, order = spread.norm(dim=1).sort(descending=True)
    rank = int((sizes > RANK_TOLERANCE * sizes.max()).sum()) if sizes.numel() else 0
    if energy < 1 and rank:
        rank = min(rank, int((sizes.double().square().cumsum(0) < energy * total).sum()) + 1)
    kept, root = order[:rank], sizes[:rank].sqrt()
    u = u[:, kept] if basis is None else basis @ u[:, kept]
    return ContextMap(u * root, spread[kept] / root[:, None])


def _range(matrix: Tensor, size: int) -> Tensor:
    """An orthonormal basis [a, size] of nearly the largest singular directions of ``matrix`` [a, D]. Searched in float32:
    another basis would be as good, and what it holds is measured."""
    rough, generator = matrix.float(), torch.Generator().manual_seed(0)
    found = torch.linalg.qr(rough @ torch.randn(rough.shape[1], size, generator=generator)).Q
    return torch.linalg.qr((rough @ (rough.T @ found)).to(matrix)).Q


def _squares(matrix: Tensor) -> float:
    """The sum of all squares; row by row, since float32 has too few digits for a running sum of all of them."""
    return float(matrix.norm(dim=1).cpu().double().square().sum())


def mean_square(rows: Tensor) -> float:
    """trace(C^T C) / n: the unit in which ridges are stated, so that one default holds for every text width."""
    return float(rows.square().sum() / max(1, len(rows)))


def add_gram(upper: Tensor, rows: Tensor, block: int = 256) -> None:
    """Add rows^T rows, [D, D], to the upper triangle of ``upper`` (whole blocks; what lies below the diagonal is not meant
    to be read): half the work of the product. Products are made in the precision of ``rows``, sums in that of ``upper``."""
    for start in range(0, rows.shape[1], block):
        upper[start : start + block, start:] += rows[:, start : start + block].T @ rows[:, start:]


def mirrored(upper: Tensor) -> Tensor:
    """The symmetric matrix with this upper triangle."""
    return upper.triu() + upper.triu(1).T


def gram(rows: Tensor) -> Tensor:
    """rows^T rows, [D, D]."""
    upper = rows.new_zeros(rows.shape[1], rows.shape[1])
    add_gram(upper, rows)
    return mirrored(upper)


def factor(squares: Tensor, ridge: float) -> Tensor:
    """The Cholesky factor of squares + ridge I, [D, D]."""
    left = squares.clone()
    left.diagonal().add_(ridge)
    return torch.linalg.cholesky(left)


def solve_vector(factored: Tensor, x: Tensor) -> Tensor:
    """B^-1 x [D] for the Cholesky factor of B. ``torch.cholesky_solve`` copies the factor, which takes longer than this."""
    half = torch.linalg.solve_triangular(factored, x[:, None], upper=False)
    return torch.linalg.solve_triangular(factored.T, half, upper=True)[:, 0]


def solve_factored(change: Tensor, source: Tensor, factored: Tensor) -> ContextMap:
    """G = change^T source B^-1 for rows [n, D] and the Cholesky factor of B, [D, D]."""
    n, width = source.shape
    if 4 * n < width:
        return ContextMap(change.T, torch.cholesky_solve(source.T, factored).T)
    return ContextMap(torch.cholesky_solve(source.T @ change, factored).T, None)


def solve(
    source: Tensor,
    target: Tensor,
    keep: Tensor,
    *,
    ridge: float,
    erase_weight: float = 1.0,
    keep_weight: float = 1.0,
) -> ContextMap:
    """Minimise  e ||W' c - W c*||^2 + k ||W' p - W p||^2 + ridge ||W' - W||_F^2  for every W at once.

    The minimiser is W' = W (I + G), G = e (C* - C)^T C B^-1 with B = ridge I + e C^T C + k P^T P
    (UCE, arXiv:2308.14761 eq. 7, in delta form). With fewer rows than columns, C B^-1 comes from the (n+m) x (n+m)
    system of the Woodbury identity, which is smaller and better conditioned.

    Args:
        source, target: [n, D] float64, rows C and what they become C*.
        keep: [m, D] float64, rows P whose outputs stay.
        ridge: absolute, > 0.
    """
    if not ridge > 0:
        raise ValueError(f"ridge must be positive, got {ridge}")
    n, width = source.shape
    if not erase_weight:
        return ContextMap.zero(width)
    stacked = torch.cat([erase_weight**0.5 * source, keep_weight**0.5 * keep])
    if len(stacked) >= width:
        return solve_factored(erase_weight * (target - source), source, factor(gram(stacked), ridge))
    selected = torch.zeros(len(stacked), n, dtype=source.dtype, device=source.device)
    selected[:n].fill_diagonal_(1.0)
    solved = torch.cholesky_solve(selected, factor(gram(stacked.T), ridge))  # [n + m, n]
    left, right = erase_weight**0.5 * (target - source).T, solved.T @ stacked
    return ContextMap(left, right) if 4 * n < width else ContextMap(left @ right, None)
