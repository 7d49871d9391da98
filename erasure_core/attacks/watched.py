"""Searches for what the network reads in place of a text, looked at on the way: Concept Inversion and Free Embedding.

With a judge, a search is looked at a dozen times; a short one less often, for looking costs more than searching. It ends as
soon as there is nothing left to search (``Seen.sure``), and hands over the best that was seen: a loss over all times and noises
falls on long after the pictures have stopped getting better. Without one, the last value is the find.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..operators.cond import Cond
from ..operators.search import Teacher
from ..operators.train_loop import Optimiser, Phase, constant, generator_for
from ..operators.trainable import TrainableModel
from .drawing import Eye, Progress
from .target import AttackTarget

_LOOKS, _FEWEST, _BETWEEN = 12, 3, 10
"""Times that the judge looks at a search, and once more at its end: of a short one fewer, with ten steps from one to the next,
but three at least."""
_SHOWN_EVERY = 25
"""Steps from one preview to the next where nobody judges."""


@dataclass(frozen=True, eq=False)
class Kept:
    """What a search hands over."""

    value: Tensor
    losses: list[Tensor]
    sure: bool
    """The judge left no doubt about it."""
    asked: int
    """Pictures that were looked at."""


def search_watched(
    model: TrainableModel,
    target: AttackTarget,
    start: Tensor,
    loss: Callable[[Tensor, torch.Generator], Tensor],
    read: Callable[[Tensor], Cond],
    optimiser: Optimiser,
    *,
    steps: int,
    seed: int,
    name: str,
    progress: Progress,
    rate: Callable[[int], float] = constant,
) -> Kept:
    """Minimise ``loss(value, generator)`` from ``start``, which is not changed.

    Args:
        read: what the network reads of a value; where it gives several conditionings, pictures take them in turn.
        rate: factor of the optimiser's rate at each step.
        seed, name: which search it is; every noise is drawn from them.
    """
    value = start.detach().clone().requires_grad_()
    phase = Phase(name, [value], lambda _, generator: {"fit": loss(value, generator)}, optimiser, rate)
    eye = Eye(target, model, seed, f"{name} look") if target.look else None
    every = _SHOWN_EVERY if eye is None else max(1, steps // min(_LOOKS, max(_FEWEST, steps // _BETWEEN)))
    best, highest, losses, sure = value.detach(), -1.0, [], False
    for i in range(steps):
        progress(i, steps)
        losses.append(phase.step(i, generator_for(seed, name, i))[f"{name}/fit"])
        if i % every and i != steps - 1:
            continue
        if eye is None:
            target.show(read(value.detach()).row(0))
            continue
        seen = eye(read(value.detach()))
        if seen.score > highest:
            best, highest = value.detach().clone(), seen.score
        if seen.sure:
            sure = True
            break
    progress(steps, steps)
    return Kept(best, losses, sure, eye.asked if eye else 0)


@contextmanager
def teachers(target: AttackTarget, wanted: bool) -> Iterator[Callable[[int], Teacher | None]]:
    """For each prompt, by number, what the base model predicts for it: the aim of a search in place of the noise.

    A network that knows the pictures predicts what of the noise can be known. Where it isn't ``wanted`` there is none.
    """
    if not wanted:
        yield lambda _: None
        return
    asked = target.base.conditions(target.prompts)
    with target.base.trainable() as base:
        yield lambda number: lambda z, t, _: base.reference(z, t, asked[number])
