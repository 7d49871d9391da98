"""LECO (p1atdev/LECO; METHODS 2.7): ESD's target learned in a LoRA, from prompts alone.

    || eps_theta(z, c) - ( eps_0(neutral) - eta (eps_0(c) - eps_0(unconditional)) ) ||^2,   eta = 1

z is sampled by the network with the LoRA on, guidance 3, 1..49 of 50 steps. LoRA of rank 4 and alpha 1, AdamW 1e-4, 500
steps. The neutral prompt is the replacement, empty where there is none.

Departures: linear layers of transformer blocks only (the authors' ``lierla``; ``c3lier`` adds convolutions); one resolution;
kept words are held at the same latents.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..operators.changes import Layers, LoRA
from ..operators.regress import TargetTerm, shifted
from ..operators.train_loop import Kind
from ..operators.trainable import TrainablePort
from ._training import AWAY, ERASE, NULL, RANK, RATE, STEPS, TO, TrainSettings, train_regression
from .registry import Aids, MethodSpec, Progress, setting


@dataclass(frozen=True)
class Settings(TrainSettings):
    iterations: int = setting(500, STEPS, low=1, high=100000, step=10)
    learning_rate: float = setting(1e-4, RATE, low=1e-8, high=1.0, step=1e-5)
    layers: Layers = setting(Layers.ALL, "Which layers are changed.")
    rank: int = setting(4, RANK, low=1, high=512, step=1)
    alpha: float = setting(
        1.0,
        "Higher learns faster: the concept goes in fewer steps, pictures may break.",
        low=1e-3,
        high=512.0,
        step=0.5,
    )
    negative_guidance: float = setting(1.0, AWAY, low=0.0, high=20.0, step=0.5)


def target(eta: float) -> TargetTerm:
    """The loss term."""
    return TargetTerm("erase", ERASE, shifted(TO, -eta, ERASE, NULL))


def run(port: TrainablePort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with LECO. One sampler run and up to four network passes a step."""
    return train_regression(
        port, spec, settings, progress, aids, method="leco", terms=[target(settings.negative_guidance)], optimiser=Kind.ADAMW,
        weight_decay=0.01, what=LoRA(settings.layers, settings.rank, settings.alpha),
    )  # fmt: skip


SPEC = MethodSpec(
    name="leco",
    title="LECO",
    summary="ESD's aim learned in a small LoRA, as the community's slider trainers do it: firm, small file.",
    paper="https://github.com/p1atdev/LECO",
    settings=Settings,
    run=run,
    trains=True,
)
