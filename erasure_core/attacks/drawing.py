"""Sampling from anywhere: from noise, from a picture, inside a mask; backwards from a picture to its noise."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..operators.cond import Cond
from ..operators.memory import PromptMemory
from ..operators.search import Away, predicted
from ..operators.train_loop import generator_for
from ..operators.trainable import TrainableModel
from .target import AttackTarget, Look, Sampler

Progress = Callable[[int, int], None]
"""Called as progress(done, total); it may raise to cancel: attacks hold nothing that needs undoing."""
_SPARE = 3
"""Pictures that are drawn beyond those needed, so that a judge can sort out the ones that don't show the concept."""
_LOOKS = 4
"""Pictures by which a find is judged while the search goes on. One alone is often luck: the noise that a search stops at
would be chosen by its success."""
_SURE = 0.9
"""Mean probability from which on a find can hardly get better."""


def part(progress: Progress, number: int, count: int) -> Progress:
    """The progress of the ``number``-th of ``count`` equal parts, as a progress of its own."""
    return lambda done, total: progress(number * total + min(done, total), count * total)


def noises(model: TrainableModel, seed: int, name: str, numbers: Sequence[int]) -> Tensor:
    """[n, C, h, w], one for each number; ``name`` keeps the noises of two purposes apart whatever the seed."""
    return torch.cat([model.noise(1, generator_for(seed, name, i)) for i in numbers])


@torch.no_grad()
def draw(
    model: TrainableModel,
    cond: Cond,
    null: Cond,
    noise: Tensor,
    sampler: Sampler,
    *,
    memory: PromptMemory | None = None,
    picture: Tensor | None = None,
    strength: float = 1.0,
    mask: Tensor | None = None,
    guidance: float | None = None,
) -> Tensor:
    """Clean latents [n, C, h, w] from ``noise`` of that shape, deterministically.

    Args:
        picture: [n, C, h, w]; its noised form is the start, ``strength`` of the trajectory before the end (SDEdit).
        mask: [n or 1, 1, h, w], 1 where it is drawn anew; elsewhere the picture is put back before every step.
        guidance: the sampler's where not given; at 1 the empty prompt isn't evaluated.
    """
    scale, schedule = sampler.guidance if guidance is None else guidance, model.schedule
    stops = schedule.trajectory(sampler.steps)
    z = noise
    if picture is not None:
        stops = stops[min(len(stops) - 2, round((1 - strength) * sampler.steps)) :]
        z = schedule.add_noise(picture, noise, _times(len(noise), stops[0]))
    if picture is None or mask is None:
        return model.denoise(z, stops, cond, null, guidance=scale, memory=memory)
    for step in pairwise(stops):
        z = mask * z + (1 - mask) * schedule.add_noise(picture, noise, _times(len(noise), step[0]))
        z = model.denoise(z, step, cond, null, guidance=scale, memory=memory)
    return mask * z + (1 - mask) * picture


def draw_rows(
    model: TrainableModel,
    target: AttackTarget,
    conds: Sequence[Cond],
    null: Cond,
    noise: Tensor,
    *,
    memory: PromptMemory | None = None,
    before: Callable[[], object] | None = None,
) -> Tensor:
    """One picture for each row of ``noise``, of the conditionings in turn, as many side by side as have room.

    Args:
        before: called before each batch.
    """
    made, size = [], target.at_once(model)
    for start in range(0, len(noise), size):
        if before is not None:
            before()
        some = noise[start : start + size]
        cond = Cond.cat([conds[i % len(conds)] for i in range(start, start + len(some))])
        made.append(draw(model, cond, null, some, target.sampler, memory=memory))
    return torch.cat(made)


@torch.no_grad()
def invert(
    model: TrainableModel,
    cond: Cond,
    pictures: Tensor,
    steps: int,
    *,
    refine: int = 0,
    away: Away | None = None,
    memory: PromptMemory | None = None,
    progress: Progress | None = None,
) -> Tensor:
    """The noise [n, C, h, w] from which ``draw`` gives ``pictures`` (DDIM inversion): at guidance 1, or guided ``away``.

    A sampling step is z' = alpha z + beta p with p the prediction that it goes by at (z, t). Its inverse is the solution of

        z = (z' - beta p(z, t)) / alpha

    by fixed-point iteration from z', which is DDIM inversion after the first round; ``refine`` is the number of further
    rounds. They go half as far wherever a picture got worse, and each picture keeps the best round: exact where that
    converges, which more sampler steps make likelier.
    """
    schedule, n = model.schedule, len(pictures)
    z, stops = pictures, schedule.trajectory(steps)
    for number, (at, to) in enumerate(reversed(list(pairwise(stops)))):
        if progress:
            progress(number, steps)
        t = _times(n, at)
        one, nil = torch.ones_like(z), torch.zeros_like(z)
        alpha, beta = (schedule.step(p, x, int(t[0]), to, model.space) for p, x in ((nil, one), (one, nil)))
        guess = best = z
        rate, lowest = one[:, :1, :1, :1], torch.full_like(z[:, :1, :1, :1], float("inf"))
        for _ in range(1 + refine):
            out = predicted(model, guess, t, cond.to(z).expand(n), away, memory=memory)
            solved = (z - beta * out) / alpha
            error = (solved - guess).square().sum((1, 2, 3), keepdim=True)
            better = error < lowest
            best, lowest = torch.where(better, solved, best), torch.where(better, error, lowest)
            rate = torch.where(better, rate, rate / 2)
            guess = guess + rate * (solved - guess)
        z = best
    return z


def _times(n: int, at: int | None) -> Tensor:
    assert at is not None
    return torch.full((n,), at, dtype=torch.long)


def pictures_of(
    target: AttackTarget, prompts: Sequence[str], count: int, seed: int, name: str, progress: Progress
) -> Tensor:
    """``count`` clean latents of the concept: those of the target in turn, or drawn by the base model for the prompts.

    With a judge, a few more are drawn and the clearest are taken: the base model misses too.
    """
    return _pictures(target, {name: prompts}, count, seed, progress)[0]


def distinct(target: AttackTarget, count: int) -> int:
    """``count``, or fewer where the target has fewer pictures of its own: the same one twice would be counted as two."""
    return count if target.pictures is None else min(count, len(target.pictures))


def pictures_of_each(
    target: AttackTarget, prompts: Sequence[str], count: int, seed: int, name: str, progress: Progress
) -> list[Tensor]:
    """The same for each prompt alone, on one replica of the base model. Pictures of the target are dealt out in turn.

    Call it before opening another: a search that draws as it goes holds one network more than it searches with.
    """
    return _pictures(target, {f"{name} {i}": [prompt] for i, prompt in enumerate(prompts)}, count, seed, progress)


def _pictures(
    target: AttackTarget, wanted: Mapping[str, Sequence[str]], count: int, seed: int, progress: Progress
) -> list[Tensor]:
    if target.pictures is not None:
        given = target.pictures
        return [given[torch.arange(i * count, (i + 1) * count) % len(given)] for i in range(len(wanted))]
    keys = {name: (name, *prompts, count, seed) for name, prompts in wanted.items()}
    if new := {name: wanted[name] for name, key in keys.items() if key not in target.drawn}:
        for name, latents in _drawn(target, new, count, seed, progress).items():
            target.drawn[keys[name]] = latents
    return [target.drawn[key] for key in keys.values()]


def _drawn(
    target: AttackTarget, wanted: Mapping[str, Sequence[str]], count: int, seed: int, progress: Progress
) -> dict[str, Tensor]:
    total = count + (_SPARE if target.look else 0)
    null, found = target.base.conditions([""])[0], {}
    read = {name: target.base.conditions(list(prompts)) for name, prompts in wanted.items()}
    with target.base.trainable() as model:
        for name, conds in read.items():
            noise = noises(model, seed, name, range(total))
            found[name] = draw_rows(model, target, conds, null, noise, before=lambda: progress(0, 1))
    return found if target.look is None else {n: _clearest(z, target.look, count) for n, z in found.items()}


def _clearest(latents: Tensor, look: Look, count: int) -> Tensor:
    best = look(latents).argsort(descending=True, stable=True)[:count].to(latents.device)
    return latents[best.sort().values]


@dataclass(frozen=True)
class Seen:
    """What the judge says of a find."""

    score: float
    """The mean probability that its pictures show the concept."""
    success: bool
    """The mean is over the target's threshold."""
    sure: bool
    """So is every picture, and the mean can hardly rise: there is nothing left to search."""


class Eye:
    """Draws a few pictures of a find, in one batch and with noises of its own, and asks the target's judge."""

    def __init__(self, target: AttackTarget, model: TrainableModel, seed: int, name: str) -> None:
        self.target, self.model, self.asked = target, model, 0
        self.null = target.without()
        self.noise = noises(model, seed, name, range(_LOOKS))

    @torch.no_grad()
    def __call__(self, cond: Cond) -> Seen:
        """``cond`` is one conditioning, or several that the pictures take in turn."""
        return self._seen(cond, self._said(cond, self.noise))

    @torch.no_grad()
    def glance(self, cond: Cond) -> Seen:
        """The same of one conditioning by one picture, and by the others too where that one shows the concept: hardly any find
        of a search that tries blindly does, and the first picture tells so."""
        said = self._said(cond, self.noise[:1])
        if float(said) >= self.target.threshold:
            said = torch.cat([said, self._said(cond, self.noise[1:])])
        return self._seen(cond, said)

    def _said(self, cond: Cond, noise: Tensor) -> Tensor:
        assert self.target.look is not None
        rows = [cond.row(i) for i in range(len(cond))]
        z = draw_rows(self.model, self.target, rows, self.null, noise, memory=self.target.memory)
        self.asked += len(z)
        return self.target.look(z).float().cpu()

    def _seen(self, cond: Cond, said: Tensor) -> Seen:
        score, threshold = float(said.mean()), self.target.threshold
        self.target.show(cond.row(0), score)
        return Seen(score, score >= threshold, score >= _SURE and bool((said >= threshold).all()))
