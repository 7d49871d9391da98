"""What says whether a picture shows a concept: the protocol, and the two judges that an image encoder makes.

A judge that only knows features is as good as the encoder behind it. Neither of these was trained for the concept, so
their figures say less than those of a classifier that was.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from .distances import clip_score
from .judge_error import JudgeError
from .rates import Rate

EncodePictures = Callable[[Tensor], Tensor]
"""Pictures [N, 3, H, W] in [0, 1] -> features [N, d]."""

EncodeTexts = Callable[[Sequence[str]], Tensor]
"""Texts -> features [N, d] in the space of the pictures'."""

CONTRASTS = ("nothing in particular", "a person", "an animal", "a plant", "food", "a vehicle", "a building", "a tool",
    "furniture", "a landscape", "a pattern", "text")  # fmt: skip
"""What a picture may show instead, where the user names nothing."""

_TEMPLATE = "a picture of {}"
_LEFT_OUT = 100
_LISTED = 20
"""Labels that an error names; a classifier may have a thousand."""
_LOGIT_SCALE = 100.0  # where CLIP's training clips it, and where the released models stand
_PLAIN = {
    "red": (1.0, 0.0, 0.0), "green": (0.0, 0.6, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0),
    "black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "orange": (1.0, 0.5, 0.0), "purple": (0.5, 0.0, 0.5),
}  # fmt: skip


@runtime_checkable
class Judge(Protocol):
    """A picture classifier behind one question. ``name`` and ``version`` go into every result that it gives, so two that
    answer differently must not share both. One that knows how it errs may have a method ``error(concept)``, see
    :class:`erasure_core.metrics.judged.JudgedBy`."""

    name: str
    version: str
    labels: tuple[str, ...] | None
    """The concepts that it knows; None: any text."""
    threshold: float
    """A picture shows the concept where the probability reaches this."""

    def probability(self, pictures: Tensor, concept: str) -> Tensor:
        """[N] probability that each of ``pictures`` [N, 3, H, W] in [0, 1] shows ``concept``.

        Raises:
            ValueError: it doesn't know the concept; the message lists what it knows.
        """
        ...


def check_pictures(pictures: Tensor) -> Tensor:
    """The pictures as float32 in [0, 1].

    Raises:
        ValueError: another shape than [N, 3, H, W].
    """
    if pictures.ndim != 4 or pictures.shape[1] != 3:
        raise ValueError(f"judge: expected pictures [N, 3, H, W], got {tuple(pictures.shape)}")
    return pictures.float().clamp(0, 1)


def unknown(judge: Judge, *words: str) -> ValueError:
    """The error for a concept of which ``judge`` knows no word."""
    labels = judge.labels or ()
    known = ", ".join(labels[:_LISTED]) + (f" and {len(labels) - _LISTED} more" if len(labels) > _LISTED else "")
    asked = f"does not know {words[0]!r}" if len(words) == 1 else f"knows none of {', '.join(map(repr, words))}"
    return ValueError(f"judge: {judge.name} {asked}. It knows: {known}")


def word_for(judge: Judge, words: Sequence[str]) -> str:
    """The first of a concept's words that the judge knows, by its own matching.

    Raises:
        ValueError: it knows none; the message lists what it knows. A judge of any text says itself why it takes none.
    """
    refused = unknown(judge, *words)
    for word in words:
        try:
            judge.probability(torch.zeros(1, 3, 64, 64), word)
        except ValueError as error:  # its way to say that it doesn't
            refused = error if judge.labels is None else refused
            continue
        return word
    raise refused


def look_through(judge: Judge, decode: Callable[[Tensor], Tensor], concept: str) -> Callable[[Tensor], Tensor]:
    """The judge as methods use it: latents [N, C, h, w] -> [N] probability, through ``decode`` to pictures in [0, 1].

    Raises:
        ValueError: at once, if the judge doesn't know the concept.
    """
    judge.probability(torch.zeros(1, 3, 64, 64), concept)
    return lambda latents: judge.probability(decode(latents), concept)


class ZeroShotJudge:
    """A pair of towers (CLIP) asked which of several texts fits a picture best (Radford et al., arXiv:2103.00020, 3.1).

    P = softmax(100 cos(E(picture), E("a picture of x"))) over the concept and the contrasts, at the concept. The answer
    depends on the contrasts: name what the picture might show instead. A contrast that is the concept itself is left out.
    """

    labels = None

    def __init__(
        self,
        pictures: EncodePictures,
        texts: EncodeTexts,
        contrasts: Sequence[str] = CONTRASTS,
        *,
        name: str = "clip-zero-shot",
        threshold: float = 0.5,
    ) -> None:
        if not contrasts:
            raise ValueError("contrasts: name at least one thing that a picture may show instead of the concept")
        self.name, self.threshold = name, threshold
        self.contrasts = tuple(contrasts)
        self._pictures, self._texts = pictures, texts
        read = texts([_TEMPLATE.format(c.strip()) for c in self.contrasts[:2]])
        self.version = marked("1", *self.contrasts, _probe(pictures), _signs(read))

    def probability(self, pictures: Tensor, concept: str) -> Tensor:
        if not concept.strip():
            raise ValueError("concept: write what the judge should look for")
        others = [c for c in self.contrasts if c.strip().casefold() != concept.strip().casefold()]
        if not others:
            raise ValueError(
                f"contrasts: {concept!r} is the only one, so there is nothing to tell it from. Name others"
            )
        pictures = check_pictures(pictures)
        if not len(pictures):
            return torch.zeros(0)
        texts = F.normalize(self._texts([_TEMPLATE.format(c.strip()) for c in (concept, *others)]).float(), dim=-1)
        seen = F.normalize(self._pictures(pictures).float(), dim=-1)
        return (_LOGIT_SCALE * seen @ texts.mT).softmax(-1)[:, 0]

    def clip_score(self, pictures: Tensor, text: str) -> Tensor:
        """:func:`~erasure_core.metrics.clip_score` [N] of each of ``pictures`` [N, 3, H, W] in [0, 1] and a whole prompt."""
        seen = self._pictures(check_pictures(pictures))
        return clip_score(seen, self._texts([text]).expand_as(seen))


def agreement(pictures: EncodePictures, texts: EncodeTexts) -> float:
    """How far two towers belong together, 0 to 1: how often eight plain colours find their words, and the words their
    colours, by centred cosine. Towers that were not trained together come to about 1/8.
    """
    plain = torch.tensor(list(_PLAIN.values()))[:, :, None, None].expand(-1, -1, 224, 224)
    a, b = pictures(plain).float(), texts([_TEMPLATE.format(f"the plain colour {c}") for c in _PLAIN]).float()
    a, b = (F.normalize(x - x.mean(0), dim=-1) for x in (a, b))
    similar = a @ b.mT
    right = torch.arange(len(_PLAIN))
    return float(torch.cat([similar.argmax(0) == right, similar.argmax(1) == right]).float().mean())


class ExampleJudge:
    """A judge made of example pictures: Dark Miner's verifier (METHODS 2.3) with its score turned into a probability.

        s(x) = mean_e cos(E(x) - r, E(e) - r)       e over the examples, r the mean feature of the other pictures

    ``P = sigmoid(k (s - m))``, m half way between what examples and others score when they are left out of the reference
    themselves, k such that these two means come to 0.95 and 0.05. The paper has one reference picture and a bare threshold.

    Args:
        words: what the examples show; the first is its name, the others are taken for it too.
        examples, others: pictures [k, 3, H, W] in [0, 1] with and without the concept, at least two each.

    Raises:
        ValueError: too few pictures, or the encoder sees no difference between the two sets.
    """

    def __init__(
        self,
        encode: EncodePictures,
        words: Sequence[str],
        examples: Tensor,
        others: Tensor,
        *,
        name: str = "examples",
        threshold: float = 0.5,
    ) -> None:
        self.labels: tuple[str, ...] | None = tuple(w.strip() for w in words if w.strip())
        if not self.labels:
            raise ValueError("concept: write what the examples show")
        for what, given in (("examples", examples), ("others", others)):
            if len(given) < 2:
                raise ValueError(f"{what}: {len(given)} pictures, at least 2 are needed to tell chance from likeness")
        self.name, self.threshold = name, threshold
        self.version = marked("1", *self.labels, _probe(encode), _eight_bit(examples), _eight_bit(others))
        self._encode = encode
        self._shown, self._without = encode(check_pictures(examples)).float(), encode(check_pictures(others)).float()
        self._likeness = _Likeness.fit(self._shown, self._without)
        if self._likeness.gap < 0.02:
            raise ValueError(
                f"examples: to this image encoder they look no more alike ({self._likeness.with_it:.2f}) than the other "
                f"pictures do ({self._likeness.no_it:.2f}). Use pictures that differ in the concept only, or another encoder"
            )

    def probability(self, pictures: Tensor, concept: str) -> Tensor:
        self._check(concept)
        pictures = check_pictures(pictures)
        if not len(pictures):
            return torch.zeros(0)
        return self._likeness.probability(self._encode(pictures).float())

    def error(self, concept: str) -> JudgeError | None:
        """What judges that were made without one of the pictures say of that picture: of the examples those that are
        recognised, of the others those that are taken for one. Of more than a hundred of either, a hundred stand for all. None
        with fewer than three of either."""
        self._check(concept)
        return self._error

    @cached_property
    def _error(self) -> JudgeError | None:
        shown, without = _some(self._shown), _some(self._without)
        if min(len(shown), len(without)) < 3:
            return None

        def seen(features: Tensor, likeness: _Likeness) -> bool | None:
            """None where the pictures that are left tell nothing apart."""
            return None if likeness.gap <= 0 else float(likeness.probability(features[None])) >= self.threshold

        hits = sum(seen(x, _Likeness.fit(_but(shown, i), without)) is True for i, x in enumerate(shown))
        alarms = sum(seen(x, _Likeness.fit(shown, _but(without, i))) is not False for i, x in enumerate(without))
        return JudgeError(Rate(hits, len(shown)), Rate(alarms, len(without)))

    def _check(self, concept: str) -> None:
        if concept.strip().casefold() not in (w.casefold() for w in self.labels or ()):
            raise unknown(self, concept)


@dataclass(frozen=True)
class _Likeness:
    """What a score says, for features of examples and of others."""

    origin: Tensor
    wanted: Tensor
    """Directions of the examples."""
    with_it: float
    """What examples score on average when each is left out of the reference itself, and others likewise."""
    no_it: float

    @classmethod
    def fit(cls, shown: Tensor, without: Tensor) -> _Likeness:
        origin = without.mean(0)
        wanted, n = _directions(shown, origin), len(shown)
        pairs = wanted.sum(0).square().sum() - wanted.square().sum()  # cosines of all with all others
        no_it = [_score(x, shown, _but(without, i).mean(0)) for i, x in enumerate(without)]
        return cls(origin, wanted, float(pairs) / (n * (n - 1)), sum(no_it) / len(no_it))

    @property
    def gap(self) -> float:
        return self.with_it - self.no_it

    def probability(self, features: Tensor) -> Tensor:
        score = (_directions(features, self.origin) @ self.wanted.mT).mean(-1)
        return torch.sigmoid(2 * math.log(19) / self.gap * (score - (self.with_it + self.no_it) / 2))


def marked(version: str, *parts: str | bytes) -> str:
    """``version`` with eight digits that stand for all ``parts``: what a judge was made of."""
    seen = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        seen.update(f"{len(data)}:".encode() + data)
    return f"{version}-{seen.hexdigest()[:8]}"


def _probe(encode: EncodePictures) -> bytes:
    """Tells one image encoder from another by two plain pictures."""
    return _signs(encode(torch.tensor([_PLAIN["red"], _PLAIN["blue"]])[:, :, None, None].expand(-1, -1, 64, 64)))


def _signs(features: Tensor) -> bytes:
    """Signs of 32 fixed projections of features [n, d], of what tells them apart where n > 1: rounding leaves them alone."""
    rows = features.detach().float().cpu()
    rows = rows - rows.mean(0) if len(rows) > 1 else rows
    onto = torch.randn(rows.shape[1], 32, generator=torch.Generator().manual_seed(0))
    return bytes((rows @ onto > 0).flatten().tolist())


def _eight_bit(pictures: Tensor) -> bytes:
    """Pictures as a file holds them."""
    return (check_pictures(pictures) * 255).round().to("cpu", torch.uint8).contiguous().numpy().tobytes()


def _directions(features: Tensor, origin: Tensor) -> Tensor:
    return F.normalize(features - origin, dim=-1)


def _but(rows: Tensor, index: int) -> Tensor:
    return torch.cat([rows[:index], rows[index + 1 :]])


def _score(feature: Tensor, examples: Tensor, origin: Tensor) -> float:
    return float((_directions(examples, origin) @ _directions(feature, origin)).mean())


def _some(rows: Tensor) -> Tensor:
    """At most a hundred of them, evenly from all."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), _LEFT_OUT)).round().long()]
