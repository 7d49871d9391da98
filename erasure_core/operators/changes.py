"""What is trained beside a network's weights: which layers, in which form, and the change as a module.

A change is a function of its layer's input, zero at the start, that exports as a matrix or as the factors of one.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..artifact import Delta
from ..port import Role, Site

_TEXT_ROLES = {".attn2.to_k": Role.TEXT_KEY, ".attn2.to_v": Role.TEXT_VALUE}


def role_of(site: str) -> Role:
    """What a linear layer of a transformer block does, by its name."""
    return next((role for end, role in _TEXT_ROLES.items() if site.endswith(end)), Role.OTHER)


class Layers(StrEnum):
    """Which linear layers of the transformer blocks are trained, and what the papers call that."""

    TEXT = "text keys and values"
    """attn2.to_k, attn2.to_v (ESD-x-strict, KPOP's K/V)."""
    CROSS = "cross-attention"
    """All of attn2 (ESD-x, SDD, xattn)."""
    SELF = "self-attention"
    """All of attn1 (DUO's --no_cross_attn, selfattn)."""
    NOT_CROSS = "all but cross-attention"
    """attn1 and feed-forward (ESD-u, noxattn; the papers add convolutions and residual blocks)."""
    ALL = "all"

    def covers(self, site: str) -> bool:
        match self:
            case Layers.TEXT:
                return role_of(site) is not Role.OTHER
            case Layers.CROSS:
                return ".attn2." in site
            case Layers.SELF:
                return ".attn1." in site
            case Layers.NOT_CROSS:
                return ".attn2." not in site
        return True


class Init(StrEnum):
    """How a LoRA's down factor starts; the up factor starts at zero."""

    KAIMING = "kaiming"
    """Uniform in +-1/sqrt(d_in): kohya, SPM."""
    GAUSSIAN = "gaussian"
    """Normal with deviation 1/rank: peft, DUO."""


@dataclass(frozen=True)
class FullWeights:
    """Every entry of the chosen matrices."""

    layers: Layers = Layers.CROSS


@dataclass(frozen=True)
class LoRA:
    """``change(x) = alpha / rank * up down x``; alpha = rank where not given."""

    layers: Layers = Layers.CROSS
    rank: int = 4
    alpha: float | None = None
    init: Init = Init.KAIMING


class Full(nn.Module):
    """change(x) = delta x, delta [d_out, d_in] from zero."""

    def __init__(self, site: Site) -> None:
        super().__init__()
        self.delta = nn.Parameter(torch.zeros(site.d_out, site.d_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.delta.to(x))

    def export(self) -> Delta:
        return Delta(_plain(self.delta))


class LowRank(nn.Module):
    """change(x) = scale up (down x), down [r, d_in] random, up [d_out, r] from zero."""

    def __init__(self, site: Site, what: LoRA, generator: torch.Generator) -> None:
        super().__init__()
        shape = (what.rank, site.d_in)
        if what.init is Init.KAIMING:  # a = sqrt(5) on fan-in d_in is this uniform
            down = (2 * torch.rand(shape, generator=generator) - 1) / site.d_in**0.5
        else:
            down = torch.randn(shape, generator=generator) / what.rank
        self.down, self.up = nn.Parameter(down), nn.Parameter(torch.zeros(site.d_out, what.rank))
        self.scale = (what.rank if what.alpha is None else what.alpha) / what.rank

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * F.linear(F.linear(x, self.down.to(x)), self.up.to(x))

    def into(self, weight: Tensor) -> Tensor:
        """A layer's weight with the change in it."""
        return torch.addmm(weight, self.up.to(weight), self.down.to(weight), alpha=self.scale)

    def export(self) -> Delta:
        return Delta(_plain(self.up) * self.scale, _plain(self.down))


def _plain(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32, copy=True)


def truncated(delta: Delta, energy: float) -> Delta:
    """A dense change as factors of the lowest rank that holds ``energy`` of its squared singular values."""
    if energy >= 1 or delta.down is not None:
        return delta
    u, s, vh = torch.linalg.svd(delta.up.double(), full_matrices=False)
    share = s.square().cumsum(0) / s.square().sum().clamp_min(1e-300)
    rank = min(len(s), int((share < energy).sum()) + 1) if s.any() else 0
    root = s[:rank].sqrt()
    return Delta((u[:, :rank] * root).to(delta.up), (root[:, None] * vh[:rank]).to(delta.up))
