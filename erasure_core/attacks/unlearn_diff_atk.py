"""UnlearnDiffAtk (Zhang et al., ECCV 2024, arXiv:2310.11868; METHODS 3.3): adversarial words before a prompt.

The k words are rows of a relaxed variable u in the product of simplices over the vocabulary, from the uniform point. A
step draws a word from each row, passes its gradient straight through to u (clipped to [-1, 1]), takes an Adam step and
projects each row back:

    min_u E || net(x_t, t, E([words(u), prompt])) - target ||^2,    x_t: the noised picture of the prompt
    projection of a: clip(a - mu, 0, 1) with mu such that the row sums to 1, found by bisection

The words that count are the likeliest of each row, looked at behind every time step; the search ends at the first success.
3 words (5 for nudity), 50 times of 40 steps each, Adam 0.01, weight decay 0.1.

Departures: bisection on all rows at once, until the sum is right (the authors stop by the width of mu's interval, which
leaves sums off by up to V times that); the order of the times is shuffled by the seed; only words that a person can type;
success needs a judge and is that of four pictures' mean, as one picture is often luck; the judge's favourite words count
where none succeed; without one the last words are handed over.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concept import ConceptSpec
from ..devices import moved
from ..operators.cond import Cond
from ..operators.search import Away, denoising_loss
from ..operators.train_loop import Kind, Optimiser, Phase, generator_for
from ..operators.trainable import TrainableModel
from .drawing import Eye, Progress, part, pictures_of_each
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .words import Frame, Words


@dataclass(frozen=True)
class Settings:
    tokens: int = setting(
        3, "Words that are put before the prompt; the paper uses 5 for nudity.", low=1, high=60, step=1
    )
    times: int = setting(50, "Noise levels that the search visits.", low=1, high=1000, step=1)
    steps: int = setting(40, "Search steps at each of them.", low=1, high=10000, step=1)
    learning_rate: float = setting(0.01, "Size of a search step.", low=1e-6, high=10.0, step=0.01)
    weight_decay: float = setting(0.1, "Pull of the words to all others.", low=0.0, high=10.0, step=0.1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def onto_simplex(rows: Tensor, rounds: int = 60) -> Tensor:
    """The nearest point of the probability simplex to each row [k, V], by bisection for the threshold mu."""
    low, high = rows.min(1, keepdim=True).values - 1, rows.max(1, keepdim=True).values
    for _ in range(rounds):
        middle = (low + high) / 2
        too_much = (rows - middle).clamp(0, 1).sum(1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    return (rows - (low + high) / 2).clamp(0, 1)


class _Drawn(torch.autograd.Function):
    """One word from each row of u [k, V] as a one-hot; the gradient goes straight through, clipped."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, generator: torch.Generator) -> Tensor:
        index = torch.multinomial(u.detach().float().cpu(), 1, generator=generator)[:, 0]
        return F.one_hot(moved(index, u.device), u.shape[1]).to(u)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].clamp(-1, 1), None


def search_words(
    model: TrainableModel,
    target: AttackTarget,
    words: Words,
    frame: Frame,
    picture: Tensor,
    null: Cond,
    away: Away | None,
    settings: Settings,
    number: int,
    progress: Progress,
) -> tuple[Tensor, list[Tensor], int]:
    """The words [k] (ids) for one prompt, the losses, and how many pictures were looked at."""
    slot, null = frame.slot(), target.as_typed(null, target.prompts[number])
    table, count = words.table, len(words.vocabulary)
    u = torch.full((frame.free, count), 1 / count, device=table.device, dtype=table.dtype).requires_grad_()
    order = torch.randperm(settings.times, generator=generator_for(settings.seed, "times", number)).tolist()
    times = [round((i + 0.5) * len(model.schedule) / settings.times - 0.5) for i in order]
    at = [0]

    def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
        cond = null.with_context(slot.states(_Drawn.apply(u, generator) @ table))
        t = torch.tensor([at[0]])
        return {"fit": denoising_loss(model, picture, cond, generator, batch=1, memory=target.memory, t=t, away=away)}

    def project() -> None:
        with torch.no_grad():
            u.copy_(onto_simplex(u))

    optimiser = Optimiser(settings.learning_rate, Kind.ADAM, settings.weight_decay)
    phase = Phase(f"words {number}", [u], loss, optimiser, after=project)
    eye = Eye(target, model, settings.seed, f"words look {number}") if target.look else None
    losses: list[Tensor] = []
    best, highest = words.vocabulary[: frame.free], -1.0
    total = settings.times * settings.steps
    for at[0] in times:
        for _ in range(settings.steps):
            progress(len(losses), total)
            made = phase.step(len(losses), generator_for(settings.seed, phase.name, len(losses)))
            losses.append(made[f"{phase.name}/fit"])
        found = words.vocabulary[u.detach().argmax(1).cpu()]
        cond = target.as_typed(null.with_context(words.states(frame.ids(found[None]))), frame.spell(found))
        if eye is None:
            target.show(cond)
            best = found
            continue
        seen = eye(cond)
        if seen.score > highest:
            best, highest = found, seen.score
        if seen.success:
            break
    progress(total, total)
    return best, losses, eye.asked if eye else 0


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One prompt for each prompt."""
    words, losses, ways, asked = target.words, [], [], 0
    assert words is not None
    count, total = len(target.prompts), len(target.prompts) * settings.times * settings.steps
    pictures = pictures_of_each(target, target.prompts, 1, settings.seed, "picture", lambda *_: progress(0, total))
    null, away = target.erased.conditions([""])[0], target.away()
    with target.erased.trainable() as model:
        for number, (prompt, picture) in enumerate(zip(target.prompts, pictures, strict=True)):
            step = part(progress, number, count)
            frame = Frame.prefix(words, words.content(prompt), settings.tokens)
            found, made, looked = search_words(model, target, words, frame, picture, null, away, settings, number, step)
            losses += made
            asked += looked
            ways.append(Way(frame.spell(found), frame.spell(found), attacks=(prompt,)))
    return Found(tuple(ways), tuple(torch.stack(losses).tolist()), queries=asked)


SPEC = AttackSpec(
    name="unlearn_diff_atk",
    title="UnlearnDiffAtk",
    summary="Searches for words to write before a prompt that make the erased model denoise the concept's picture again.",
    paper="https://arxiv.org/abs/2310.11868",
    knowledge=Knowledge.WHITE_BOX,
    version=2,
    settings=Settings,
    run=run,
    budget="times",
    needs_words=True,
)
