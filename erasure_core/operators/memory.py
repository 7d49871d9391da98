"""Prompt memory: a few learnable rows that cross-attention reads behind the text (KPOP, METHODS 2.1).

``K = W_k [context ; key]``, ``V = W_v [context ; value]``: the softmax then runs over L + m rows. The weights stay.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor, nn


class Placement(StrEnum):
    """Which cross-attentions read the memory (the authors' ``mid``, ``midout``, ``inmidout``)."""

    MID = "mid"
    MIDOUT = "midout"
    ALL = "all"

    def covers(self, site: str) -> bool:
        """Whether the block that the weight ``site`` belongs to reads it."""
        blocks = {"mid": ("middle_block.",), "midout": ("middle_block.", "output_blocks."), "all": ("",)}
        return site.startswith(blocks[self.value])


class PromptMemory(nn.Module):
    """``key`` and ``value`` rows [m, D], appended to what ``attn2.to_k`` and ``attn2.to_v`` read; one pair for all blocks.

    With ``shared`` both are one tensor, so that they are an ordinary suffix of the text states.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        placement: Placement,
        generator: torch.Generator,
        *,
        shared: bool,
        std: float = 0.02,
    ) -> None:
        super().__init__()
        if rows < 1:
            raise ValueError(f"memory: it needs at least one row, got {rows}")
        self.placement = placement
        self.key = nn.Parameter(torch.randn(rows, width, generator=generator) * std)
        self.value = self.key if shared else nn.Parameter(torch.randn(rows, width, generator=generator) * std)

    def extend(self, site: str, context: Tensor) -> Tensor:
        """[B, L, D] -> [B, L + m, D] where ``site`` (ending in to_k or to_v) is covered; else as it was."""
        if not self.placement.covers(site):
            return context
        rows = (self.key if site.endswith("to_k") else self.value).to(context)
        return torch.cat([context, rows.expand(context.shape[0], -1, -1)], dim=1)

    def tensors(self) -> dict[str, Tensor]:
        """What to save: the secret, apart from the public weights."""
        return {"key": self.key.detach().float().cpu().clone(), "value": self.value.detach().float().cpu().clone()}
