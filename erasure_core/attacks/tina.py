"""Text-free inversion, after TINA (arXiv:2603.17828): which noise does the erased model turn into the concept, unasked?

A picture of the concept is followed backwards through the erased model's own trajectory under the empty prompt, and sampled
again from the noise that this ends in, as a user samples who types nothing. Erasers that only cut the way from words to the
concept do not stand in this way.

Typing nothing, guidance away from the empty prompt is none, so neither way has any. A negative prompt is in force all the same:
where one is (a part of) what keeps the concept away, both ways are guided away from it. And gated erasures act as far as the
empty prompt opens their gates, which is hardly: what is found then says that they do not guard it.

Unverified: only the idea and results of the paper were at hand, not its procedure. Ours: DDIM inversion with further rounds
of fixed-point iteration in each step (``drawing.invert``), which is what keeps the round trip exact.

What it means: an exactly inverted trajectory gives *any* picture back, as "Memories of Forgotten Concepts" (arXiv:2412.00782)
shows with pictures of anything; here the base EmojiCanvas gives a cat upside down, which it never draws, back as well as
an upright one (a test says so). So success says that the model can draw the picture, not that it would (``given``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept import ConceptSpec
from .drawing import Progress, distinct, invert, pictures_of
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way


@dataclass(frozen=True)
class Settings:
    pictures: int = setting(16, "Pictures that are inverted, each to its own noise.", low=1, high=1000, step=1)
    refine: int = setting(
        3, "Further rounds in each step: more give the picture back more exactly.", low=0, high=50, step=1
    )
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One noise for each picture. The steps are the sampler's own, so that sampling retraces them."""
    steps, count = target.sampler.steps, distinct(target, settings.pictures)
    total = count * steps
    shown = pictures_of(target, target.prompts, count, settings.seed, "tina", lambda *_: progress(0, total))
    null, away = target.as_typed(target.erased.conditions([""])[0], ""), target.away()
    found: list[Tensor] = []
    with target.erased.trainable() as model:
        for some in shown.split(target.at_once(model)):
            done = steps * sum(len(z) for z in found)

            def step(at: int, _: int, done: int = done, each: int = len(some)) -> None:
                progress(done + at * each, total)

            some = some.to(model.device, model.dtype)
            found.append(
                invert(model, null, some, steps, refine=settings.refine, away=away, memory=target.memory, progress=step)
            )
    progress(total, total)
    guidance = 1.0 if away is None else None
    return Found(tuple(Way(f"noise {i}", noise=z.cpu(), guidance=guidance) for i, z in enumerate(torch.cat(found))))


SPEC = AttackSpec(
    name="tina",
    title="Text-free Inversion (TINA type)",
    summary="Finds the noise from which the erased model draws the concept without being asked: no word is involved.",
    paper="https://arxiv.org/abs/2603.17828",
    knowledge=Knowledge.WHITE_BOX,
    settings=Settings,
    run=run,
    budget="pictures",
    quick=True,
    given=True,
)
