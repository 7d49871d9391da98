"""What is written beside an erasure: what was asked, what was counted, and what was tried to bring it back.

A receipt says what was measured, with which prompts, seeds and judge. It proves nothing about others, and it is no
signature: its digest tells that a file was changed, not who wrote the figures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .artifact import Erasure, digest, same_base
from .attack_record import AttackRecord
from .concept import ConceptSpec
from .metrics.judge_error import Corrected, corrected
from .metrics.judged import JudgedBy
from .metrics.rates import Rate, pooled
from .metrics.rounding import RoundingLoss
from .metrics.weights import TextMeasures

_SHOWN = 6
"""Words and attacks that the summary lists one by one."""


@dataclass(frozen=True)
class Drawn:
    """How the pictures were drawn: each word at each seed, before and after from the same noise."""

    template: str
    """The prompt; ``{}`` stands for the word."""
    seeds: tuple[int, ...]
    steps: int
    cfg: float
    sampler: str
    scheduler: str
    width: int
    """Pixels."""
    height: int


@dataclass(frozen=True)
class Counted:
    """The pictures of one word."""

    word: str
    asked: str
    """What the judge was asked for: the concept's name where the word is an alias; "" where nobody could be asked."""
    before: Rate | None
    after: Rate | None
    moved: float
    """Root mean square difference of the pictures before and after, values in [0, 1], from the same noise; their mean."""
    alarms: Rate | None = None
    """Of a kept word, before the erasure: pictures in which the judge sees what is erased all the same."""
    clip_score_before: float | None = None
    """CLIP score of the pictures and their prompt, 0 to 100, their mean; None where the judge isn't CLIP."""
    clip_score_after: float | None = None
    curve: tuple[tuple[float, int], ...] = ()
    """(threshold, hits): of the pictures after, those that show it at other thresholds."""


@dataclass(frozen=True)
class Survival:
    """The erased model with its changed weights stored in fewer bits."""

    stored: str
    """A name of ``metrics.rounding.ROUNDINGS``."""
    loss: RoundingLoss
    after: Rate | None
    """Pictures of the erased words that show it then."""


@dataclass(frozen=True)
class Receipt:
    """All that was measured of one erasure."""

    spec: ConceptSpec
    method: str
    settings: Mapping[str, Any]
    base: str
    """Fingerprint of the model that was measured on."""
    version: str
    """Of the library that measured."""
    digest: str
    """Of the erasure's numbers, see :func:`erasure_core.artifact.digest`."""
    strength: float
    """At which everything here was measured."""
    text: TextMeasures
    """Of all words of the spec, in the prompt that was drawn."""
    drift: float
    """||all dW|| / ||all W|| over the matrices that read text."""
    drawn: Drawn
    judge: JudgedBy | None
    words: tuple[Counted, ...]
    kept: tuple[Counted, ...]
    attacks: tuple[AttackRecord, ...] = ()
    survival: tuple[Survival, ...] = ()
    carried: tuple[str, ...] = ()
    """What the model carried besides, before and after: other erasures and prompt memories, in words."""
    weights: str = ""
    """Of the model that was measured on, see :func:`erasure_core.artifact.weights_digest`; "" in older receipts."""
    rounded: str = ""
    """Type that the file stores the numbers in, where that rounded them after they were measured."""
    sheet: bytes = field(default=b"", repr=False, compare=False)
    """The pictures as a PNG file; it lies beside the file, not in it."""

    @property
    def before(self) -> Rate:
        """Of all pictures of the erased words, those that showed it."""
        return pooled(c.before for c in self.words if c.before is not None)

    @property
    def after(self) -> Rate:
        return pooled(c.after for c in self.words if c.after is not None)

    @property
    def kept_before(self) -> Rate:
        return pooled(c.before for c in self.kept if c.before is not None)

    @property
    def kept_after(self) -> Rate:
        return pooled(c.after for c in self.kept if c.after is not None)

    @property
    def alarms(self) -> Rate:
        """The judge's false alarms, on base pictures of kept words."""
        return pooled(c.alarms for c in self.kept if c.alarms is not None)

    @property
    def curve(self) -> tuple[tuple[float, Rate], ...]:
        """Of all pictures of the erased words after, those that show it at other thresholds; () where that wasn't kept."""
        counted = [c for c in self.words if c.after is not None]
        grids = {tuple(t for t, _ in c.curve) for c in counted}
        if len(grids) != 1:
            return ()
        at = zip(*(c.curve for c in counted), strict=True)
        return tuple((column[0][0], Rate(sum(h for _, h in column), self.after.n)) for column in at)

    def share(self, seen: Rate | None) -> Rate | Corrected | None:
        """What the judge's count ``seen`` comes to, see :meth:`JudgedBy.counted`."""
        return seen if self.judge is None or seen is None else self.judge.counted(seen)

    @property
    def after_corrected(self) -> Corrected | None:
        """``after`` once the judge's error is taken out; None where that error isn't known.

        Its hit rate is what it saw in base pictures of the words, so what the base model fails to draw counts as missed.
        """
        try:
            return corrected(self.after, hits=self.before, alarms=self.alarms) if self.after.n else None
        except ValueError:
            return None

    def mismatch(self, erasure: Erasure) -> str:
        """Why it isn't the receipt of ``erasure``, in words; "" where it is."""
        header = erasure.header
        if (self.spec, self.method, dict(self.settings)) != (header.spec, header.method, dict(header.settings)):
            return "it tells of other words or another method"
        if self.digest != digest(erasure.deltas):
            return "the numbers were changed after it was made"
        # Which erasure a record attacked only its own two marks say: a receipt knows the model before.
        faults = (a.fault(self.spec, self.base, a.erased, a.weights, a.memory, self.weights) for a in self.attacks)
        return next((f"an attack in it is of something else: {fault}" for fault in faults if fault), "")

    def other_base(self, fingerprint: str) -> str:
        """A sentence where the model with this fingerprint isn't the one that was measured on; "" where it is."""
        if same_base(self.base, fingerprint):
            return ""
        return (
            f"this is not the model that the receipt was made on, nor a finetune of it (fingerprint {fingerprint}, the "
            f"receipt's {self.base}): its figures say nothing of this one. Make a receipt here"
        )

    def other_weights(self, digest: str) -> str:
        """A sentence where the same base has other numbers than it was measured with; "" where not, or unknown."""
        if not self.weights or self.weights == digest:
            return ""
        return (
            f"the receipt was made on the same base with other weights (sha256 {digest[:16]}..., the receipt's "
            f"{self.weights[:16]}...): a finetune, another precision, LoRAs in front (also where another kind of machine added "
            "them up). Its figures may differ here"
        )

    def summary(self) -> str:
        """All of it for people, on one screen."""
        lines = [
            f"receipt: {_names([c.name for c in self.spec.erase])} suppressed by {self.method}, measured at strength "
            f"{self.strength:g} on base {self.base} with Concept Erasure {self.version}",
            *([f"weights of that base: sha256 {self.weights[:16]}..."] if self.weights else []),
            *([f"the model also carried: {'; '.join(self.carried)}"] if self.carried else []),
            *self._counted(),
            *self._attacked(),
            *self._survived(),
            f"weights that read text: moved by {_percent(self.drift)}; their answers to prompts with the erased words changed "
            f"by {_percent(self.text.erased)}, {self._kept_words()}to the empty prompt by {_percent(self.text.empty)}",
        ]
        if self.rounded:
            lines.append(f"the file stores the numbers in {self.rounded}; all this was measured before that rounding")
        lines.append("measured with these prompts and seeds; nothing is said about others")
        return "\n".join(lines)

    def _kept_words(self) -> str:
        kept, worst = self.text.kept, self.text.kept_worst
        return (
            "" if kept is None or worst is None else f"with kept words by {_percent(kept)} (worst {_percent(worst)}), "
        )

    def _counted(self) -> list[str]:
        d, seeds = self.drawn, self.drawn.seeds
        span = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds from {seeds[0]}"
        who = "no judge: pictures were compared, not counted" if self.judge is None else f"judge {self.judge}"
        lines = [
            f'pictures of "{d.template}": {span}, {d.steps} steps {d.sampler} {d.scheduler}, cfg {d.cfg:g}, {d.width} x '
            f"{d.height}; {who}",
            *([] if self.judge is None else [f"  {self.judge.note}"]),
        ]
        for group, counted, before, after in (
            ("suppressed", self.words, self.before, self.after),
            ("kept", self.kept, self.kept_before, self.kept_after),
        ):
            for c in counted[:_SHOWN]:
                seen = (
                    "" if c.before is None else f"seen in {self.share(c.before)} before, {self.share(c.after)} after; "
                )
                score = _clip_score(c.clip_score_before, c.clip_score_after)
                lines.append(f"  {group} {c.word}: {seen}{score}pixels moved by {c.moved:.3f}")
            if len(counted) > 1:
                seen = (
                    f"seen in {self.share(before)} before, {self.share(after)} after{_of(counted)}; "
                    if before.n
                    else ""
                )
                score = _clip_score(
                    _mean(c.clip_score_before for c in counted), _mean(c.clip_score_after for c in counted)
                )
                moved = sum(c.moved for c in counted) / len(counted)
                lines.append(f"  {group}, these {len(counted)} together: {seen}{score}pixels moved by {moved:.3f}")
        drawn = {c.word for c in self.words}
        if missing := [c.name for c in self.spec.erase if drawn.isdisjoint(c.words)]:
            lines.append(f"  not drawn, so nothing is said about {_names(missing)}")
        if not self.kept:
            lines.append("  no kept word was looked at")
        if (best := self.after_corrected) is not None:
            lines.append(
                f"  still there: {best} of what base pictures show, after the judge's error on them ({self.before} seen, "
                f"{self.alarms} false alarms)"
            )
        if self.curve:
            shares = ", ".join(f"{t:g}: {r.hits} of {r.n}" for t, r in self.curve)
            lines.append(f"  suppressed, seen after at other thresholds: {shares}")
        return lines

    def _attacked(self) -> list[str]:
        if not self.attacks:
            return ["attacks: none was run, so nothing is said about whoever tries to bring it back"]
        shown = [f"  {a.summary(self.judge)}" for a in self.attacks[:_SHOWN]]
        more = len(self.attacks) - len(shown)
        return [f"attacks: {len(self.attacks)}", *shown, *([f"  and {more} more"] if more else [])]

    def _survived(self) -> list[str]:
        return [
            f"stored in {s.stored}: {_percent(s.loss.left)} of the change left under noise of {_percent(s.loss.noise)} of it"
            + ("" if s.after is None else f"; concept seen in {self.share(s.after)}")
            for s in self.survival
        ]


def _clip_score(before: float | None, after: float | None) -> str:
    return "" if before is None or after is None else f"CLIP score {before:.1f} before, {after:.1f} after; "


def _of(counted: Sequence[Counted]) -> str:
    """Where the judge didn't know all words: of how many it speaks."""
    known = sum(c.before is not None for c in counted)
    return "" if known == len(counted) else f" (of the {known} that the judge knows)"


def _mean(values: Iterable[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def _names(words: Sequence[str]) -> str:
    more = len(words) - _SHOWN
    return ", ".join(words[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
