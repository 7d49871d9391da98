"""The population of embeddings that Adversarial trains the weights against: who searches for what, and who retires when."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..operators.cond import Cond
from ..operators.search import free
from ..operators.train_loop import generator_for
from ._training import Wanted, one_of

_STORE = 4
"""So many times the population, former embeddings are kept."""
_CURRENT, _FORMER = 0.55, 0.25
"""Shares of what a step erases; the rest are words."""


class Adversaries:
    """``population`` embeddings [L - 1, D], N with as many more as each concept needs to have the same number, and a store
    [_STORE N, L - 1, D] of former ones.

    Embedding n works for concept n mod the number of concepts. A step attacks with all of them, or with ``batch`` in turn where
    they are more. Each retires after ``life`` attacks of its own, one at a time and in turn, so what happens at a step follows
    from its number alone, and a training that was cut off goes on as it would have.
    """

    def __init__(
        self, concepts: Sequence[Wanted], null: Cond, *, population: int, life: int, batch: int, seed: int, like: Tensor
    ) -> None:
        self.concepts, self._null, self._free = concepts, null.on(like.device, like.dtype), free(null)
        self.count = len(concepts) * -(-population // len(concepts))
        self._batch, self._every = batch, max(1, life // min(batch, self.count))
        generator = generator_for(seed, "adversaries", -1)
        starts = [self._start(n, generator).to(like) for n in range(self.count)]
        self.now = [start.requires_grad_() for start in starts]
        """Leaves of their own: one that doesn't attack has no gradient, and its optimiser waits."""
        self.former = torch.stack(starts).detach().repeat(_STORE, 1, 1).requires_grad_()
        """Slots that nobody has retired to hold the starts."""
        self.unit = self._free.unit

    def concept(self, number: int) -> Wanted:
        """Whom a member of the population, or of the store, works for."""
        return self.concepts[number % self.count % len(self.concepts)]

    def _start(self, number: int, generator: torch.Generator) -> Tensor:
        if torch.rand((), generator=generator) < 0.5:
            return self._free.start(generator)[0]
        length = self._null.context.shape[1]  # of a prompt of several sections the first
        states = self.concept(number).word(generator).context[0, 1:length].detach()
        spread = 0.1 * states.std(-1, keepdim=True)
        return states + spread * torch.randn(states.shape, generator=generator).to(states)

    def read(self, values: Tensor) -> Cond:
        """As the network reads them, BOS in front."""
        bos = self._null.context[:, :1].to(values)
        return self._null.with_context(torch.cat([bos.expand(len(values), -1, -1), values], dim=1))

    @torch.no_grad()
    def retire(self, i: int, generator: torch.Generator) -> None:
        """Before step ``i``: whose time has come goes to the store and starts anew."""
        turn, rest = divmod(i, self._every)
        if rest or not turn:
            return
        number = turn % self.count
        self.former[turn % len(self.former)].copy_(self.now[number])
        self.now[number].copy_(self._start(number, generator))

    def places(self, i: int) -> list[int]:
        """Whom each picture of step ``i`` is for: all as often, or nearly; where they are more than pictures, these in turn."""
        first = i * self._batch if self._batch < self.count else 0
        return sorted((first + k) % self.count for k in range(self._batch))

    def draw(self, n: int, i: int, generator: torch.Generator) -> list[tuple[Wanted, Cond]]:
        """``n`` conditionings to erase at step ``i``, each with its concept."""
        stored = min(i // self._every, len(self.former))
        drawn = []
        for kind in torch.rand(n, generator=generator).tolist():
            if kind < _CURRENT or (kind < _CURRENT + _FORMER and not stored):
                number = one_of(self.count, generator)
                drawn.append((self.concept(number), self.read(self.now[number].detach()[None])))
            elif kind < _CURRENT + _FORMER:
                # turn 1 went to slot 1: of a store that isn't full, slots 1 to ``stored`` are taken
                number = (1 + one_of(stored, generator)) % len(self.former)
                drawn.append((self.concept(number), self.read(self.former[number : number + 1].detach())))
            else:
                concept = self.concepts[one_of(len(self.concepts), generator)]
                drawn.append((concept, concept.word(generator)))
        return drawn
