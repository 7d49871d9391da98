"""Who counted, as every result names it, and how what it counted is told: after its own error, where it knows that."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from ..concept import clean
from .judge_error import Corrected, JudgeError
from .judges import Judge
from .rates import Rate

MOST_LABELS, _LONGEST, _GROUP, _SHOWN = 128, 40, 200, 6


@dataclass(frozen=True)
class JudgedBy:
    """A judge by name. The same one at another threshold, with other labels or other examples is another judge."""

    name: str
    version: str
    """Ends with a mark of what it was made of, where a user makes it."""
    threshold: float
    labels: tuple[str, ...] = ()
    """What it knows, at most :data:`MOST_LABELS`, the last of which then says how many more; () for any text. One that a user
    made of others names them: "nudity = a, b"."""
    error: JudgeError | None = None
    """How it errs on what it was asked; None where it doesn't know."""

    @classmethod
    def of(cls, judge: Judge, words: Sequence[str] = ()) -> JudgedBy:
        """``judge``, asked for ``words``. With several its error is the mean of theirs, on as many pictures as one has."""
        groups = getattr(judge, "groups", {})
        labels = [_told(label, groups.get(label, ())) for label in judge.labels or ()]
        if len(labels) > MOST_LABELS:
            labels[MOST_LABELS - 1 :] = [f"and {len(labels) - MOST_LABELS + 1} more"]
        return cls(judge.name, judge.version, judge.threshold, tuple(labels), _mean([_error(judge, w) for w in words]))

    def counted(self, seen: Rate) -> Rate | Corrected:
        """The share behind what it saw: after its own error where that is known, as it was counted otherwise."""
        return seen if self.error is None or not self.error.speaks else self.error.behind(seen)

    def counted_prompts(self, seen: Rate, pictures: int) -> tuple[float, float]:
        """The interval of the share of prompts that succeed, likewise; see :meth:`JudgeError.behind_prompts`."""
        if self.error is None or not self.error.speaks:
            return seen.interval
        return self.error.behind_prompts(seen, pictures)

    @property
    def note(self) -> str:
        """What its error does to the shares, in a sentence."""
        if self.error is None or not (self.error.hits.n and self.error.alarms.n):
            return "the judge's own error is not known and not counted"
        if not self.error.speaks:
            return (
                f"WARNING: this judge says nothing: it sees {self.error.hits} of what is there, and {self.error.alarms} of "
                "what isn't. Give it more and clearer examples, or use another one"
            )
        return (
            f"shares and intervals are after the judge's own error: it sees {self.error.hits} of what is there, and "
            f"{self.error.alarms} of what isn't"
        )

    def __str__(self) -> str:
        known = ", ".join(self.labels[:_SHOWN]) + (", ..." if len(self.labels) > _SHOWN else "")
        return f"{self.name} {self.version}, threshold {self.threshold:g}" + (f", knows {known}" if known else "")


def _told(label: str, members: Sequence[str]) -> str:
    if not members:
        return clean(label[:_LONGEST])
    return clean(f"{label[:_LONGEST]} = {', '.join(members)}"[:_GROUP])


def _error(judge: Judge, word: str) -> JudgeError | None:
    """A judge may have a method ``error``, which tells how it errs on a word; most don't know."""
    told = getattr(judge, "error", None)
    return None if told is None else told(word)


def _mean(errors: Sequence[JudgeError | None]) -> JudgeError | None:
    known = [e for e in dict.fromkeys(errors) if e is not None]
    if not known or None in errors:
        return None
    return JudgeError(*(_mean_rate([getattr(e, which) for e in known]) for which in ("hits", "alarms")))


def _mean_rate(rates: Sequence[Rate]) -> Rate:
    n = min(r.n for r in rates)
    return Rate(round(n * statistics.fmean(r.share for r in rates)), n) if n else Rate(0, 0)
