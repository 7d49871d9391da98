"""The qualities of Erase Concept: a method and settings for people who don't want to choose.

*fast* and *balanced* were chosen by what they do on the testbed (docs/results/effect.md), *thorough* by what attacks do to it
(docs/results/leaderboard.md). Its settings for large models are a guess: smaller and fewer steps than the testbed's, because
they are wider and each step costs more.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .methods import all_methods
from .port import Family


@dataclass(frozen=True)
class Preset:
    method: str
    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    small: dict[str, Any] = field(default_factory=dict)
    """On the demo model, which is some eighty times smaller than SD 1.5: larger and fewer steps."""

    def on(self, family: Family, seed: int = 0) -> tuple[str, Mapping[str, Any]]:
        """(method, settings) for a model; ``seed`` where the method draws anything."""
        settings = self.small or self.settings if family.name == "emojicanvas" else self.settings
        draws = any(f.name == "seed" for f in fields(all_methods()[self.method].settings))
        return self.method, settings | {"seed": seed} if draws else settings


PRESETS: dict[str, Preset] = {
    "fast": Preset("uce", "the named words only, with the least side effects, in a second (UCE)."),
    "balanced": Preset(
        "rece",
        "also erases embeddings that would bring the words back, in seconds (RECE); changes a little more. On the demo model a "
        "search gets around it as it does around fast.",
    ),
    "thorough": Preset(
        "adversarial",
        "trains against embeddings that search all the time for what still brings the concept back (Adversarial): minutes a "
        "concept on the demo model, far longer on large ones. A long search over embeddings still finds most of it there.",
        {"iterations": 500, "learning_rate": 4e-4, "population": 4, "batch": 4},
        {"iterations": 700, "learning_rate": 2e-3, "sample_steps": 12},
    ),
}
