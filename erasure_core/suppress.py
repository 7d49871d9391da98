"""Suppress mode of safe prompt memory: the weights stay, and a memory alone pushes the concept away.

The memory is KPOP's (operators/memory.py), learned for the opposite of its paper's purpose, with ESD's target. All prompts
read it, so it must know the concept by what the network makes of the picture and leave everything else alone:

    L(p) = || eps_0(z, c_e, p) - T ||^2 + w ( || eps_0(z, "", p) - eps_0(z, "") ||^2
         + || eps_0(z_k, c_k, p) - eps_0(z_k, c_k) ||^2 + || eps_0(z_k, "", p) - eps_0(z_k, "") ||^2 )

    T = eps_to - eta (eps_e - eps_null)

with z on the way to a picture of the concept c_e, and z_k to one of a kept word c_k. The network never changes, so these
pictures and all predictions to aim at are computed once, before training: a step costs one pass of the network.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .concept import ConceptError, ConceptSpec
from .methods import Aids, Progress
from .methods._training import Prompts, erasure_of, kept, steps_of
from .methods.registry import setting
from .operators.cond import Cond
from .operators.memory import Mode, Placement, PromptMemory, SavedMemory
from .operators.train_loop import Optimiser, Phase, Trainer, cosine
from .operators.trainable import TrainableModel, TrainablePort


@dataclass(frozen=True)
class Settings:
    """Defaults were measured on EmojiCanvas, on prompts and seeds that no result is reported on."""

    iterations: int = setting(
        250, "Training steps for each concept. More suppress more firmly.", low=1, high=100000, step=10
    )
    learning_rate: float = setting(2e-2, "Size of a training step.", low=1e-8, high=1.0, step=1e-3)
    rows: int = setting(16, "Size of the memory: rows beside the text.", low=1, high=1000, step=1)
    placement: Placement = setting(Placement.ALL, "Which blocks read the memory.")
    batch: int = setting(2, "Pictures of the concept, and as many kept ones, per step.", low=1, high=64, step=1)
    pictures: int = setting(12, "Pictures of each concept that training looks at.", low=1, high=1000, step=1)
    kept_pictures: int = setting(28, "Pictures of kept words that training looks at.", low=1, high=1000, step=1)
    negative_guidance: float = setting(1.0, "How far from the concept it pushes.", low=0.0, high=20.0, step=0.5)
    keep_weight: float = setting(1.5, "How hard everything else is held.", low=0.0, high=1e6, step=0.1)
    guidance: float = setting(3.0, "Guidance of the pictures that training looks at.", low=0.0, high=30.0, step=0.5)
    sample_steps: int = setting(10, "Sampler steps of these pictures.", low=2, high=1000, step=1)
    seed: int = setting(0, "The same seed gives the same memory.", low=0, high=2**53, step=1)


@dataclass(frozen=True)
class Stop:
    """All pictures at one time ``t`` on their way: latents and what to predict there, each [N, C, h, w]."""

    t: int
    z: Tensor
    null: Tensor
    """For the empty prompt."""
    target: Tensor
    """What the memory should make of each picture's prompt: T for the concept, for kept words what it was."""


@dataclass(frozen=True)
class Scene:
    """A picture to draw: its prompt and, for the concept, what is drawn instead; ``to`` is None for a kept word."""

    cond: Cond
    to: Cond | None = None


def draw(
    model: TrainableModel, scenes: Sequence[Scene], null: Cond, settings: Settings, progress: Progress
) -> list[Stop]:
    """Every stop of a guided sampler on the way to a picture of each scene."""
    z = model.noise(len(scenes), torch.Generator().manual_seed(settings.seed))
    way = list(pairwise(model.schedule.trajectory(settings.sample_steps)))
    conds = [scene.cond for scene in scenes]
    stops: list[Stop] = []

    def predict(at: int, conds: Sequence[Cond]) -> Tensor:
        parts = []
        for i in range(0, len(conds), 8):
            progress(len(stops), len(way))
            part = Cond.cat(conds[i : i + 8])
            parts.append(model.reference(z[i : i + 8], torch.full((len(part),), at), part))
        return torch.cat(parts)

    for at, after in way:
        assert at is not None
        own, none = predict(at, conds), predict(at, [null] * len(scenes))
        target = own.clone()
        for i, scene in enumerate(scenes):
            if scene.to is not None:
                to = none[i] if scene.to is null else model.reference(z[i : i + 1], torch.tensor([at]), scene.to)[0]
                target[i] = to - settings.negative_guidance * (own[i] - none[i])
        stops.append(Stop(at, z, none, target))
        z = model.schedule.step(none + settings.guidance * (own - none), z, at, after, model.space)
    return stops


def losses(
    model: TrainableModel,
    memory: PromptMemory,
    stop: Stop,
    scenes: Sequence[Scene],
    chosen: Sequence[int],
    null: Cond,
    keep_weight: float,
) -> dict[str, Tensor]:
    """The terms of L over the ``chosen`` pictures, those of the concept first, each a mean over elements."""
    n = sum(scenes[i].to is not None for i in chosen)
    z, target, held = (torch.stack([x[i] for i in chosen]) for x in (stop.z, stop.target, stop.null))
    cond = Cond.cat([*(scenes[i].cond for i in chosen), *([null] * len(chosen))])
    t = torch.full((len(cond),), stop.t)
    own, none = model.predict(z.repeat(2, 1, 1, 1), t, cond, memory=memory).chunk(2)
    return {
        "away": F.mse_loss(own[:n], target[:n]),
        "empty": keep_weight * F.mse_loss(none[:n], held[:n]),
        "keep": keep_weight * (F.mse_loss(own[n:], target[n:]) + F.mse_loss(none[n:], held[n:])),
    }


def suppress(port: TrainablePort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> SavedMemory:
    """Learn a memory that takes the concept out of pictures. Without kept words, everyday words are held.

    Its state in ``aids.checkpoint`` is of the training alone: the pictures before it, some seconds, are drawn again.

    Raises:
        ConceptError: nothing is left to hold.
    """
    spec = replace(spec, everyday=spec.everyday or not spec.keep)
    prompts = Prompts(port, spec, aids.owned)
    n, kept_count = (
        max(settings.pictures * len(spec.erase), len(prompts.pairs)),
        max(settings.kept_pictures, len(spec.keep)),
    )
    words = [prompts.pairs[i % len(prompts.pairs)] for i in range(n)]
    generator = torch.Generator().manual_seed(settings.seed)
    others = [prompts.keep[i] for i in torch.randperm(len(prompts.keep), generator=generator)]
    others.sort(key=lambda word: word not in spec.keep)  # those that were named before everyday ones
    if not others:
        raise ConceptError("keep: every everyday word means to this text encoder what is erased. Name what must stay")
    scenes = [Scene(prompts[word], prompts[to]) for word, to in words]
    scenes += [Scene(prompts[others[i % len(others)]]) for i in range(kept_count)]
    drawing, steps = settings.sample_steps, steps_of(settings, spec)

    with port.trainable() as model:
        stops = draw(model, scenes, prompts.null, settings, lambda done, _: progress(done, drawing + steps))
        memory = PromptMemory.beside(
            prompts.null.context[0], settings.rows, settings.placement, generator, shared=False
        ).to(model.device)
        model.reads = memory  # for whoever watches

        def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
            stop = stops[int(torch.randint(len(stops), (), generator=generator))]
            chosen = torch.randperm(n, generator=generator)[: settings.batch].tolist()
            chosen += [n + i for i in torch.randperm(len(scenes) - n, generator=generator)[: settings.batch].tolist()]
            return losses(model, memory, stop, scenes, chosen, prompts.null, settings.keep_weight)

        rate = cosine(steps, warmup=steps // 20)
        phase = Phase("memory", list(memory.parameters()), loss, Optimiser(settings.learning_rate), rate)
        trainer = Trainer(model, [phase], steps, seed=settings.seed)
        trainer.run(
            lambda done, total: progress(drawing + done, drawing + total), aids.watch,
            checkpoint=kept(aids, port, model, spec, "suppress", settings),
        )  # fmt: skip
        header = erasure_of(port, spec, "suppress", settings, {}).header
        return SavedMemory.of(memory, header, Mode.SUPPRESS)
