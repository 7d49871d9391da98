"""SDD, Safe self-Distillation Diffusion (Kim et al., arXiv:2307.05977; METHODS 2.9).

    || sg eps_theta(z, null) - eps_theta(z, c) ||^2

The target is the student's own unconditional prediction; a running average of the student (0.999 a step) samples z, for all
concepts joined into one prompt, and is what is saved. Cross-attention, AdamW 1e-5, weight decay 1e-4, 1500 steps, guidance
3; each step draws one of the concepts for the loss (the authors cycle through them, "iterative").

Departures: a replacement takes the place of the empty prompt in the target; a chain always stops where it is trained (the
authors' ``until=0`` runs it to its end), at exactly that time (theirs is any in the window behind); the README and the code of
the authors swap which of the joined and the single prompt is sampled: here the joined one, as in the code; weight decay acts
on the change, not on the weights, since the base is never touched; kept words are held at the same latents.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..operators.regress import TargetTerm
from ..operators.train_loop import Kind
from ..operators.trainable import TrainablePort, Weights
from ._training import ERASE, STEPS, TO, TrainSettings, train_regression
from .registry import Aids, MethodSpec, Progress, setting

JOINED = "joined"


@dataclass(frozen=True)
class Settings(TrainSettings):
    iterations: int = setting(1500, STEPS, low=1, high=100000, step=10)
    average: float = setting(0.999, "Share of the running average that a step keeps.", low=0.0, high=1.0, step=0.001)


def target() -> TargetTerm:
    """The loss term."""
    return TargetTerm("erase", ERASE, {TO: 1.0}, reference=Weights.STUDENT)


def run(port: TrainablePort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with SDD. One sampler run and two or three network passes a step."""
    joined = port.conditions([", ".join(word for concept in spec.erase for word in concept.words)])[0]
    return train_regression(
        port, spec, settings, progress, aids, method="sdd", terms=[target()], extra={JOINED: joined}, sampled_prompt=JOINED,
        sampled_by=Weights.AVERAGE, average=settings.average, optimiser=Kind.ADAMW, weight_decay=1e-4,
    )  # fmt: skip


SPEC = MethodSpec(
    name="sdd",
    title="SDD",
    summary="Trains the concept's prompt to draw what an empty prompt draws, and keeps a running average: "
    "slow to take hold.",
    paper="https://arxiv.org/abs/2307.05977",
    settings=Settings,
    run=run,
    trains=True,
)
