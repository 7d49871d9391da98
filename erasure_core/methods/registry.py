"""The one list of methods. Nodes, command line, docs and contract tests enumerate it.

A method is one file in this package that ends with ``SPEC = MethodSpec(...)``; it is found by being there.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cache
from typing import Any, Protocol

from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..dark import DarkEmbeddings
from ..operators.checkpoint import Checkpoint
from ..operators.search import TokenSlot
from ..operators.train_loop import Watch
from ..operators.trainable import TrainableModel
from ..pairs import ConceptPairs

Progress = Callable[[int, int], None]
"""Called as progress(done, total). It may raise to cancel: methods hold nothing that needs undoing."""


Look = Callable[[Tensor], Tensor]
"""Clean, scaled latents [N, C, h, w] -> probability [N] that each shows the concept: a judge behind a decoder."""


@dataclass(frozen=True)
class Aids:
    """What a method may use beside the model and the words. All optional."""

    dark: tuple[Tensor, ...] = ()
    """Text states [L, D] that bring a concept back; erased as further words for it."""
    owners: tuple[int, ...] = ()
    """For each of ``dark`` the number of its concept among those that are erased; empty: all are of the first."""
    pictures: Tensor | None = None
    """Clean, scaled latents [k, C, h, w] that show the concept; methods that need some draw their own otherwise."""
    pairs: ConceptPairs | None = None
    looks: tuple[Look | None, ...] = ()
    """What looks for each of the erased concepts; None, or left out at the end: nobody."""
    watch: Watch | None = None
    drawing: Progress | None = None
    """Called as drawing(done, total) while pictures are drawn that a training begins with; like progress it may raise."""
    checkpoint: Checkpoint | None = None
    """Where a training keeps its state, to go on from there if it is cut off; only of this very training."""
    slot: Callable[[int], TokenSlot] | None = None
    """So many pseudo-words, read by a text encoder that carries gradients; for methods that search for words."""
    found: Callable[[DarkEmbeddings | None, str], object] | None = None
    """Told at the end what a method that mines has found, and how that went."""

    def __post_init__(self) -> None:
        if self.owners and (len(self.owners) != len(self.dark) or min(self.owners) < 0):
            raise ValueError(f"owners: {self.owners} for {len(self.dark)} embeddings don't match up")

    @property
    def owned(self) -> list[tuple[Tensor, int]]:
        """``dark``, each with the number of its concept."""
        return list(zip(self.dark, self.owners or (0,) * len(self.dark), strict=True))

    def before(self, progress: Progress, steps: int) -> Progress:
        """Whom to tell of pictures that are drawn before the first of ``steps`` training steps."""
        return self.drawing or (lambda _done, _total: progress(0, steps))


class Run(Protocol):
    def __call__(self, port: Any, spec: ConceptSpec, settings: Any, progress: Progress, aids: Aids) -> Erasure:
        """``port`` is a ModelPort, for methods that train a TrainablePort."""
        ...


@dataclass(frozen=True)
class MethodSpec:
    """One erasure method: how it is named, cited, configured and run."""

    name: str
    """Identifier, lower case; also the node id's suffix. Never changes."""
    title: str
    summary: str
    """One sentence for a tooltip: the effect on the picture and what it costs."""
    paper: str
    settings: type
    """A frozen dataclass; each field made by :func:`setting`."""
    run: Run
    trains: bool = False
    """Whether it runs the network: takes minutes, and shows its progress through ``Aids.watch``."""
    needs_pairs: bool = False
    asks_judge: bool = False
    """Whether it calls one of ``Aids.looks``. A judge that isn't asked need not know the concept."""
    unread: tuple[str, ...] = ()
    """What of a request it doesn't look at, by the names of inputs: replace_with, keep, keep_everyday, dark."""
    predictions: int = 3
    """For the memory estimate: predictions with gradient that a training step holds at most, for each picture of its batch."""
    keeps: Callable[[Any, TrainableModel], int] | None = None
    """Likewise, of settings and model: bytes that a step keeps in float32 of what is no prediction."""
    rank_each: bool = False
    """Likewise: whether the rank is that of each concept."""
    precise: bool = False
    """Likewise: whether it may call :meth:`TrainableModel.precise`, which takes the memory of float32."""
    version: int = 1
    """Counts changes of what it does at the same settings: figures of two versions don't compare."""

    def ignores(self, spec: ConceptSpec, aids: Aids) -> tuple[str, ...]:
        """The inputs that were filled in and that the method doesn't look at."""
        given = {
            "replace_with": any(concept.to for concept in spec.erase),
            "keep": bool(spec.keep),
            "keep_everyday": spec.everyday,
            "dark": bool(aids.dark),
            "pairs": aids.pairs is not None,
            "judge": bool(aids.looks),
        }
        read = {"pairs": self.needs_pairs, "judge": self.asks_judge}
        return tuple(name for name, filled in given.items() if filled and not read.get(name, name not in self.unread))


def setting(
    default: Any, help: str, *, low: float | None = None, high: float | None = None, step: float | None = None
) -> Any:
    """A settings field with the range and the tooltip that nodes show. Enum fields need no range."""
    return dataclasses.field(default=default, metadata={"help": help, "low": low, "high": high, "step": step})


@cache
def all_methods() -> Mapping[str, MethodSpec]:
    """All methods by name, in alphabetical order."""
    package = importlib.import_module(__package__ or "")
    found: dict[str, MethodSpec] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        spec = getattr(importlib.import_module(f"{__package__}.{info.name}"), "SPEC", None)
        if spec is not None:
            if spec.name in found:
                raise ValueError(f"two methods are named {spec.name!r}")
            found[spec.name] = spec
    return found


def typed(text: str, default: Any) -> Any:
    """A setting that somebody wrote, of the type of its default; a choice by its value or its name.

    Raises:
        ValueError: it is no such thing.
    """
    if isinstance(default, bool):
        if text.lower() not in _WORDS:
            raise ValueError(f"{text!r} is neither yes nor no")
        return _WORDS[text.lower()]
    if isinstance(default, Enum):
        kind = type(default)
        return kind.__members__.get(text.upper()) or kind(text)
    return type(default)(text)


_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


class Configured(Protocol):
    """Whatever has settings made by :func:`setting`: methods, attacks."""

    @property
    def title(self) -> str: ...
    @property
    def settings(self) -> type: ...


def settings_from(spec: Configured, values: Mapping[str, Any]) -> Any:
    """Settings of ``spec`` with some values replaced, types and ranges checked. A choice may be given by its text.

    Raises:
        ValueError: an unknown name, a value of the wrong kind or out of its range, named in the message.
    """
    fields = {f.name: f for f in dataclasses.fields(spec.settings)}
    checked = {}
    for name, value in values.items():
        if name not in fields:
            raise ValueError(f"{spec.title}: no setting {name!r}; there are {', '.join(fields)}")
        value = checked[name] = _of_kind(fields[name].default, value, f"{spec.title}: {name}")
        low, high = fields[name].metadata["low"], fields[name].metadata["high"]
        if (low is not None and value < low) or (high is not None and value > high):
            raise ValueError(f"{spec.title}: {name} = {value} is outside {low} to {high}")
    return dataclasses.replace(spec.settings(), **checked)


def _of_kind(default: Any, value: Any, what: str) -> Any:
    """``value`` as the type of ``default``: methods compare enum members by identity."""
    if isinstance(default, Enum):
        try:
            return type(default)(value)
        except ValueError:
            choices = ", ".join(repr(m.value) for m in type(default))
            raise ValueError(f"{what} = {value!r} is none of {choices}") from None
    if isinstance(default, str):
        if isinstance(value, str):
            return value
        raise ValueError(f"{what} = {value!r} must be a text")
    if isinstance(default, bool):
        if isinstance(value, bool):
            return value
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        if isinstance(default, float):
            return float(value)
        if value == int(value):
            return int(value)
    raise ValueError(
        f"{what} = {value!r} must be a {'yes or no' if isinstance(default, bool) else 'number'}"
        f"{' without a fraction' if isinstance(default, int) and not isinstance(default, bool) else ''}"
    )
