"""Search: optimise what the network reads (METHODS 1.8). The inner loop of a defence and the whole of an attack.

The variable is any tensor: a full conditioning [1, L, D], the rows of a prompt memory, or the vectors of pseudo-words that
go through the text encoder (:class:`TokenSlot`). The network's weights stay; the gradient reaches the variable only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .memory import PromptMemory
from .train_loop import Kind, Optimiser, Phase, Progress, generator_for
from .trainable import Cond, TrainableModel, Weights

Objective = Callable[[Tensor, torch.Generator], Tensor]
"""objective(variable, generator) -> scalar to minimise; draws its noise from the generator."""
Projection = Callable[[Tensor], Tensor]
"""Applied to the variable behind every step."""


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
    projection: Projection | None = None,
    seed: int = 0,
    name: str = "search",
    every: int = 25,
    progress: Progress | None = None,
) -> Found:
    """Minimise ``objective`` from ``start``, which is not changed. Losses are read once, at the end."""
    variable = start.detach().clone().requires_grad_()

    def project() -> None:
        if projection is not None:
            with torch.no_grad():
                variable.copy_(projection(variable))

    phase = Phase(name, [variable], lambda _, g: {"loss": objective(variable, g)}, Optimiser(lr, kind), after=project)
    kept = []
    for i in range(steps):
        if progress:
            progress(i, steps)
        losses = phase.step(i, generator_for(seed, name, i))
        if i % every == 0 or i == steps - 1:
            kept.append(losses[f"{name}/loss"])
    return Found(variable.detach(), tuple(torch.stack(kept).tolist()) if kept else ())


def linf_ball(centre: Tensor, radius: float) -> Projection:
    """Each entry within ``radius`` of the centre's (RACE)."""
    return lambda x: torch.maximum(torch.minimum(x, centre + radius), centre - radius)


def l2_ball(centre: Tensor, radius: float) -> Projection:
    """Within Euclidean distance ``radius`` of the centre, over all entries."""

    def project(x: Tensor) -> Tensor:
        offset = x - centre
        return centre + offset * (radius / offset.norm().clamp_min(1e-12)).clamp(max=1)

    return project


def row_norms(norm: float) -> Projection:
    """Rows scaled to one norm: pseudo-words of the length that words have."""
    return lambda x: F.normalize(x, dim=-1) * norm


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

    def start(self) -> Tensor:
        """The embeddings of the words that are there now, [n, D]."""
        return self.encoder.embed(self.ids)[0, list(self.positions)].detach().clone()

    def states(self, vectors: Tensor) -> Tensor:
        """Text states [1, L, D] with the pseudo-words in place, differentiable in ``vectors`` [n, D]."""
        index = torch.tensor(list(self.positions), device=vectors.device)
        embeddings = self.encoder.embed(self.ids).detach().to(vectors)
        return self.encoder(embeddings=embeddings.index_copy(1, index, vectors[None]))


def denoising_loss(
    model: TrainableModel,
    latents: Tensor,
    cond: Cond,
    generator: torch.Generator,
    *,
    batch: int,
    weights: Weights = Weights.STUDENT,
    memory: PromptMemory | None = None,
) -> Tensor:
    """E || target - net(x_t, t, c) ||^2 over ``batch`` clean latents drawn from a pool [N, C, h, w], any time, any noise.

    With a free ``cond`` this is textual inversion, Concept Inversion and Dark Miner's mining (L_M).
    """
    chosen = torch.randint(0, len(latents), (batch,), generator=generator)
    t = torch.randint(0, len(model.schedule), (batch,), generator=generator)
    x0, noise = latents[chosen.to(latents.device)].to(model.device, model.dtype), model.noise(batch, generator)
    prediction = model.predict(model.schedule.add_noise(x0, noise, t), t, cond, weights, memory)
    return F.mse_loss(prediction, model.schedule.target(model.space, x0, noise, t))
