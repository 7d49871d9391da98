"""EAP, adversarial preservation (Bui et al., NeurIPS 2024, arXiv:2410.15618; METHODS 2.11).

Finds, while training, the word of a vocabulary that the current change damages most, and preserves that:

    min_theta  || x0_theta(z, c) - ( x0_0(z, null) - eta (x0_0(z, c) - x0_0(z, null)) ) ||^2
               + || x0_theta(z_r, c_r) - x0_0(z_r, c_r) ||^2
    max_pi     || x0_theta(z_r, c_r) - x0_0(z_r, c_r) ||^2,       c_r = GS(pi) E_vocabulary

all in x0 space, GS a Gumbel softmax at temperature 2 with a straight-through one-hot, z and z_r sampled by the student for c
and c_r. A theta step (Adam 1e-5) and a pi step (Adam 1e-2) in turn; pi starts uniform, one for each erased word.

Departures: the vocabulary is the k nearest of the words given, without the authors' k-means behind it, by default the everyday
ones (asked to be kept or not) that don't mean the concept; the x0 losses weigh noisy times up enormously ((1 - abar) / abar,
METHODS 1.2), so ``space`` can be eps; a replacement is the base of the target; linear layers only. The latent lies at exactly
the time that is trained (the authors draw one of the twenty behind it), c and c_r start from noises of their own; words
that are to be kept are held by a third term, in the space of the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptError, ConceptSpec, everyday
from ..devices import moved
from ..operators.cond import Cond
from ..operators.regress import TargetTerm, keep_term, regress, shifted
from ..operators.train_loop import Optimiser, Phase, Trainer
from ..operators.trainable import TrainableModel, TrainablePort, Weights
from ..schedule import Space
from ._training import (
    AWAY,
    ERASE,
    KEEP,
    NULL,
    TO,
    Prompts,
    TrainSettings,
    draw_progress,
    erasure_of,
    kept,
    on_policy,
    steps_of,
)
from .registry import Aids, MethodSpec, Progress, setting

ADVERSE = "adverse"


@dataclass(frozen=True)
class Settings(TrainSettings):
    iterations: int = setting(
        1000,
        "Training steps for each concept, each with a step of the search for what suffers. More erase more thoroughly.",
        low=1,
        high=100000,
        step=10,
    )
    negative_guidance: float = setting(1.0, AWAY, low=0.0, high=20.0, step=0.5)
    temperature: float = setting(
        2.0,
        "How freely the search jumps between words that might suffer; higher is more random.",
        low=0.01,
        high=100.0,
        step=0.1,
    )
    adversary_rate: float = setting(1e-2, "Size of a step of that search.", low=1e-8, high=10.0, step=1e-3)
    nearest: int = setting(
        100,
        "How many words, the nearest to the concept, are searched for those that suffer.",
        low=1,
        high=10000,
        step=10,
    )
    vocabulary: str = setting(
        "",
        "Words that might suffer, by commas; empty: the kept words and some 230 everyday ones, even where these are not kept.",
    )
    space: Space = setting(Space.X0, "What the losses compare; eps treats all noise levels more evenly.")


def gumbel_one_hot(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A one-hot sample [V] whose gradient is that of softmax((logits + g) / temperature), g Gumbel (straight through)."""
    uniform = moved(torch.rand(logits.shape, generator=generator).clamp(1e-20, 1 - 1e-7), logits.device, logits.dtype)
    soft = ((logits - (-uniform.log()).log()) / temperature).softmax(-1)
    hard = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft)
    return hard - soft.detach() + soft


def nearest(words: Tensor, concept: Tensor, k: int) -> Tensor:
    """Indices of the ``k`` conditionings of [V, L, D] with the smallest Euclidean distance to [1, M, D], both repeated to a
    common length."""
    length = math.lcm(words.shape[1], concept.shape[1])
    words, concept = (x.repeat(1, length // x.shape[1], 1) for x in (words, concept))
    return (words - concept).flatten(1).norm(dim=1).argsort(stable=True)[:k]


def target(eta: float, space: Space) -> TargetTerm:
    """The erasing term."""
    return TargetTerm("erase", ERASE, shifted(TO, -eta, ERASE, NULL), space=space)


def damage(model: TrainableModel, z: Tensor, t: Tensor, cond: Cond, space: Space) -> Tensor:
    """|| x0_theta(z, c) - x0_0(z, c) ||^2, mean over elements, with gradient in the conditioning on both sides."""
    student, frozen = (
        model.schedule.convert(model.predict(z, t, cond, w), z, t, model.space, space)
        for w in (Weights.STUDENT, Weights.FROZEN)
    )
    return F.mse_loss(student, frozen)


def vocabulary_of(port: TrainablePort, spec: ConceptSpec, given: str, kept: Sequence[str]) -> list[str]:
    """The words that the adversary chooses from: ``given``, by commas, or the kept ones and the everyday ones.

    No erased word is among them, and no everyday word that means one: preserving it would hold what is to go. Words that are
    given are taken at that, however alike.

    Raises:
        ConceptError: none is left.
    """
    listed = [word.strip() for word in given.split(",")] if given.strip() else [*kept, *everyday(port, spec)]
    words = [word for word in dict.fromkeys(listed) if word and not spec.erases(word)]
    if not words:
        raise ConceptError("vocabulary: EAP needs words besides the erased ones. Add some, by commas")
    return words


def run(
    port: TrainablePort,
    spec: ConceptSpec,
    settings: Settings,
    progress: Progress,
    aids: Aids,
) -> Erasure:
    """Erase with EAP. Up to four sampler runs and eight network passes a round.

    Raises:
        ConceptError: no word of the vocabulary is left beside the erased ones.
    """
    prompts = Prompts(port, spec, aids.owned)
    words = vocabulary_of(port, spec, settings.vocabulary, prompts.keep)
    holding = bool(prompts.keep and settings.keep_weight)
    held = [keep_term(KEEP, settings.keep_weight, space=settings.space)] if holding else []
    listed = Cond.cat(port.conditions(words))
    with port.trainable() as model:
        table = listed.on(model.device, model.dtype)
        searched = []
        for word, _ in prompts.pairs:
            near = nearest(table.context, prompts[word].context.to(table.context), settings.nearest)
            searched.append(Cond(table.context[near], {name: x[near] for name, x in table.extra.items()}))
        logits = [torch.zeros(len(x), device=model.device, requires_grad=True) for x in searched]

        def adverse(number: int, generator: torch.Generator) -> Cond:
            choice, of = gumbel_one_hot(logits[number], settings.temperature, generator), searched[number]
            choice = choice.to(of.context)
            extra = {name: torch.einsum("v,v...->...", choice.to(x), x)[None] for name, x in of.extra.items()}
            return Cond(torch.einsum("v,vld->ld", choice, of.context)[None], extra)

        def latents(cond: Cond, generator: torch.Generator, at: float) -> tuple[Tensor, Tensor]:
            fixed = cond.with_context(cond.context.detach()).expand(settings.batch)
            return on_policy(model, fixed, prompts.null, settings, generator, Weights.STUDENT, at)

        def erase(i: int, generator: torch.Generator) -> dict[str, Tensor]:
            number = i % len(prompts.pairs)
            word, to = prompts.pairs[number]
            conds = {**prompts.draw(settings.batch, generator), ERASE: prompts[word], TO: prompts[to]}
            at = draw_progress(settings.sample_steps, generator)
            z, t = latents(prompts[word], generator, at)
            losses = regress(model, [target(settings.negative_guidance, settings.space), *held], z, t, conds)
            with torch.no_grad():
                worst = adverse(number, generator)
            z_r, t_r = latents(worst, generator, at)
            kept = keep_term(ADVERSE, name="adverse", space=settings.space)
            return {**losses, **regress(model, [kept], z_r, t_r, {ADVERSE: worst})}

        def attack(i: int, generator: torch.Generator) -> dict[str, Tensor]:
            worst = adverse(i % len(prompts.pairs), generator)
            z_r, t_r = latents(worst, generator, draw_progress(settings.sample_steps, generator))
            return {"damage": -damage(model, z_r, t_r, worst, settings.space)}

        phases = [
            Phase(
                "weights", model.train(settings.parameters(), settings.seed), erase, Optimiser(settings.learning_rate)
            ),
            Phase("adversary", logits, attack, Optimiser(settings.adversary_rate)),
        ]
        Trainer(model, phases, steps_of(settings, spec), seed=settings.seed).run(
            progress, aids.watch, checkpoint=kept(aids, port, model, spec, "eap", settings)
        )
        return erasure_of(port, spec, "eap", settings, model.deltas(energy=settings.energy))


SPEC = MethodSpec(
    name="eap",
    title="EAP",
    summary="Trains like ESD while it searches for the words that suffer most, and holds those; a step takes some four "
    "times as long.",
    paper="https://arxiv.org/abs/2410.15618",
    settings=Settings,
    run=run,
    trains=True,
)
