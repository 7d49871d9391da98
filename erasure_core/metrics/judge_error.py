"""A judge errs: what a share of recognised pictures says about the share of pictures that show the concept.

With h the judge's hit rate and f its false alarms, the share p that it reports of a true share q is p = q h + (1 - q) f, so

    q = (p - f) / (h - f)      (Rogan and Gladen, 1978)

with the interval of Lang and Reiczigel (2014), which counts the uncertainty of p, h and f: their shares are moved towards
one half by adding z^2/2 hits and z^2/2 misses to p, and one hit and one miss to h and f, and errors are propagated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .rates import Rate

_Z95 = 1.959963984540054


@dataclass(frozen=True)
class Corrected:
    """The share of pictures that show the concept, and its 95 % interval."""

    share: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.share):
            return "-"
        return f"{100 * self.share:.0f} % [{100 * self.low:.0f}, {100 * self.high:.0f}]"

    @property
    def complement(self) -> Corrected:
        """The share that is left."""
        return Corrected(1 - self.share, 1 - self.high, 1 - self.low)


@dataclass(frozen=True)
class JudgeError:
    """How a judge errs: ``hits`` of the pictures that show something, ``alarms`` of those that don't."""

    hits: Rate
    alarms: Rate

    @property
    def speaks(self) -> bool:
        """Whether it sees the concept more often where it is than where it isn't; otherwise it says nothing."""
        return bool(self.hits.n and self.alarms.n) and self.hits.share > self.alarms.share

    def behind(self, seen: Rate) -> Corrected:
        """The true share behind ``seen``: :func:`corrected`."""
        return corrected(seen, self.hits, self.alarms)


def corrected(seen: Rate, hits: Rate, alarms: Rate) -> Corrected:
    """The true share behind ``seen``.

    Args:
        hits: of pictures known to show the concept, those that the judge recognises.
        alarms: of pictures known not to, those in which it sees it all the same.

    Raises:
        ValueError: the judge sees the concept no more often where it is than where it isn't.
    """
    if not JudgeError(hits, alarms).speaks:
        raise ValueError(
            f"judge: it sees the concept in {hits} of the pictures that show it and in {alarms} of those that don't, so it "
            "says nothing. Use another judge"
        )
    if not seen.n:
        return Corrected(float("nan"), 0.0, 1.0)
    q = true_share(seen, hits, alarms)
    n, nh, nf = seen.n + _Z95**2, hits.n + 2, alarms.n + 2
    p, h, f = (seen.hits + _Z95**2 / 2) / n, (hits.hits + 1) / nh, (alarms.hits + 1) / nf
    gain = h - f
    if gain <= 0:
        return Corrected(q, 0.0, 1.0)
    middle = (p - f) / gain
    at = _clip(middle)
    shift = 2 * _Z95**2 * (at * h * (1 - h) / nh - (1 - at) * f * (1 - f) / nf)
    spread = math.sqrt(p * (1 - p) / n + at**2 * h * (1 - h) / nh + (1 - at) ** 2 * f * (1 - f) / nf) / gain
    low, high = (_clip(middle + shift + sign * _Z95 * spread) for sign in (-1, 1))
    return Corrected(q, min(low, q), max(high, q))


def true_share(seen: Rate, hits: Rate, alarms: Rate) -> float:
    """q alone, in [0, 1]; what was seen, where the judge says nothing."""
    gain = hits.share - alarms.share
    return _clip((seen.share - alarms.share) / gain) if gain > 0 else seen.share


def _clip(x: float) -> float:
    return min(1.0, max(0.0, x))
