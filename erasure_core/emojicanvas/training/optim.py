"""Muon for matrices and filters, AdamW for the rest: what makes the testbed trainable in minutes on a CPU.

Muon (Keller Jordan, 2024, https://kellerjordan.github.io/posts/muon) replaces each momentum matrix by the
nearest semi-orthogonal one, found by a quintic Newton-Schulz iteration.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor, nn

from ..precision import FAST_BF16

_NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_DTYPE = torch.bfloat16 if FAST_BF16 else torch.float32


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """The semi-orthogonal factors of ``matrices`` [..., m, n], approximately (singular values land in 0.7..1.2)."""
    a, b, c = _NS_COEFFICIENTS
    x = matrices / (matrices.flatten(-2).norm(dim=-1)[..., None, None] + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised; filters [out, in, h, w] are treated as [out, in*h*w] matrices.

    Matrices of one shape are updated together: a batched product is many times faster than a loop of small ones.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            mu, lr = group["momentum"], group["lr"]
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    by_shape[p.shape].append(p)
            for params in by_shape.values():
                directions = []
                for p in params:
                    buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    buffer.lerp_(p.grad, 1 - mu)
                    directions.append(torch.lerp(p.grad, buffer, mu).flatten(1))
                update = orthogonalise(torch.stack(directions).to(_DTYPE)).float()  # the iteration bears it
                gain = max(1.0, update.shape[-2] / update.shape[-1]) ** 0.5
                for p, u in zip(params, update, strict=True):
                    p.mul_(1 - lr * group["weight_decay"]).add_(u.view(p.shape), alpha=-lr * gain)


def split_parameters(module: nn.Module, *, adam_only: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """(matrices for Muon, everything else for AdamW); names containing one of ``adam_only`` go to AdamW."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, p in module.named_parameters():
        is_matrix = p.ndim >= 2 and not any(part in name for part in adam_only)
        (matrices if is_matrix else others).append(p)
    return matrices, others
