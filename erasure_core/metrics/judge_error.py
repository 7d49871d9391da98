"""A judge errs: what a share of recognised pictures says about the share of pictures that show the concept.

With h the judge's hit rate and f its false alarms, the share p that it reports of a true share q is p = q h + (1 - q) f, so

    q = (p - f) / (h - f)      (Rogan and Gladen, 1978)

with the interval of Lang and Reiczigel (2014), which counts the uncertainty of p, h and f: their shares are moved towards
one half by adding z^2/2 hits and z^2/2 misses to p, and one hit and one miss to h and f, and errors are propagated.

A prompt of k pictures succeeds if one of them shows the concept. What h and f are of prompts depends on how errors in the
pictures of one prompt go together, and on how many show it; nobody knows that, so :meth:`JudgeError.behind_prompts` allows for
all of it: of prompts that fail, between f (they err all at once) and 1 - (1 - f)^k (each for itself) seem to succeed, of those
that succeed, between h and all.
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

    def behind_prompts(self, seen: Rate, pictures: int) -> tuple[float, float]:
        """The 95 % interval of the share of prompts that succeed, where ``seen`` do to the judge: at least one of at most
        ``pictures`` of each shows the concept. The low end is with the most false alarms and hits, the high end with the least.

        Raises:
            ValueError: as :func:`corrected`.
        """
        high = self.behind(seen).high
        f, variance = _moved(self.alarms)
        slope = pictures * (1 - f) ** (pictures - 1)
        low, _ = _interval(seen, (1.0, 0.0), (1 - (1 - f) ** pictures, slope**2 * variance))
        return min(low, high), high


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
    low, high = _interval(seen, _moved(hits), _moved(alarms))
    return Corrected(q, min(low, q), max(high, q))


def _moved(share: Rate) -> tuple[float, float]:
    """A share with one hit and one miss more, and its variance."""
    n = share.n + 2
    moved = (share.hits + 1) / n
    return moved, moved * (1 - moved) / n


def _interval(seen: Rate, hits: tuple[float, float], alarms: tuple[float, float]) -> tuple[float, float]:
    """Lang and Reiczigel's, of (share, variance) of hits and alarms."""
    (h, vary_h), (f, vary_f) = hits, alarms
    n, gain = seen.n + _Z95**2, h - f
    if gain <= 0:
        return 0.0, 1.0
    p = (seen.hits + _Z95**2 / 2) / n
    middle = (p - f) / gain
    at = _clip(middle)
    shift = 2 * _Z95**2 * (at * vary_h - (1 - at) * vary_f)
    spread = math.sqrt(p * (1 - p) / n + at**2 * vary_h + (1 - at) ** 2 * vary_f) / gain
    return _clip(middle + shift - _Z95 * spread), _clip(middle + shift + _Z95 * spread)


def true_share(seen: Rate, hits: Rate, alarms: Rate) -> float:
    """q alone, in [0, 1]; what was seen, where the judge says nothing."""
    gain = hits.share - alarms.share
    return _clip((seen.share - alarms.share) / gain) if gain > 0 else seen.share


def _clip(x: float) -> float:
    return min(1.0, max(0.0, x))
