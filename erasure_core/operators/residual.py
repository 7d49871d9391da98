"""The embedding that an edit leaves behind, in closed form (RECE, arXiv:2407.12383), for any two sets of text projections.

    c' = argmin_x sum_i || W_i x - W_i^o c ||^2 + lambda ||x||^2 = (lambda I + A)^-1 M c,
    A = sum_i W_i^T W_i,  M = sum_i W_i^T W_i^o

with W_i^o the weights before and W_i those after.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..port import ModelPort


class Residual:
    """A and M of two models, summed over all text keys and values; rows are solved for afterwards.

    Raises:
        ValueError: the models have no text projections, or not the same ones.
    """

    def __init__(self, base: ModelPort, erased: ModelPort, progress: Callable[[int, int], None] | None = None) -> None:
        sites, others = base.sites(), {site.name for site in erased.sites()}
        if not sites or {site.name for site in sites} != others:
            raise ValueError("residual: both models need the same separate text keys and values (SD 1.x, SD 2.x, SDXL)")
        width = sites[0].d_in
        self.a, self.m, self.o = (torch.zeros(width, width, dtype=torch.float64) for _ in range(3))
        for number, site in enumerate(sites):
            if progress:
                progress(number, len(sites))
            before, after = (port.weight(site).cpu().double() for port in (base, erased))
            self.a += after.T @ after
            self.m += after.T @ before
            self.o += before.T @ before

    def rows(self, c: Tensor, damping: float) -> Tensor:
        """c' for each row of ``c`` [n, D], float64 on the CPU. ``damping`` is lambda in units of trace(A)/D."""
        unit = float(self.a.diagonal().mean())
        left = self.a + (damping + 1e-12) * unit * torch.eye(len(self.a), dtype=torch.float64)
        return torch.cholesky_solve(self.m @ c.detach().double().cpu().T, torch.linalg.cholesky(left)).T

    def misfit(self, c: Tensor, x: Tensor) -> Tensor:
        """sum_i ||W_i x - W_i^o c||^2 / sum_i ||W_i^o c||^2 for rows [n, D]: 0 where x brings c back entirely."""
        c, x = c.detach().double().cpu(), x.detach().double().cpu()
        gap = _quadratic(x, self.a, x) - 2 * _quadratic(x, self.m, c) + _quadratic(c, self.o, c)
        return gap.clamp_min(0) / _quadratic(c, self.o, c).clamp_min(1e-300)


def _quadratic(x: Tensor, matrix: Tensor, y: Tensor) -> Tensor:
    return ((x @ matrix) * y).sum(-1)
