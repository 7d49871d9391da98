"""P4D, Prompting4Debugging (Chin et al., ICML 2024, arXiv:2309.06135; METHODS 3.4): a prompt that steers as the base does.

    min over p of || net_erased(z_t, t, E(project(p))) - net_base(z_t, t, E(prompt)) ||^2,   z_t a noised picture of the prompt

p is a row of soft vectors. The forward pass sees each one's nearest vocabulary embedding (by cosine); the gradient is
applied to the soft ones (as in PEZ). N: the whole prompt is p, 16 words. K: one such word before every K words of the prompt
and one at its end. AdamW 0.1, weight decay 0.1, 3000 steps; the best prompt of those looked at every 50 steps counts.
Against a negative prompt net_erased is what guidance away from it makes; net_base stays unguided, as in the authors' code.

Departures: padding is the tokenizer's own (the authors pad with token 0 while searching, so that what was optimised isn't
what is later typed); only words that a person can type; the best prompt is the one that a judge likes best (theirs: the CLIP
similarity to the base's picture) or, without a judge, that fits best at fixed noise levels.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concept import ConceptSpec
from ..operators.cond import Cond
from ..operators.search import Away, predicted
from ..operators.train_loop import Kind, Optimiser, Phase, generator_for
from ..operators.trainable import TrainableModel
from .drawing import Eye, Progress, noises, part, pictures_of_each
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .words import Frame

_FIXED = 8
"""Noise levels that prompts are compared at where nobody looks."""


class Form(StrEnum):
    """What the searched words stand in."""

    N = "whole prompt (N)"
    K = "between the words (K)"


@dataclass(frozen=True)
class Settings:
    form: Form = setting(Form.N, "Whether the prompt is replaced, or words are put between its own.")
    tokens: int = setting(16, "Words of a whole prompt (N).", low=1, high=75, step=1)
    gap: int = setting(3, "Words of the prompt from one searched word to the next (K).", low=1, high=75, step=1)
    steps: int = setting(3000, "Search steps. More find more, and take longer.", low=1, high=100000, step=50)
    learning_rate: float = setting(0.1, "Size of a search step.", low=1e-6, high=10.0, step=0.01)
    weight_decay: float = setting(0.1, "Pull of the soft words to zero.", low=0.0, high=10.0, step=0.1)
    look_every: int = setting(50, "Steps from one look at the prompt to the next.", low=1, high=10000, step=10)
    pictures: int = setting(1, "Pictures of the prompt that are learned from.", low=1, high=100, step=1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def nearest(soft: Tensor, directions: Tensor) -> Tensor:
    """For each row of ``soft`` [n, D] the place [n] of the vocabulary's direction [V, D] with the largest cosine."""
    return (soft @ directions.T).argmax(1)  # the length of a soft vector changes no order


def projected(soft: Tensor, table: Tensor, directions: Tensor) -> Tensor:
    """The nearest embeddings [n, D]; the gradient passes to ``soft`` unchanged."""
    return soft + (table[nearest(soft.detach(), directions)] - soft).detach()


def gap_to_base(
    erased: TrainableModel, base: TrainableModel, z: Tensor, t: Tensor, cond: Cond, asked: Cond, target: AttackTarget,
    away: Away | None,
) -> Tensor:  # fmt: skip
    """|| net_erased(z, t, cond) - net_base(z, t, asked) ||^2, mean over entries; net_erased guided ``away``."""
    return F.mse_loss(predicted(erased, z, t, cond, away, memory=target.memory), base.reference(z, t, asked))


def search_prompt(
    erased: TrainableModel, base: TrainableModel, target: AttackTarget, frame: Frame, asked: Cond, pictures: Tensor,
    away: Away | None, settings: Settings, number: int, progress: Progress,
) -> tuple[Tensor, list[Tensor], int]:  # fmt: skip
    """The words [n] (ids) for one prompt, the losses, and how many pictures were looked at."""
    words, slot = frame.words, frame.slot()
    table, schedule = words.table, erased.schedule
    directions = F.normalize(table, dim=-1)
    first = torch.randint(0, len(table), (frame.free,), generator=generator_for(settings.seed, "p4d start", number))
    soft = table[first.to(table.device)].clone().requires_grad_()
    pictures, at_gate = pictures.to(erased.device, erased.dtype), target.as_typed(asked, target.prompts[number])

    def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
        k = int(torch.randint(0, len(pictures), (), generator=generator))
        x0 = pictures[k : k + 1]
        t = torch.randint(0, len(schedule), (1,), generator=generator)
        z = schedule.add_noise(x0, erased.noise(1, generator), t)
        cond = at_gate.with_context(slot.states(projected(soft, table, directions)))
        return {"gap": gap_to_base(erased, base, z, t, cond, asked, target, away)}

    fixed = torch.linspace(0, len(schedule) - 1, _FIXED + 2)[1:-1].round().long()
    at_fixed = schedule.add_noise(
        pictures[torch.arange(_FIXED) % len(pictures)], noises(erased, settings.seed, "p4d fixed", range(_FIXED)), fixed
    )
    eye = Eye(target, erased, settings.seed, f"p4d look {number}") if target.look else None

    def score(tokens: Tensor) -> float:
        cond = target.as_typed(asked.with_context(words.states(frame.ids(tokens[None]))), frame.spell(tokens))
        if eye is not None:
            return eye(cond).score
        target.show(cond)
        return -float(gap_to_base(erased, base, at_fixed, fixed, cond, asked, target, away))

    optimiser = Optimiser(settings.learning_rate, Kind.ADAMW, settings.weight_decay)
    phase, losses = Phase(f"p4d {number}", [soft], loss, optimiser), []
    best, best_score = words.vocabulary[first], float("-inf")
    for i in range(settings.steps):
        progress(i, settings.steps)
        losses.append(phase.step(i, generator_for(settings.seed, phase.name, i))[f"{phase.name}/gap"])
        if (i + 1) % settings.look_every == 0 or i + 1 == settings.steps:
            tokens = words.vocabulary[nearest(soft.detach(), directions).cpu()]
            made = score(tokens)
            if made > best_score:
                best, best_score = tokens, made
    progress(settings.steps, settings.steps)
    return best, losses, eye.asked if eye else 0


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One prompt for each prompt."""
    words, losses, ways, queries = target.words, [], [], 0
    assert words is not None
    conds, away, count = target.base.conditions(target.prompts), target.away(), len(target.prompts)
    pools = pictures_of_each(
        target, target.prompts, settings.pictures, settings.seed, "p4d", lambda *_: progress(0, count * settings.steps)
    )
    # The one with gradients last: how much room is left then decides whether it keeps its activations.
    with target.base.trainable() as base, target.erased.trainable() as erased:
        for number, (prompt, asked, pictures) in enumerate(zip(target.prompts, conds, pools, strict=True)):
            step = part(progress, number, count)
            if settings.form is Form.N:
                frame = Frame.prefix(words, [], min(settings.tokens, words.room))
            else:
                frame = Frame.every(words, words.content(prompt), settings.gap)
            best, made, looked = search_prompt(
                erased, base, target, frame, asked, pictures, away, settings, number, step
            )
            losses += made
            queries += looked
            ways.append(Way(frame.spell(best), frame.spell(best), attacks=(prompt,)))
    return Found(tuple(ways), tuple(torch.stack(losses).tolist()), queries=queries)


SPEC = AttackSpec(
    name="p4d",
    title="P4D",
    summary="Searches for a prompt, or for words between those of a prompt, that steer the erased model as the base model is.",
    paper="https://arxiv.org/abs/2309.06135",
    knowledge=Knowledge.WHITE_BOX,
    version=2,
    settings=Settings,
    run=run,
    budget="steps",
    needs_words=True,
)
