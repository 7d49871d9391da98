"""SDEdit pairs: an unsafe picture and its safe counterpart, which differ only in the unsafe part (METHODS 4.1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .port import Family


@dataclass(frozen=True)
class ConceptPairs:
    """Clean, scaled latents [N, C, h, w] of the ``unsafe`` members and, row by row, of their ``safe`` counterparts."""

    unsafe: Tensor
    safe: Tensor
    unsafe_prompt: str
    safe_prompt: str
    family: Family

    def __post_init__(self) -> None:
        if self.unsafe.shape != self.safe.shape or self.unsafe.ndim != 4 or not len(self.unsafe):
            raise ValueError(
                f"pairs: {tuple(self.unsafe.shape)} unsafe and {tuple(self.safe.shape)} safe latents must be the same "
                "[N, C, h, w], and not none. Make them again with Make SDEdit Pair"
            )

    def __len__(self) -> int:
        return len(self.unsafe)
