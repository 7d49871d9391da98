"""Free embedding: the whole conditioning is the variable, the upper bound of everything that goes in as text.

    min over C in R^{L x D} of E || target - net(x_t, t, C) ||^2,   x from pictures of the concept

on the erased model: the textual-inversion objective of Concept Inversion (arXiv:2308.01508) without the text encoder, as
Dark Miner's mining (arXiv:2409.17682) and the learned embeddings of M-ErasureBench do it. If no C brings the concept
back, no prompt does, as far as this search goes.

Choices of ours: the start is the concept's own states in the erased model; Adam, its rate falling to zero along a cosine;
each step has one time from every ``batch``-th part of the schedule; with a judge, the conditioning is looked at ten times
along the way and the best one is handed over.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept import ConceptSpec
from ..operators.search import denoising_loss
from ..operators.train_loop import Optimiser, Phase, cosine, generator_for
from .drawing import Eye, Progress, part, pictures_of
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way

_LOOKS = 10


@dataclass(frozen=True)
class Settings:
    steps: int = setting(
        1000, "Search steps for each start. More find more, and take longer.", low=1, high=100000, step=50
    )
    learning_rate: float = setting(1e-2, "Size of a search step.", low=1e-6, high=10.0, step=1e-3)
    batch: int = setting(4, "Pictures per search step.", low=1, high=64, step=1)
    pictures: int = setting(25, "Pictures of the concept that are learned from.", low=1, high=1000, step=1)
    starts: int = setting(1, "Prompts whose states a search starts from.", low=1, high=100, step=1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One conditioning for each start."""
    prompts = target.prompts[: settings.starts]
    total, parts = len(prompts) * settings.steps, torch.arange(settings.batch)
    pool = pictures_of(
        target, target.prompts, settings.pictures, settings.seed, "free embedding", lambda *_: progress(0, total)
    )
    ways, losses = [], []
    with target.erased.trainable() as model:
        null = target.erased.conditions([""])[0]
        for number, (prompt, start) in enumerate(zip(prompts, target.erased.conditions(prompts), strict=True)):
            step = part(progress, number, len(prompts))
            value = start.context.detach().to(model.device, model.dtype).clone().requires_grad_()

            def loss(_: int, generator: torch.Generator, value: Tensor = value) -> dict[str, Tensor]:
                t = (
                    (parts + torch.rand(settings.batch, generator=generator)) / settings.batch * len(model.schedule)
                ).long()
                cond, batch = null.with_context(value), settings.batch
                return {"fit": denoising_loss(model, pool, cond, generator, batch=batch, memory=target.memory, t=t)}

            phase = Phase(f"free {number}", [value], loss, Optimiser(settings.learning_rate), cosine(settings.steps))
            eye = Eye(target, model, settings.seed, f"free look {number}") if target.look else None
            best, best_score = value.detach().clone(), -1.0
            for i in range(settings.steps):
                step(i, settings.steps)
                made = phase.step(i, generator_for(settings.seed, phase.name, i))
                losses.append(made[f"{phase.name}/fit"])
                if (i + 1) % max(1, settings.steps // _LOOKS) == 0 or i + 1 == settings.steps:
                    score = eye(null.with_context(value.detach())) if eye else 0.0
                    if eye is None or score > best_score:
                        best, best_score = value.detach().clone(), score
            step(settings.steps, settings.steps)
            ways.append(Way(f"free embedding from {prompt!r}", states=best[0].cpu()))
    return Found(tuple(ways), tuple(torch.stack(losses).tolist()))


SPEC = AttackSpec(
    name="free_embedding",
    title="Free Embedding",
    summary="Searches over everything that the network could read in place of a text: an upper bound for prompts.",
    paper="https://arxiv.org/abs/2409.17682",
    knowledge=Knowledge.WHITE_BOX,
    settings=Settings,
    run=run,
    budget="steps",
)
