"""Search: optimise what the network reads (METHODS 1.8). The inner loop of a defence and the whole of an attack.

The variable is any tensor: a full conditioning [1, L, D], the rows of a prompt memory, or the vectors of pseudo-words that
go through the text encoder (:class:`TokenSlot`). The network's weights stay; the gradient reaches the variable only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import moved
from ..schedule import spread
from .cond import Cond
from .memory import PromptMemory
from .train_loop import Kind, Optimiser, Phase, Progress, constant, cosine, generator_for
from .trainable import TrainableModel, Weights

Objective = Callable[[Tensor, torch.Generator], Tensor]
"""objective(variable, generator) -> scalar to minimise; draws its noise from the generator."""
Seen = Callable[[Tensor, int, float], object]
"""seen(variable as it is now, steps done, loss)."""
Teacher = Callable[[Tensor, Tensor, torch.Generator], Tensor]
"""teacher(z, t, generator) -> what to predict there, in the network's own space."""
Away = tuple[Cond, float]
"""A negative prompt, and the guidance away from it."""


@dataclass(frozen=True)
class Found:
    """The last value of the variable, and the objective at every ``every``-th step."""

    value: Tensor
    losses: tuple[float, ...]


def search(
    start: Tensor,
    objective: Objective,
    *,
    steps: int,
    lr: float,
    kind: Kind = Kind.ADAM,
    seed: int = 0,
    name: str = "search",
    every: int = 25,
    rate: Callable[[int], float] = constant,
    progress: Progress | None = None,
    seen: Seen | None = None,
) -> Found:
    """Minimise ``objective`` from ``start``, which is not changed. Losses are read once, at the end, unless somebody looks.

    Args:
        rate: factor of ``lr`` at each step.
        seen: shown the variable and the last loss at every ``every``-th step.
    """
    variable = start.detach().clone().requires_grad_()
    phase = Phase(name, [variable], lambda _, g: {"loss": objective(variable, g)}, Optimiser(lr, kind), rate)
    kept = []
    for i in range(steps):
        if progress:
            progress(i, steps)
        losses = phase.step(i, generator_for(seed, name, i))
        if i % every == 0 or i == steps - 1:
            kept.append(losses[f"{name}/loss"])
            if seen is not None:
                seen(variable.detach(), i + 1, float(kept[-1]))
    return Found(variable.detach(), tuple(torch.stack(kept).tolist()) if kept else ())


class EmbeddingEncoder(Protocol):
    """A text encoder that also takes word embeddings, such as the core's own TextEncoder."""

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids [B, L] -> word embeddings [B, L, D], before positions are added."""
        ...

    def __call__(self, ids: Tensor | None = None, *, embeddings: Tensor | None = None) -> Tensor:
        """States [B, L, D]."""
        ...


@dataclass(frozen=True)
class TokenSlot:
    """A prompt with ``n`` pseudo-words in it: textual inversion's variable.

    ``ids`` [1, L] is the tokenised prompt, ``positions`` the places whose word embeddings the variable [n, D] replaces.
    """

    encoder: EmbeddingEncoder
    ids: Tensor
    positions: Sequence[int]

    @cached_property
    def _index(self) -> Tensor:
        """``positions`` where the ids are, copied there once rather than in each step of a search."""
        return moved(torch.tensor(list(self.positions)), self.ids.device)

    def start(self) -> Tensor:
        """The embeddings of the words that are there now, [n, D]."""
        return self.encoder.embed(self.ids)[0, list(self.positions)].detach().clone()

    def states(self, vectors: Tensor) -> Tensor:
        """Text states [1, L, D] with the pseudo-words in place, differentiable in ``vectors`` [n, D]."""
        embeddings = self.encoder.embed(self.ids).detach().to(vectors)
        return self.encoder(embeddings=embeddings.index_copy(1, self._index.to(vectors.device), vectors[None]))


def predicted(
    model: TrainableModel,
    z: Tensor,
    t: Tensor,
    cond: Cond,
    away: Away | None,
    weights: Weights = Weights.STUDENT,
    memory: PromptMemory | None = None,
) -> Tensor:
    """What a sampler goes by: net(z, t, c), or where guidance goes ``away`` from a negative prompt n + g (net(z, t, c) - n),
    n = net(z, t, away), into which no gradient flows."""
    made = model.predict(z, t, cond, weights, memory)
    if away is None:
        return made
    negative, guidance = away
    with torch.no_grad():
        without = model.predict(z, t, negative.gated_as(cond), weights, memory)
    return without + guidance * (made - without)


def denoising_loss(
    model: TrainableModel,
    latents: Tensor,
    cond: Cond,
    generator: torch.Generator,
    *,
    batch: int,
    weights: Weights = Weights.STUDENT,
    memory: PromptMemory | None = None,
    t: Tensor | None = None,
    teacher: Teacher | None = None,
    away: Away | None = None,
) -> Tensor:
    """E || target - net(x_t, t, c) ||^2 over ``batch`` clean latents drawn from a pool [N, C, h, w], any time (or at ``t``
    [batch]), any noise.

    With a free ``cond`` this is textual inversion, Concept Inversion and Dark Miner's mining (L_M).

    Args:
        teacher: gives the target in place of the noise that was drawn. A network that knows the pictures predicts the
            expectation of that noise: the same minimum without its variance.
        away: what guidance goes away from: the guided prediction (:func:`predicted`) is fitted then, which is a search against
            a negative prompt (Concept Inversion's form for it).
    """
    chosen = torch.randint(0, len(latents), (batch,), generator=generator)
    if t is None:
        t = torch.randint(0, len(model.schedule), (batch,), generator=generator)
    x0 = moved(latents[moved(chosen, latents.device)], model.device, model.dtype)
    noise = model.noise(batch, generator)
    z = model.schedule.add_noise(x0, noise, t)
    target = model.schedule.target(model.space, x0, noise, t) if teacher is None else teacher(z, t, generator)
    return F.mse_loss(predicted(model, z, t, cond, away, weights, memory), target)


@dataclass(frozen=True)
class Variable:
    """What mining searches: ``start(generator)`` is where a search begins, ``read(value)`` what the network then reads."""

    start: Callable[[torch.Generator], Tensor]
    read: Callable[[Tensor], Cond]
    unit: float
    """What rates are stated in."""


_WORD_UNIT = 15
"""In deviations of word vectors: a few words must travel further than 76 rows together. At 0.02 it is textual inversion's
usual 5e-3 on CLIP-L's vectors, whose deviation is 0.014."""
_SPREAD = 0.1
"""How far starts lie apart, in deviations of what they start from."""


def free(null: Cond) -> Variable:
    """A whole conditioning but for BOS, [1, L - 1, D], from near the empty prompt's (noise alone is too far from any text
    for a short search)."""
    bos, rest = null.context.detach()[:, :1], null.context.detach()[:, 1:]

    def start(generator: torch.Generator) -> Tensor:
        noise = torch.randn(rest.shape, generator=generator).to(rest)
        return rest + _SPREAD * rest.std(-1, keepdim=True) * noise

    return Variable(
        start, lambda value: null.with_context(torch.cat([bos.to(value), value], dim=1)), float(rest.std(-1).mean())
    )


def pseudo_words(slot: TokenSlot, null: Cond) -> Variable:
    """The vectors [k, D] of a slot's words, read through the text encoder; from near the words that it has now."""
    here = slot.start()

    def start(generator: torch.Generator) -> Tensor:
        return here + _SPREAD * here.std() * torch.randn(here.shape, generator=generator).to(here)

    return Variable(start, lambda value: null.with_context(slot.states(value)), _WORD_UNIT * float(here.std()))


def mine(
    model: TrainableModel,
    latents: Tensor,
    variable: Variable,
    *,
    steps: int,
    rate: float,
    batch: int,
    seed: int,
    name: str,
    progress: Progress | None = None,
    seen: Seen | None = None,
    population: int = 0,
    teacher: Teacher | None = None,
) -> Found:
    """The value that best explains clean latents [k, C, h, w] on the student: Dark Miner's L_M, textual inversion's loss.

    Adam, its rate falling to zero along a cosine and stated in the variable's unit, so that one number suits states and word
    vectors. Each step has one time from every ``batch``-th part of the schedule.

    Args:
        seed, name: which search it is; the start and the noise are drawn from them.
        population: that many values from starts of their own are searched side by side, each for one latent of a step,
            so together they cost what one does (``batch`` counts no more). The value found is then [population, ...].
        teacher: see :func:`denoising_loss`. With one, a search needs a fraction of the steps and fails less often.
    """
    generator = generator_for(seed, name, -1)
    if population:
        start = torch.stack([variable.start(generator) for _ in range(population)]).to(model.device, model.dtype)
        batch = population
    else:
        start = variable.start(generator).to(model.device, model.dtype)
    latents = latents.to(model.device, model.dtype)

    def objective(value: Tensor, generator: torch.Generator) -> Tensor:
        t = model.schedule.indices(spread(batch, generator))
        if not population:
            return denoising_loss(model, latents, variable.read(value), generator, batch=batch, t=t, teacher=teacher)
        cond = Cond.cat([variable.read(x) for x in value])
        t = t[torch.randperm(batch, generator=generator)]  # or one and the same always had the cleanest latents
        # Each has one latent of the mean: its gradient must not shrink with their number.
        return population * denoising_loss(model, latents, cond, generator, batch=batch, t=t, teacher=teacher)

    return search(
        start,
        objective,
        steps=steps,
        lr=rate * variable.unit,
        seed=seed,
        name=name,
        rate=cosine(steps),
        progress=progress,
        seen=seen,
    )
