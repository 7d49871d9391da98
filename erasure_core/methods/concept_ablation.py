"""Concept Ablation (Kumari et al., ICCV 2023, arXiv:2303.13516; METHODS 1.2 and 2.35), the model-based variant.

    || eps_theta(x_t, c) - sg eps_theta(x_t, c_anchor) ||^2

on noised pictures of the anchor, at any time: the concept's prompt comes to mean the anchor's pictures.

Unverified: the authors' code was not read (METHODS 10); the target by the student itself follows a re-implementation, and
iterations and rate are ours. Departures: the anchor is the replacement, the empty prompt where there is none; its pictures are
sampled by the frozen network unless they are given; no augmentation; the concept's word alone, where the authors have 200
prompts, and whatever of cross-attention ``layers`` say, where they have keys and values; kept words are held at the same
latents.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..devices import moved
from ..operators.cond import Cond
from ..operators.regress import TargetTerm, keep_term, regress
from ..operators.train_loop import Optimiser, Phase, Trainer
from ..operators.trainable import TrainablePort, Weights
from ._training import ERASE, KEEP, STEPS, TO, Prompts, TrainSettings, draw_pictures, erasure_of, kept, steps_of
from .registry import Aids, MethodSpec, Progress, setting


@dataclass(frozen=True)
class Settings(TrainSettings):
    iterations: int = setting(400, STEPS, low=1, high=100000, step=10)
    pictures: int = setting(64, "Anchor pictures of each concept drawn before training.", low=1, high=10000, step=8)


def target() -> TargetTerm:
    """The loss term."""
    return TargetTerm("erase", ERASE, {TO: 1.0}, reference=Weights.STUDENT)


def run(
    port: TrainablePort,
    spec: ConceptSpec,
    settings: Settings,
    progress: Progress,
    aids: Aids,
    *,
    anchors: Tensor | None = None,
) -> Erasure:
    """Erase with Concept Ablation. ``anchors`` [N, C, h, w]: clean latents, row i of number i of ``Prompts.pairs``, in turn."""
    prompts, steps = Prompts(port, spec, aids.owned), steps_of(settings, spec)
    terms = [target(), *([keep_term(KEEP, settings.keep_weight)] if prompts.keep and settings.keep_weight else [])]
    with port.trainable() as model:
        if anchors is None:
            shown = [prompts[to] for _, to in prompts.pairs]
            anchors = draw_pictures(
                model, shown, prompts.null, settings.pictures * len(spec.erase), settings, aids.before(progress, steps)
            )
        pool = anchors.to(model.device, model.dtype)

        def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
            chosen = torch.randint(0, len(pool), (settings.batch,), generator=generator)
            pairs = [prompts.pairs[i % len(prompts.pairs)] for i in chosen.tolist()]
            conds = {
                **prompts.draw(settings.batch, generator),
                ERASE: Cond.cat([prompts[word] for word, _ in pairs]),
                TO: Cond.cat([prompts[to] for _, to in pairs]),
            }
            t = torch.randint(0, len(model.schedule), (settings.batch,), generator=generator)
            z = model.schedule.add_noise(pool[moved(chosen, pool.device)], model.noise(settings.batch, generator), t)
            return regress(model, terms, z, t, conds)

        parameters = model.train(settings.parameters(), settings.seed)
        phase = Phase("ablate", parameters, loss, Optimiser(settings.learning_rate))
        Trainer(model, [phase], steps, seed=settings.seed).run(
            progress, aids.watch, checkpoint=kept(aids, port, model, spec, "concept_ablation", settings)
        )
        return erasure_of(port, spec, "concept_ablation", settings, model.deltas(energy=settings.energy))


SPEC = MethodSpec(
    name="concept_ablation",
    title="Concept Ablation",
    summary="Trains the concept's prompt to mean the replacement's pictures: natural results where a "
    "replacement is named.",
    paper="https://arxiv.org/abs/2303.13516",
    settings=Settings,
    run=run,
    trains=True,
)
