"""Noised pictures that a training looks at, and what the original network sees in them: asked anew each time, or once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..devices import moved
from ..operators.cond import Cond
from ..operators.regress import predictions_of
from ..operators.trainable import TrainableModel, Weights
from ..schedule import spread
from ._training import ERASE, NULL, TO, Wanted, one_of


@dataclass(frozen=True)
class Views:
    """Latents ``z`` [N, C, h, w] at the times ``t`` [N], and the original network's predictions there, by prompt."""

    z: Tensor
    t: Tensor
    seen: Mapping[str, Tensor]

    def at(self, rows: Tensor) -> Views:
        return Views(self.z[rows], self.t[rows], {name: x[rows] for name, x in self.seen.items()})

    @staticmethod
    def cat(parts: Sequence[Views]) -> Views:
        seen = {name: torch.cat([part.seen[name] for part in parts]) for name in parts[0].seen}
        return Views(torch.cat([part.z for part in parts]), torch.cat([part.t for part in parts]), seen)


Source = Callable[[Sequence[Wanted], Tensor, Sequence[str], torch.Generator], Views]
"""source(concepts [B], places [B] in [0, 1), prompts, generator): a noised picture of each concept, with the predictions for
``prompts`` at least."""


def pick(pictures: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """One of several pictures [k, C, h, w], and noise for it."""
    number = one_of(len(pictures), generator)
    return pictures[number], torch.randn(pictures.shape[1:], generator=generator)


def noised(model: TrainableModel, picked: Iterable[tuple[Tensor, Tensor]], t: Tensor) -> Tensor:
    """Pictures with their noise, at the times ``t`` [B]; the noise goes to the device in one piece."""
    pictures, noise = (torch.stack(parts) for parts in zip(*picked, strict=True))
    return model.schedule.add_noise(pictures, moved(noise, pictures.device, pictures.dtype), t)


def fresh(model: TrainableModel, null: Cond, times: Callable[[Tensor], Tensor]) -> Source:
    """New pictures, noises and words each time; ``times`` makes schedule indices of places."""

    def source(concepts: Sequence[Wanted], where: Tensor, prompts: Sequence[str], generator: torch.Generator) -> Views:
        t = times(where)
        z = noised(model, [pick(c.pictures, generator) for c in concepts], t)
        conds = {NULL: null, TO: Cond.cat([c.anchor for c in concepts])}
        conds[ERASE] = Cond.cat([c.word(generator) for c in concepts])
        seen = predictions_of(model, z, t, conds, prompts, Weights.FROZEN, grad=False)
        return Views(z, t, seen)

    return source


def once(
    make: Source,
    concepts: Sequence[Wanted],
    count: int,
    generator: torch.Generator,
    tick: Callable[[], object],
    batch: int = 8,
) -> Source:
    """``count`` views of each concept that are made now, at places spread evenly; later the nearest place is taken."""
    stores = []
    for concept in concepts:
        where = spread(count, generator)
        parts = []
        for places in where.split(batch):
            tick()
            parts.append(make([concept] * len(places), places, (ERASE, NULL, TO), generator))
        stores.append(Views.cat(parts))

    def source(wanted: Sequence[Wanted], where: Tensor, _prompts: Sequence[str], _generator: torch.Generator) -> Views:
        numbers = [next(n for n, c in enumerate(concepts) if c is own) for own in wanted]
        rows = (where * count).long().clamp(max=count - 1)  # a place next to 1 may have been rounded up to it
        return Views.cat([stores[n].at(row[None]) for n, row in zip(numbers, rows, strict=True)])

    return source
