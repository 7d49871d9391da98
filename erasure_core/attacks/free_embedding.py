"""Free embedding: the whole conditioning is the variable, more than anything that goes in as text.

    min over C in R^{L x D} of E || target - net(x_t, t, C) ||^2,   x from pictures of the concept

on the erased model: the textual-inversion objective of Concept Inversion (arXiv:2308.01508) without the text encoder, as
Dark Miner's mining (arXiv:2409.17682) and the learned embeddings of M-ErasureBench do it. If no C brings the concept
back, no prompt does, as far as this search goes. The reverse does not hold: textual inversion was made to teach a model what
is new to it, and with enough steps a free conditioning draws what the model never learned (docs/results/never_learned.md).

Choices of ours: the first search starts from the concept's own states in the erased model. An eraser moves just those, and
what it leaves of the concept may lie in another direction, so the second starts from the empty prompt's; further ones from
the other prompts and then from near the empty prompt. Adam, its rate falling to zero along a cosine; each step has one time
from every ``batch``-th part of the schedule. With a judge a search hands over the best that was looked at (watched.py), and
none follows one that left no doubt. All prompts' pictures are learned from, so a find stands in the place of each.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from ..concept import ConceptSpec
from ..operators.cond import Cond
from ..operators.search import denoising_loss, free
from ..operators.train_loop import Optimiser, cosine, generator_for
from ..schedule import spread
from .drawing import Progress, part, pictures_of_each
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .watched import search_watched, teachers


@dataclass(frozen=True)
class Settings:
    steps: int = setting(
        1000, "Search steps for each start. More find more, and take longer.", low=1, high=100000, step=50
    )
    learning_rate: float = setting(
        0.02, "Size of a search step, in deviations of the states that it starts from.", low=1e-6, high=10.0, step=1e-3
    )
    batch: int = setting(4, "Pictures per search step.", low=1, high=64, step=1)
    pictures: int = setting(
        25, "Pictures of the concept that are learned from, shared among the prompts.", low=1, high=1000, step=1
    )
    starts: int = setting(
        2,
        "Searches: from the first prompt, from the empty one, from the other prompts, then from near the empty one.",
        low=1,
        high=100,
        step=1,
    )
    teacher: bool = setting(
        False, "Learn from what the base model predicts for the prompts in place of the noise; takes fewer steps."
    )
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def starts_of(target: AttackTarget, null: Cond, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Names and states [1, L, D] of what searches start from, without end."""
    prompts = [
        (repr(p), c.context) for p, c in zip(target.prompts, target.erased.conditions(target.prompts), strict=True)
    ]
    yield prompts[0]
    yield "the empty prompt", null.context
    yield from prompts[1:]
    near, generator = free(null), generator_for(seed, "free starts", 0)
    while True:
        yield "near the empty prompt", near.read(near.start(generator)).context


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One conditioning for each search, up to the first that leaves no doubt."""
    total, count = settings.starts * settings.steps, len(target.prompts)
    pools = pictures_of_each(
        target,
        target.prompts,
        -(-settings.pictures // count),
        settings.seed,
        "free embedding",
        lambda *_: progress(0, total),
    )
    null = target.erased.conditions([""])[0]  # whose pooled text finds are drawn with
    away, begins = target.away(), list(islice(starts_of(target, null, settings.seed), settings.starts))
    ways: list[Way] = []
    losses: list[Tensor] = []
    asked = 0
    # The one with gradients last: how much room is left then decides whether it keeps its activations.
    with teachers(target, settings.teacher) as teacher, target.erased.trainable() as model:

        def loss(states: Tensor, generator: torch.Generator) -> Tensor:
            number = int(torch.randint(0, count, (), generator=generator))
            t = model.schedule.indices(spread(settings.batch, generator))
            return denoising_loss(
                model, pools[number], null.with_context(states), generator, batch=settings.batch,
                memory=target.memory, t=t, teacher=teacher(number), away=away,
            )  # fmt: skip

        for number, (name, start) in enumerate(begins):
            kept = search_watched(
                model, target, start.to(model.device, model.dtype), loss, null.with_context,
                Optimiser(settings.learning_rate * float(start.std())), rate=cosine(settings.steps),
                steps=settings.steps, seed=settings.seed, name=f"free {number}",
                progress=part(progress, number, settings.starts),
            )  # fmt: skip
            losses += kept.losses
            asked += kept.asked
            ways.append(Way(f"free embedding from {name}", states=kept.value[0].cpu(), attacks=target.prompts))
            if kept.sure:
                break
    progress(total, total)
    return Found(tuple(ways), tuple(torch.stack(losses).tolist()), queries=asked)


SPEC = AttackSpec(
    name="free_embedding",
    title="Free Embedding",
    summary="Searches over everything that the network could read in place of a text. Finds what no prompt says, also things "
    "that the model never learned.",
    paper="https://arxiv.org/abs/2409.17682",
    knowledge=Knowledge.WHITE_BOX,
    version=2,
    teaches=True,
    settings=Settings,
    run=run,
    budget="steps",
)
