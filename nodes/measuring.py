"""What a receipt counts: pictures of the same words and seeds by the base model, the erased one, and its rounded copies."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any

import comfy.model_management as mm
import comfy.utils
import torch
from PIL import Image
from torch import Tensor

from ..erasure_core import ConceptSpec
from ..erasure_core import Erasure as CoreErasure
from ..erasure_core.metrics import curve_hits
from ..erasure_core.metrics.distances import pairwise_error
from ..erasure_core.metrics.judged import JudgedBy
from ..erasure_core.metrics.judges import ZeroShotJudge, word_for
from ..erasure_core.metrics.rates import Rate, pooled, rate
from ..erasure_core.metrics.rounding import ROUNDINGS, rounding_loss
from ..erasure_core.names import to_comfy
from ..erasure_core.receipt import Counted, Survival
from .port import ComfyPort
from .sampling import PLACE, Drawing, decode, encode, sample
from .sheet import sheet, to_image

_COLUMNS = ("before", "after")
_PREVIEW = 1024


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most ``count`` of them, from the first to the last at even distances."""
    if len(items) <= count:
        return list(items)
    return [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]


def erased_words(spec: ConceptSpec, count: int) -> list[tuple[str, tuple[str, ...]]]:
    """(word, all words of its concept): names before aliases, each kind spread evenly; 0: all names."""
    count = count or len(spec.erase)
    names = [(c.name, c.words) for c in spec.erase]
    aliases = [(w, c.words) for c in spec.erase for w in c.words[1:]]
    chosen = spread(names, count)
    return [*chosen, *(spread(aliases, count - len(chosen)) if count > len(chosen) else ())]


class Measuring:
    """Draws and counts; the sheet grows on the node meanwhile. Cancelling works at every step.

    Args:
        words: with all words of their concept, as :func:`erased_words` gives them.
        copies: how many rounded copies of the erased model will be drawn with.

    Raises:
        ValueError: the judge knows no word of any concept that is drawn.
    """

    def __init__(
        self, clip, vae, judge, how: Drawing, template: str, seeds: Sequence[int],
        words: Sequence[tuple[str, tuple[str, ...]]], kept: Sequence[str], copies: int,
    ) -> None:  # fmt: skip
        self._clip, self._vae, self._judge, self._how = clip, vae, judge, how
        self._template, self._seeds = template, list(seeds)
        self.words, self.kept = [word for word, _ in words], list(kept)
        self._asked: dict[str, str] = {}
        if judge is not None:
            # Words that it doesn't know are compared without counting, but it must know one that is erased.
            for word in kept:
                with suppress(ValueError):
                    self._asked[word] = word_for(judge, [word])
            refused: ValueError | None = None
            for word, concept in words:
                try:
                    self._asked[word] = word_for(judge, concept)
                except ValueError as error:
                    refused = error
            if refused is not None and self._asked.keys().isdisjoint(self.words):
                raise ValueError(
                    f"{refused}. Connect another judge, or none: the receipt then compares pictures without counting"
                )
        asked = dict.fromkeys(self._asked[w] for w in self.words if w in self._asked)
        self.by = None if judge is None else JudgedBy.of(judge, list(asked))
        self._pictures: dict[tuple[str, str], Tensor] = {}
        self._said: dict[tuple[str, str], Tensor] = {}
        """What the judge said of the pictures of a word, in a column, where it knows the word."""
        self._negative = encode(clip, "")
        batches = (len(self.words) + len(self.kept)) * len(_COLUMNS) + len(
            self._asked.keys() & set(self.words)
        ) * copies
        self._bar, self._all, self._done = comfy.utils.ProgressBar(1), max(1, batches), 0

    def before(self, model) -> None:
        self._column(model, "before")

    def after(self, model) -> None:
        self._column(model, "after")

    def counted(self) -> tuple[tuple[Counted, ...], tuple[Counted, ...]]:
        """Of the erased words, of the kept ones."""
        return tuple(self._counted(w) for w in self.words), tuple(self._counted(w, True) for w in self.kept)

    def seen_with(self, model) -> Rate | None:
        """Pictures of the erased words by another model that show them; None without a judge."""
        if self._judge is None:
            return None
        known = [word for word in self.words if word in self._asked]
        return pooled(self._rate(self._say(self._draw(model, word), self._asked[word])) for word in known)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the pictures."""
        _, height, width, _ = next(iter(self._pictures.values())).shape
        return width, height

    def sheet(self, title: str = "", notes: Sequence[str] = ()) -> Image.Image:
        """A row for each word, a column before and one after, the counts below."""
        rows = [*self.words, *self.kept]
        cells = [[[to_image(p) for p in self._pictures.get((w, c), ())] for c in _COLUMNS] for w in rows]
        captions = [[self._caption(w, c) for c in _COLUMNS] for w in rows]
        labels = [*(f"{w} (suppressed)" for w in self.words), *(f"{w} (kept)" for w in self.kept)]
        return sheet(
            cells, labels, _COLUMNS, captions=captions, title=title, notes=notes, across=min(4, len(self._seeds))
        )

    def _column(self, model, column: str) -> None:
        for word in (*self.words, *self.kept):
            pictures = self._draw(model, word)
            self._pictures[word, column] = pictures
            if word in self._asked:
                self._said[word, column] = self._say(pictures, self._asked[word])
            self._tick(0.0, ("JPEG", self.sheet(), _PREVIEW))

    def _draw(self, model, word: str) -> Tensor:
        """[n, H, W, 3] of one word, a picture for each seed."""
        positive = encode(self._clip, self._prompt(word))
        latents = sample(model, positive, self._negative, self._seeds, self._how, step=self._tick)
        self._done += 1
        return decode(self._vae, latents).clamp(0, 1)

    def _tick(self, share: float, preview: Any = None) -> None:
        mm.throw_exception_if_processing_interrupted()
        self._bar.update_absolute(round(100 * (self._done + share)), 100 * self._all, preview)

    def _say(self, pictures: Tensor, asked: str) -> Tensor:
        return self._judge.probability(pictures.movedim(-1, 1), asked)

    def _rate(self, said: Tensor) -> Rate:
        return rate(said >= self._judge.threshold)

    def _seen(self, word: str, column: str) -> Rate | None:
        said = self._said.get((word, column))
        return None if said is None else self._rate(said)

    def _counted(self, word: str, kept: bool = False) -> Counted:
        one, two = (self._pictures[word, column] for column in _COLUMNS)
        alarms = None
        if kept and self._judge is not None:
            erased = dict.fromkeys(self._asked[w] for w in self.words if w in self._asked)
            alarms = pooled(self._rate(self._say(one, asked)) for asked in erased)
        said = self._said.get((word, "after"))
        return Counted(
            word, self._asked.get(word, ""), self._seen(word, "before"), self._seen(word, "after"),
            self._moved(word), alarms, self._clip_score(word, one), self._clip_score(word, two),
            () if said is None else curve_hits(said),
        )  # fmt: skip

    def _moved(self, word: str) -> float:
        return float(pairwise_error(*(self._pictures[word, column] for column in _COLUMNS)).mean())

    def _clip_score(self, word: str, pictures: Tensor) -> float | None:
        """Their CLIP score with what was asked, where the judge is CLIP."""
        if not isinstance(self._judge, ZeroShotJudge):
            return None
        return float(self._judge.clip_score(pictures.movedim(-1, 1), self._prompt(word)).mean())

    def _prompt(self, word: str) -> str:
        return self._template.replace(PLACE, word)

    def _caption(self, word: str, column: str) -> str:
        found = self._seen(word, column)
        if found is not None and self.by is not None:
            return f"seen in {self.by.counted(found)}"
        if column == "after" and (word, column) in self._pictures:
            return f"pixels moved by {self._moved(word):.3f}"
        return ""


def survival(
    model, base: ComfyPort, erasure: CoreErasure, stored: Sequence[str], seen_with: Callable[[Any], Rate | None]
) -> tuple[Survival, ...]:
    """The erased model with every weight that reads text or is changed stored as each of ``stored``.

    ``erasure`` is at the strength that is measured. The other weights stay as they are: this is about the change, not about
    what few bits do to a model.
    """
    text = {site.name for site in base.sites()}
    sites = [s for s in base.linears() if s.name in text or s.name in erasure.deltas]

    def pairs() -> Iterator[tuple[Tensor, Tensor]]:
        for site in sites:
            mm.throw_exception_if_processing_interrupted()
            weight = base.weight(site).float().cpu()
            delta = erasure.deltas.get(site.name)
            yield weight, torch.zeros_like(weight) if delta is None or not delta.rank else delta.dense()

    out = []
    for name in stored:
        rounding = ROUNDINGS[name]
        loss = rounding_loss(pairs(), rounding)
        patches = {
            f"{to_comfy(s.name)}.weight": ("set", (rounding(w + d),)) for s, (w, d) in zip(sites, pairs(), strict=True)
        }
        rounded = model.clone()
        rounded.add_patches(patches, 1.0)
        out.append(Survival(name, loss, seen_with(rounded)))
    return tuple(out)
