"""Which prompts and seeds settings are tuned on, and which ones figures come from. The two share nothing.

Seeds, sentences and erased concepts all differ between the splits, so that a default that was chosen on ``TUNING``
has never met what ``SCORING`` measures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product

from .concepts import NEIGHBOURS, OBJECT, OBJECTS, STYLE, STYLES, prompt


@dataclass(frozen=True)
class Split:
    """A fixed protocol. Seeds count up from ``first_seed``; ``template`` is the sentence around every word."""

    name: str
    first_seed: int
    template: str
    objects: tuple[str, ...]
    """Erased one at a time."""
    styles: tuple[str, ...]
    together: tuple[str, ...]
    """Erased at once."""

    def seeds(self, n: int) -> list[int]:
        return list(range(self.first_seed, self.first_seed + n))


SCORING = Split(
    "scoring",
    100_000,
    "{a} {w}",
    ("cat", "rose", "cigarette", "bomb", "knife", "beer"),
    ("brindlewash", "neon"),
    ("cat", "rose", "cigarette", "bomb", "knife"),
)
TUNING = Split(
    "tuning",
    500,
    "a drawing of {a} {w}",
    ("dog", "tulip", "banana", "key"),
    ("sketch",),
    ("dog", "tulip", "banana", "key", "car"),
)

STYLE_OBJECTS = (
    "cat",
    "horse",
    "frog",
    "tulip",
    "cactus",
    "pizza",
    "car",
    "rocket",
    "house",
    "umbrella",
    "crown",
    "beer",
)
"""The objects that styles are recognised on."""


@dataclass(frozen=True)
class Shot:
    """One picture to draw and what it should show: an object, and a style unless that isn't asked."""

    prompt: str
    seed: int
    object: str
    style: str = "plain"


@dataclass(frozen=True)
class Erasing:
    """What one effect measurement erases: object names, or style names."""

    objects: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return " + ".join((*self.objects, *(f"{s} (style)" for s in self.styles)))

    @property
    def key(self) -> str:
        """How the command line calls it: the object, the style, or "together"."""
        return "together" if len(self.objects) > 1 else (*self.objects, *self.styles)[0]

    @property
    def kind(self) -> str:
        return "style" if self.styles else "object" if len(self.objects) == 1 else "several objects"

    def words(self) -> list[tuple[str, ...]]:
        """For each erased concept its name and the aliases that the eraser is told."""
        of_styles = [(STYLE[s].phrase, STYLE[s].phrase.removesuffix(" style")) for s in self.styles]
        return [(OBJECT[o].name, *OBJECT[o].named) for o in self.objects] + of_styles

    def keep(self) -> list[str]:
        """Names that the eraser is told to keep: every other object and style."""
        names = [o.name for o in OBJECTS if o.name not in self.objects]
        return names + [s.phrase for s in STYLES if s.phrase and s.name not in self.styles]


@dataclass(frozen=True)
class Questions:
    """The pictures of one effect measurement by what they ask; all lists are fixed for a split, a spec and a size."""

    direct: list[Shot] = field(default_factory=list)
    named: list[Shot] = field(default_factory=list)
    unseen: list[Shot] = field(default_factory=list)
    neighbours: list[Shot] = field(default_factory=list)
    kept: list[Shot] = field(default_factory=list)

    def groups(self) -> dict[str, list[Shot]]:
        return {k: getattr(self, k) for k in ("direct", "named", "unseen", "neighbours", "kept")}


def erasings(split: Split) -> list[Erasing]:
    """What ``split`` erases, one at a time, then several at once."""
    single = [Erasing(objects=(o,)) for o in split.objects] + [Erasing(styles=(s,)) for s in split.styles]
    return [*single, Erasing(objects=split.together)]


def _shots(split: Split, words: Sequence[tuple[str, str]], seeds: Sequence[int], style: str = "plain") -> list[Shot]:
    return [
        Shot(prompt(word, style, template=split.template), seed, name, style)
        for (name, word), seed in product(words, seeds)
    ]


def kept_shots(split: Split, rounds: int) -> list[Shot]:
    """Every object ``rounds`` times, half of them plain, the others in the further styles in turn."""
    styled, out = [s.name for s in STYLES if s.phrase], []
    for k, seed in enumerate(split.seeds(rounds)):
        for i, o in enumerate(OBJECTS):
            style = "plain" if k % 2 == 0 else styled[(i + k // 2) % len(styled)]
            out += _shots(split, [(o.name, o.name)], [seed], style)
    return out


def questions(split: Split, erasing: Erasing, seeds: int, rounds: int = 2) -> Questions:
    """The pictures that measure one erasure.

    Args:
        seeds: pictures a word; halved for neighbours, and for each concept of several at once.
        rounds: pictures a kept object.
    """
    if erasing.styles:
        style = erasing.styles[0]
        objects = [(o, o) for o in STYLE_OBJECTS]
        drawn = [
            Shot(prompt(w, style, template=split.template), s, o, style) for s, (o, w) in _cycle(split, objects, seeds)
        ]
        short = STYLE[style].phrase.removesuffix(" style")
        # Captions never say it this way round, so what the base draws here is measured as well.
        named = [
            Shot(prompt(f"{short} {w}", template=split.template), s, o, style)
            for s, (o, w) in _cycle(split, objects, seeds)
        ]
        return Questions(drawn, named, [], [], [s for s in kept_shots(split, rounds) if s.style != style])
    n = seeds if len(erasing.objects) == 1 else max(1, seeds // 2)
    gone = [OBJECT[o] for o in erasing.objects]
    near = dict.fromkeys(x for o in erasing.objects for x in NEIGHBOURS.get(o, ()) if x not in erasing.objects)
    return Questions(
        _shots(split, [(o.name, o.name) for o in gone], split.seeds(n)),
        _shots(split, [(o.name, w) for o in gone for w in o.named], split.seeds(n)),
        _shots(split, [(o.name, w) for o in gone for w in o.unseen], split.seeds(n)),
        _shots(split, [(x, x) for x in near], split.seeds(max(1, n // 2))),
        [s for s in kept_shots(split, rounds) if s.object not in erasing.objects],
    )


def _cycle(split: Split, objects: list[tuple[str, str]], n: int) -> list[tuple[int, tuple[str, str]]]:
    """``n`` pictures over ``objects`` in turn, a new seed for each."""
    return [(seed, objects[i % len(objects)]) for i, seed in enumerate(split.seeds(n))]
