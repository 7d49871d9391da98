"""Shares with their uncertainty: k of n, and the 95 % Wilson interval."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

_Z95 = 1.959963984540054  # normal quantile of 97.5 %


@dataclass(frozen=True)
class Rate:
    """``hits`` of ``n``. An empty rate (n = 0) has no share and prints as a dash."""

    hits: int
    n: int

    def __post_init__(self) -> None:
        if not 0 <= self.hits <= self.n:
            raise ValueError(f"rate: {self.hits} of {self.n}")

    @property
    def share(self) -> float:
        return self.hits / self.n if self.n else float("nan")

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % score interval of the share (Wilson, 1927); (0, 1) where nothing was counted."""
        if not self.n:
            return 0.0, 1.0
        share, z = self.share, _Z95
        centre = share + z * z / (2 * self.n)
        spread = z * math.sqrt(share * (1 - share) / self.n + z * z / (4 * self.n**2))
        scale = 1 + z * z / self.n
        return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)

    def __str__(self) -> str:
        if not self.n:
            return "-"
        low, high = self.interval
        return f"{100 * self.share:.0f} % [{100 * low:.0f}, {100 * high:.0f}]"

    def to_json(self) -> dict[str, float | int | None]:
        """Plain numbers: hits, n, share and interval, rounded."""
        low, high = self.interval
        share = round(self.share, 4) if self.n else None
        return {"hits": self.hits, "n": self.n, "share": share, "low": round(low, 4), "high": round(high, 4)}

    @classmethod
    def from_json(cls, values: Mapping[str, float | int | None]) -> Rate:
        return cls(int(values["hits"] or 0), int(values["n"] or 0))


def rate(flags: Tensor) -> Rate:
    """The share of true entries of a bool tensor of any shape."""
    return Rate(int(flags.sum()), flags.numel())


def pooled(rates: Iterable[Rate]) -> Rate:
    """All counts together. Every picture weighs the same, so larger rates weigh more."""
    found = list(rates)
    return Rate(sum(r.hits for r in found), sum(r.n for r in found))
