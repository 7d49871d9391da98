"""How each method is run on the demo model, where that differs from its defaults.

Defaults are the papers', made for Stable Diffusion. EmojiCanvas is eighty times smaller, so trained methods take larger and
fewer steps here, and look at pictures that are drawn in fewer steps. Chosen on the tuning split.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..presets import PRESETS

_QUICK = {"sample_steps": 12, "batch": 4}
TESTBED: dict[str, Mapping[str, Any]] = {
    "adversarial": PRESETS["thorough"].small,
    # All 77 rows of the empty prompt would leave few free directions in a text width of 128.
    "speed": {"empty_prompt": "bos and 3 centres", "threshold": 1e-3, "retain_scale": 3e-4},
    "esd": {**_QUICK, "iterations": 60, "learning_rate": 1e-3},
    "leco": {**_QUICK, "iterations": 60, "learning_rate": 5e-3},
    "sdd": {**_QUICK, "iterations": 60, "learning_rate": 1e-3, "average": 0.95},
    "spm": {**_QUICK, "iterations": 150, "learning_rate": 1e-2, "warmup": 10, "anchors": 2, "anchor_weight": 10.0},
    "concept_ablation": {**_QUICK, "iterations": 100, "learning_rate": 1e-3, "pictures": 16, "batch": 8},
    # The concept is in the rows behind the words, where every prompt ends: those are steered too, and kept words held hard.
    "forget_me_not": {
        **_QUICK,
        "iterations": 150,
        "learning_rate": 2e-3,
        "keep_weight": 100.0,
        "end_tokens": True,
    },
    "eap": {**_QUICK, "iterations": 40, "learning_rate": 1e-3, "space": "eps"},
    "kpop": {**_QUICK, "iterations": 100, "learning_rate": 1e-3, "memory_rate": 1e-2},
    "duo": {"iterations": 80, "beta": 50.0, "base_learning_rate": 4e-4, "base_prior_weight": 100.0, "batch": 12},
    "cpe": {"stages": 2, "iterations": 200, "attack_steps": 200},
    "dark_miner": {
        **_QUICK,
        "rounds": 4,
        "mine_steps": 60,
        "mine_rate": 0.03,
        "iterations": 60,
        "learning_rate": 2e-3,
        "batch": 8,
    },
}
