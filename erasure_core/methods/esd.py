"""ESD, Erasing Concepts (Gandikota et al., ICCV 2023, arXiv:2303.07345; METHODS 2.6).

Distils negative guidance into the weights:

    2023 code:  || eps_theta(z, c_e)    - ( eps_null - eta (eps_e - eps_null) ) ||^2,   eta = 1
    2025 code:  || eps_theta(z, c_from) - ( eps_from - eta (eps_e - eps_null) ) ||^2,   eta = 2

right-hand sides by the frozen network. With from = e, the 2025 form at eta is the 2023 form at eta - 1.

The 2023 code samples z with the student and stops with k of 50 steps to go; the 2025 code samples with the frozen network,
k steps done. ``erase_from`` removes a concept only inside another one (2025).

Departures: a replacement takes the place of the empty prompt as the base of the target (as LECO's neutral prompt does);
kept words are held at the same latents (the paper has no such term); only linear layers of transformer blocks are trained,
so ESD-u leaves convolutions and the time embedding alone; of several words each step draws anew; the latent lies at exactly the
time that is trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..operators.changes import Layers
from ..operators.regress import TargetTerm, shifted
from ..operators.trainable import TrainablePort, Weights
from ..schedule import progress_of_steps_remaining
from ._training import AWAY, ERASE, NULL, TO, TrainSettings, draw_progress, train_regression
from .registry import Aids, MethodSpec, Progress, setting

FROM = "from"


class Form(StrEnum):
    CODE_2025 = "2025"
    CODE_2023 = "2023"


@dataclass(frozen=True)
class Settings(TrainSettings):
    learning_rate: float = setting(
        5e-5, "Size of a training step; the 2023 code uses 1e-5.", low=1e-8, high=1.0, step=1e-6
    )
    layers: Layers = setting(Layers.CROSS, "Which layers are changed: cross-attention is ESD-x, for what words name; all but "
        "cross-attention is ESD-u, for what shows unnamed; text keys and values is ESD-x-strict.")  # fmt: skip
    form: Form = setting(
        Form.CODE_2025,
        "Which of the authors' two programs is followed. That of 2023 goes with "
        "negative_guidance 1, learning_rate 1e-5 and 1000 iterations, which are not set by this.",
    )
    negative_guidance: float = setting(2.0, f"{AWAY} 2 in the 2025 form is 1 in the 2023 form.",
        low=0.0, high=20.0, step=0.5)  # fmt: skip
    erase_from: str = setting("", "Erase it only in pictures of this, for example the hat only on a man. 2025 form.")


def target(form: Form, eta: float, *, erase_from: bool = False, replaced: bool = False) -> TargetTerm:
    """The loss term; ``replaced`` bases it on the replacement's prediction."""
    if form is Form.CODE_2023:
        base = TO if replaced else NULL
        return TargetTerm("erase", ERASE, shifted(base, -eta, ERASE, NULL))
    if replaced and erase_from:  # what it is erased from, with the replacement in the place of the concept
        return TargetTerm("erase", FROM, {FROM: 1.0, TO: 1.0, NULL: eta - 1, ERASE: -eta})
    if replaced:  # the 2025 form with from = e, written as the 2023 one, where the base can be exchanged
        return TargetTerm("erase", ERASE, shifted(TO, 1 - eta, ERASE, NULL))
    read = FROM if erase_from else ERASE
    return TargetTerm("erase", read, shifted(read, -eta, ERASE, NULL))


def draw_2023(steps: int, generator: torch.Generator) -> float:
    """k ~ U{0..N-1} steps to go, then a time inside that step's share."""
    k = int(torch.randint(0, steps, (), generator=generator))
    return progress_of_steps_remaining(k, steps, float(torch.rand((), generator=generator)))


def draw_2025(steps: int, generator: torch.Generator) -> float:
    """k ~ U{0..N-1} steps done."""
    return draw_progress(steps, generator, first=0)


def run(
    port: TrainablePort,
    spec: ConceptSpec,
    settings: Settings,
    progress: Progress,
    aids: Aids,
) -> Erasure:
    """Erase with ESD. One sampler run and up to five network passes a step.

    Raises:
        ValueError: the 2023 form is asked to erase from something.
    """
    erase_from = settings.erase_from.strip()
    old = settings.form is Form.CODE_2023
    if old and erase_from:
        raise ValueError("erase_from: the 2023 form can't do that. Choose the form 2025, or leave it empty")
    replaced = any(concept.to for concept in spec.erase)
    return train_regression(
        port,
        spec,
        settings,
        progress,
        aids,
        method="esd",
        terms=[target(settings.form, settings.negative_guidance, erase_from=bool(erase_from), replaced=replaced)],
        extra={FROM: port.conditions([erase_from])[0]} if erase_from else None,
        sampled_by=Weights.STUDENT if old else Weights.FROZEN,
        sampled_prompt=FROM if erase_from else ERASE,
        draw=draw_2023 if old else draw_2025,
    )


SPEC = MethodSpec(
    name="esd",
    title="ESD",
    summary="Trains away from the concept by its own negative guidance: firm on the words and near them, minutes.",
    paper="https://arxiv.org/abs/2303.07345",
    settings=Settings,
    run=run,
    trains=True,
)
