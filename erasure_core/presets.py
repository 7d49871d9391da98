"""The qualities of Erase Concept: a method and settings for people who don't want to choose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    method: str
    summary: str
    settings: Mapping[str, Any] = field(default_factory=dict)


PRESETS: dict[str, Preset] = {
    "fast": Preset("uce", "the named words only, with the least side effects (UCE)."),
    "balanced": Preset("rece", "also reaches words that you did not name (RECE)."),
}
