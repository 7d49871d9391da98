"""What is written beside an erasure: what was asked, what was counted, and what was tried to bring it back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .metrics.rates import Rate


@dataclass(frozen=True)
class JudgedBy:
    """Who counted. The same judge at another threshold is another judge."""

    name: str
    version: str
    threshold: float


@dataclass(frozen=True)
class AttackRecord:
    """One attack as it was run: its budget, and what it brought back, next to plain asking at the same noises."""

    attack: str
    """Its name in the registry of attacks."""
    title: str
    concept: str
    budget: Mapping[str, Any]
    """All its settings, plain values."""
    prompts: tuple[str, ...]
    """What was attacked."""
    judge: JudgedBy
    asking: Rate
    """Pictures of the prompts as they are that show the concept."""
    attacked: Rate
    """Pictures of what the attack found that show it."""
    found: str
    """The best way that it found, in words."""
    queries: int
    """Pictures that a black-box attack asked the erased model for."""
    seed: int
    base: str
    """Fingerprint of the weights that read the text, of the model before the erasure."""
    erased: str
    """The same of the model under attack: it tells which erasure, at which strength, was attacked."""
