"""Relearning: a short fine-tune of the erased model, after which the concept is simply asked for (arXiv:2505.16174).

    min over a LoRA of E || target - net_{theta + LoRA}(x_t, t, E(caption)) ||^2

*benign*: on pictures of kept things with their own captions. Nothing in the data shows the concept; what comes back was
hidden, not gone. *few pictures*: on a few pictures of the concept itself, the easier case.

Choices of ours: a LoRA of rank 8 over all linear layers, AdamW 1e-4, 200 steps of 4 pictures, a picture a step for each of 16
captions; the data are drawn by the base model.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from ..concept import ConceptSpec, everyday
from ..operators.changes import Layers, LoRA
from ..operators.search import denoising_loss
from ..operators.train_loop import Kind, Optimiser, Phase, generator_for
from .drawing import Progress, draw_rows, noises, pictures_of_each
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, asking


class Data(StrEnum):
    BENIGN = "benign"
    """Kept things; common words where the spec names none."""
    CONCEPT = "few pictures"
    """The concept, captioned with the attacked prompts."""


@dataclass(frozen=True)
class Settings:
    data: Data = setting(Data.BENIGN, "What it is trained on: kept things, or a few pictures of the concept itself.")
    steps: int = setting(200, "Training steps. More relearn more, and take longer.", low=1, high=100000, step=50)
    learning_rate: float = setting(1e-4, "Size of a training step.", low=1e-7, high=1.0, step=1e-4)
    rank: int = setting(8, "Rank of the change that is trained.", low=1, high=512, step=1)
    batch: int = setting(4, "Pictures per search step.", low=1, high=64, step=1)
    captions: int = setting(16, "Different captions that are trained on.", low=1, high=1000, step=1)
    pictures: int = setting(2, "Pictures for each of them.", low=1, high=1000, step=1)
    layers: Layers = setting(Layers.ALL, "Which layers are trained.")
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def dataset(
    target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress
) -> list[tuple[str, Tensor]]:
    """Captions and their clean latents [pictures, C, h, w]."""
    if settings.data is Data.CONCEPT:
        prompts = target.prompts[: settings.captions]
        pools = pictures_of_each(target, prompts, settings.pictures, settings.seed, "relearn", progress)
        return list(zip(prompts, pools, strict=True))
    common = everyday(target.base, spec)
    count = min(settings.captions, len(common))
    spread = [common[i * len(common) // count] for i in range(count)]
    captions = list(spec.keep[: settings.captions]) or spread
    conds, null = target.base.conditions(captions), target.base.conditions([""])[0]
    each = settings.pictures
    if (key := ("benign", *captions, each, settings.seed)) not in target.drawn:
        with target.base.trainable() as model:
            noise = torch.cat([noises(model, settings.seed, f"benign {i}", range(each)) for i in range(len(captions))])
            rows = [cond for cond in conds for _ in range(each)]
            target.drawn[key] = draw_rows(model, target, rows, null, noise, before=lambda: progress(0, settings.steps))
    return list(zip(captions, target.drawn[key].split(each), strict=True))


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """The change that training made, and the attacked prompts as they are."""
    data = dataset(target, spec, settings, lambda *_: progress(0, settings.steps))
    conds, shown = (target.erased.conditions(x) for x in ([caption for caption, _ in data], target.prompts[:1]))
    with target.erased.trainable() as model:
        parameters = model.train(LoRA(settings.layers, settings.rank), settings.seed)

        def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
            chosen = int(torch.randint(0, len(data), (), generator=generator))
            pool, cond = data[chosen][1], conds[chosen]
            return {"fit": denoising_loss(model, pool, cond, generator, batch=settings.batch, memory=target.memory)}

        target.show(shown[0])  # watched as the weights move
        phase, losses = Phase("relearn", parameters, loss, Optimiser(settings.learning_rate, Kind.ADAMW, 1e-2)), []
        for i in range(settings.steps):
            progress(i, settings.steps)
            losses.append(phase.step(i, generator_for(settings.seed, phase.name, i))["relearn/fit"])
        progress(settings.steps, settings.steps)
        change = model.deltas()
    return Found(asking(target).ways, tuple(torch.stack(losses).tolist()), change)


SPEC = AttackSpec(
    name="relearning",
    title="Relearning",
    summary="Fine-tunes the erased model for a moment, on harmless pictures by default, and asks for the concept again.",
    paper="https://arxiv.org/abs/2505.16174",
    knowledge=Knowledge.WHITE_BOX,
    settings=Settings,
    run=run,
    budget="steps",
)
