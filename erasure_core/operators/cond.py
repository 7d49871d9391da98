"""What a network reads beside the latent: the conditioning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..devices import moved
from .gates import GATES


@dataclass(frozen=True)
class Cond:
    """What a network reads beside the latent: text states ``context`` [B, L, D] and named extras [B, ...] (SDXL's y)."""

    context: Tensor
    extra: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return self.context.shape[0]

    def expand(self, n: int) -> Cond:
        """A batch of one as a batch of n; a batch of n as it is."""
        return Cond(_expand(self.context, n), {k: _expand(v, n) for k, v in self.extra.items()})

    def row(self, i: int) -> Cond:
        """The i-th of the batch, as a batch of one."""
        return self.rows(i, i + 1)

    def rows(self, start: int, end: int) -> Cond:
        """Those of the batch from ``start`` on, up to ``end``."""
        return Cond(self.context[start:end], {k: v[start:end] for k, v in self.extra.items()})

    def to(self, like: Tensor) -> Cond:
        """On the device and in the type of a latent."""
        return self.on(like.device, like.dtype)

    def on(self, device: torch.device, dtype: torch.dtype) -> Cond:
        """On a device and in a type."""
        return Cond(moved(self.context, device, dtype), {k: moved(v, device, dtype) for k, v in self.extra.items()})

    @staticmethod
    def cat(conds: Sequence[Cond]) -> Cond:
        """One batch after the other. Text states of unlike length are repeated up to a common one, which attention does
        not notice: its weights are shared out among the copies."""
        length = math.lcm(*(c.context.shape[1] for c in conds))
        extra = {k: torch.cat([c.extra[k] for c in conds]) for k in conds[0].extra}
        return Cond(torch.cat([c.context.repeat(1, length // c.context.shape[1], 1) for c in conds]), extra)

    def with_context(self, context: Tensor) -> Cond:
        """Other text states, the same extras."""
        return Cond(context, self.extra)

    def gated_as(self, other: Cond) -> Cond:
        """The same, with the gates of ``other``: guidance asks both of its halves with those of the prompt."""
        extra = {k: v for k, v in self.extra.items() if k != GATES}
        return Cond(self.context, extra | {k: v for k, v in other.extra.items() if k == GATES})


def _expand(x: Tensor, n: int) -> Tensor:
    if x.shape[0] not in (1, n):
        raise ValueError(f"conditioning: a batch of {x.shape[0]} for {n} latents")
    return x.expand(n, *x.shape[1:])
