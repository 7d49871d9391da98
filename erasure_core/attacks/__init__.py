"""Attacks on erased models, one file each. See registry.py for how they are found, evaluate.py for how they are counted."""

from .evaluate import Result, evaluate, shortlist, success
from .registry import AttackSpec, Knowledge, all_attacks, attack
from .target import AttackTarget, Found, Sampler, Way, asking
from .words import Words

__all__ = [
    "AttackSpec",
    "AttackTarget",
    "Found",
    "Knowledge",
    "Result",
    "Sampler",
    "Way",
    "Words",
    "all_attacks",
    "asking",
    "attack",
    "evaluate",
    "shortlist",
    "success",
]
