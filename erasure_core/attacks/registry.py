"""The one list of attacks. Nodes, command line, docs and contract tests enumerate it.

An attack is one file in this package that ends with ``SPEC = AttackSpec(...)``; it is found by being there.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from typing import Any, Protocol

import torch

from ..concept import ConceptSpec
from ..methods.registry import setting, settings_from
from .drawing import Progress
from .target import AttackTarget, Found

__all__ = ["AttackSpec", "Knowledge", "Progress", "all_attacks", "attack", "setting"]


class Knowledge(StrEnum):
    """What an attacker must have."""

    WHITE_BOX = "white-box"
    """The erased model's weights."""
    BLACK_BOX = "black-box"
    """The erased model's pictures."""
    TEXT_ONLY = "text-only"
    """The text encoder; the erased model is never asked."""


class Run(Protocol):
    def __call__(self, target: AttackTarget, spec: ConceptSpec, settings: Any, progress: Progress) -> Found: ...


@dataclass(frozen=True)
class AttackSpec:
    """One attack: how it is named, cited, configured and run."""

    name: str
    """Identifier, lower case. Never changes."""
    title: str
    summary: str
    """One sentence for a tooltip: what it searches, and what finding something means."""
    paper: str
    knowledge: Knowledge
    settings: type
    """A frozen dataclass; each field made by :func:`setting`."""
    run: Run
    budget: str
    """The setting that bounds its work, in proportion."""
    needs_words: bool = False
    """Whether it writes prompts: the target must have ``words``."""
    needs_look: bool = False
    quick: bool = False
    """Whether its whole budget costs what drawing some dozens of pictures does, so that there is no reason to cut it."""
    version: int = 1
    """Counts changes of what it finds at the same settings: figures of two versions don't compare."""
    given: bool = False
    """It begins with a picture of the concept, so success says that the model can draw it, not that it would."""
    teaches: bool = False
    """It learns from pictures of the concept and can bring up what the model never learned: success need not mean that an
    erasure left something."""


@cache
def all_attacks() -> Mapping[str, AttackSpec]:
    """All attacks by name, in alphabetical order."""
    package = importlib.import_module(__package__ or "")
    found: dict[str, AttackSpec] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda m: m.name):
        spec = getattr(importlib.import_module(f"{__package__}.{info.name}"), "SPEC", None)
        if spec is not None:
            if spec.name in found:
                raise ValueError(f"two attacks are named {spec.name!r}")
            found[spec.name] = spec
    return found


def attack(
    target: AttackTarget,
    spec: ConceptSpec,
    name: str,
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Found:
    """Look for ways to make the erased model draw ``spec.erase`` again. Neither model is changed.

    Args:
        target: the models, the prompts to attack, and what else the attacker has.
        spec: what was erased and what was kept.
        name: a name from :func:`all_attacks`.
        settings: settings of the attack that differ from its paper's.
        progress: called as progress(done, total); may raise to cancel.

    Raises:
        ValueError: an unknown attack or setting, something that the attack needs and the target doesn't have, or a text
            side that isn't the model's.
    """
    known = all_attacks()
    if name not in known:
        raise ValueError(f"attack: {name!r} is unknown; there are {', '.join(known)}")
    chosen = known[name]
    if chosen.needs_words:
        if target.words is None:
            raise ValueError(
                f"attack: {chosen.title} writes prompts and needs the model's text encoder. Connect the CLIP"
            )
        _check_words(target)
    if chosen.needs_look and target.look is None:
        raise ValueError(f"attack: {chosen.title} learns from a judge's answers. Connect a judge")
    with torch.no_grad():
        return chosen.run(target, spec, settings_from(chosen, settings or {}), progress or (lambda done, total: None))


def _check_words(target: AttackTarget) -> None:
    """What is optimised must be what the model reads."""
    assert target.words is not None
    prompt = target.prompts[0]
    own = target.erased.conditions([prompt])[0].context[0]
    made = target.words.states(target.words.tokenize([prompt]))[0].to(own)
    if made.shape != own.shape or float((made - own).norm()) > 0.02 * float(own.norm()):
        raise ValueError(
            "attack: the text encoder gives other text states than the model reads (clip skip, other weights, a LoRA on the "
            "CLIP?). Connect the CLIP that the erased model is used with"
        )
