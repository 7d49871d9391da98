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
from ..operators.search import denoising_loss, search
from ..operators.train_loop import cosine
from ..operators.trainable import Cond, TrainableModel
from .drawing import Eye, Progress, part, pictures_of
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way

_LOOKS = 10


@dataclass(frozen=True)
class Settings:
    steps: int = setting(
        1000, "Search steps for each start. More find more, and take longer.", low=1, high=100000, step=50
    )
    learning_rate: float = setting(
        0.02, "Size of a search step, in deviations of the states that it starts from.", low=1e-6, high=10.0, step=1e-3
    )
    batch: int = setting(4, "Pictures per search step.", low=1, high=64, step=1)
    pictures: int = setting(25, "Pictures of the concept that are learned from.", low=1, high=1000, step=1)
    starts: int = setting(1, "Prompts whose states a search starts from.", low=1, high=100, step=1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One conditioning for each start."""
    prompts = target.prompts[: settings.starts]
    total = len(prompts) * settings.steps
    pool = pictures_of(
        target, target.prompts, settings.pictures, settings.seed, "free embedding", lambda *_: progress(0, total)
    )
    ways: list[Way] = []
    losses: list[float] = []
    with target.erased.trainable() as model:
        null = target.erased.conditions([""])[0]  # whose pooled text finds are drawn with
        for number, (prompt, asked) in enumerate(zip(prompts, target.erased.conditions(prompts), strict=True)):
            step, start = part(progress, number, len(prompts)), null.with_context(asked.context)
            states, path = best_states(model, target, pool, start, settings, number, step)
            losses += path
            ways.append(Way(f"free embedding from {prompt!r}", states=states.cpu(), attacks=(prompt,)))
    progress(total, total)
    return Found(tuple(ways), tuple(losses))


def best_states(
    model: TrainableModel, target: AttackTarget, pool: Tensor, start: Cond, settings: Settings, number: int, progress: Progress
) -> tuple[Tensor, tuple[float, ...]]:  # fmt: skip
    """The states [L, D] that a judge likes best (without one: the last), and the objective along the way."""
    parts, eye = torch.arange(settings.batch), None
    best: dict[float, Tensor] = {}
    if target.look is not None:
        eye = Eye(target, model, settings.seed, f"free look {number}")

    def objective(value: Tensor, generator: torch.Generator) -> Tensor:
        t = (parts + torch.rand(settings.batch, generator=generator)) / settings.batch * len(model.schedule)
        cond = start.with_context(value)
        return denoising_loss(model, pool, cond, generator, batch=settings.batch, memory=target.memory, t=t.long())

    def seen(value: Tensor, _done: int, _loss: float) -> None:
        if eye is not None:
            score = eye(start.with_context(value)).score
            if not best or score > max(best):
                best[score] = value.clone()
        else:
            target.show(start.with_context(value.clone()))

    found = search(
        start.context.to(model.device, model.dtype), objective, steps=settings.steps,
        lr=settings.learning_rate * float(start.context.std()), rate=cosine(settings.steps), seed=settings.seed,
        name=f"free {number}", every=max(1, settings.steps // _LOOKS), progress=progress, seen=seen,
    )  # fmt: skip
    return (best[max(best)] if best else found.value)[0], found.losses


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
