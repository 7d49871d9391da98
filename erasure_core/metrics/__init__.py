"""Figures about pictures and weights; nothing in here knows of erasure methods or attacks."""

from .distances import clip_score, frechet_distance, kernel_distance, pairwise_error, perceptual_distance
from .judge_error import Corrected, JudgeError, corrected
from .rates import Rate, pooled, rate
from .scores import (
    AttackSuccess,
    Unlearning,
    attack_success,
    curve,
    curve_hits,
    harmonic_mean,
    mace_harmonic,
    unlearning,
)
from .weights import text_measures, total_drift, weight_changes

__all__ = [
    "AttackSuccess",
    "Corrected",
    "JudgeError",
    "Rate",
    "Unlearning",
    "attack_success",
    "clip_score",
    "corrected",
    "curve",
    "curve_hits",
    "frechet_distance",
    "harmonic_mean",
    "kernel_distance",
    "mace_harmonic",
    "pairwise_error",
    "perceptual_distance",
    "pooled",
    "rate",
    "text_measures",
    "total_drift",
    "unlearning",
    "weight_changes",
]
