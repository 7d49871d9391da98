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
    """A right-multiplication ``G = left @ right``, left [D, r], right [r, D], float64."""

    left: Tensor
    right: Tensor

    @property
    def rank(self) -> int:
        return self.left.shape[1]

    def dense(self) -> Tensor:
        return self.left @ self.right

    def apply_to_rows(self, rows: Tensor) -> Tensor:
        """rows [n, D] -> rows (I + G)^T, what the edited layer effectively reads."""
        return rows + (rows @ self.right.T) @ self.left.T

    def then(self, other: ContextMap) -> ContextMap:
        """(I + self)(I + other) = I + G, for an edit ``other`` solved on weights that already carry ``self``."""
        left = torch.cat([self.left, other.left + self.left @ (self.right @ other.left)], dim=1)
        return compress(left, torch.cat([self.right, other.right]))

    def delta(self, weight: Tensor, down: Tensor) -> Delta:
        """The change of one weight [d_out, D]; ``down`` is ``self.right`` in the weight's dtype, shared by all sites."""
        return Delta((weight @ self.left.to(weight)).cpu(), down)

    def truncated(self, energy: float) -> ContextMap:
        """The smallest rank that holds ``energy`` of the squared singular values; 1 changes nothing.

        Needs the factors as :func:`compress` leaves them, with the root of each singular value in both.
        """
        if energy >= 1 or not self.rank:
            return self
        share = self.right.norm(dim=1) ** 4
        share = share.cumsum(0) / share.sum()
        rank = min(self.rank, int((share < energy).sum()) + 1)
        return ContextMap(self.left[:, :rank], self.right[:rank])

    @classmethod
    def zero(cls, width: int) -> ContextMap:
        return cls(torch.zeros(width, 0, dtype=torch.float64), torch.zeros(0, width, dtype=torch.float64))


def compress(left: Tensor, right: Tensor) -> ContextMap:
    """left [D, n] @ right [n, D] in its numerical rank, each singular value's root in both factors, largest first.

    The eigenvectors V of G^T G give G = (G V) V^T whatever their own rounding, since V is orthogonal: half the work of
    an SVD.
    """
    if right.shape[0] < right.shape[1]:
        basis, mixing = torch.linalg.qr(right.T)
        core = left @ mixing.T  # G = core basis^T
    else:
        basis, core = None, left @ right
    _, v = torch.linalg.eigh(core.T @ core)
    spread = core @ v
    sizes, order = spread.norm(dim=0).sort(descending=True)
    kept = order[sizes > RANK_TOLERANCE * sizes.max()] if sizes.numel() else order
    root = spread.norm(dim=0)[kept].sqrt()
    v = v[:, kept] if basis is None else basis @ v[:, kept]
    return ContextMap(spread[:, kept] / root, root[:, None] * v.T)


def mean_square(rows: Tensor) -> float:
    """trace(C^T C) / n: the unit in which ridges are stated, so that one default holds for every text width."""
    return float(rows.square().sum() / max(1, len(rows)))


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
    if len(stacked) < width:
        gram = stacked @ stacked.T
        gram.diagonal().add_(ridge)
        selected = torch.zeros(len(stacked), n, dtype=source.dtype, device=source.device)
        selected[:n].fill_diagonal_(1.0)
        solved = torch.cholesky_solve(selected, torch.linalg.cholesky(gram))  # [n + m, n]
        down = (stacked.T @ solved).T / erase_weight**0.5
    else:
        gram = stacked.T @ stacked
        gram.diagonal().add_(ridge)
        down = torch.cholesky_solve(source.T, torch.linalg.cholesky(gram)).T
    return compress(erase_weight * (target - source).T, down)
