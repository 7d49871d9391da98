"""The training loop of every trained eraser: phases that take turns, one optimiser each.

Deterministic: step i of a phase draws from its own generator, seeded by (seed, phase, i), so the same seed gives the same
artefact and a resumed run equals an uninterrupted one. Cancelling is raising from ``progress``.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor

from ..devices import has_float64
from .checkpoint import Checkpoint
from .trainable import TrainableModel, Weights

Progress = Callable[[int, int], object]
"""Called as progress(done, total) before every iteration and at the end; may raise to cancel."""
Watch = Callable[[TrainableModel, int, Mapping[str, float]], object]
"""Called as watch(model in training, iterations done, mean of each loss since the last call); it may draw with the model."""


class TrainingFailedError(ValueError):
    """The losses are no longer numbers."""


class Kind(StrEnum):
    ADAM = "adam"
    ADAMW = "adamw"
    SGD = "sgd"


@dataclass(frozen=True)
class Optimiser:
    """Adam's betas are the usual (0.9, 0.999), the default of every paper here.

    Weight decay pulls the *change* to zero; in the papers' full fine-tuning it shrinks the weights themselves.
    """

    lr: float
    kind: Kind = Kind.ADAM
    weight_decay: float = 0.0

    def make(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        match self.kind:
            case Kind.ADAM:
                return torch.optim.Adam(parameters, self.lr, weight_decay=self.weight_decay)
            case Kind.ADAMW:
                return torch.optim.AdamW(parameters, self.lr, weight_decay=self.weight_decay)
        return torch.optim.SGD(parameters, self.lr, weight_decay=self.weight_decay)


def constant(_: int) -> float:
    """The learning rate as it is."""
    return 1.0


def cosine(iterations: int, *, restarts: int = 1, warmup: int = 0) -> Callable[[int], float]:
    """Linear warm-up, then ``restarts`` half cosines from 1 to 0, each starting anew."""

    def rate(i: int) -> float:
        if i < warmup:
            return (i + 1) / warmup
        done = (i - warmup) / max(1, iterations - warmup)
        return 0.5 * (1 + math.cos(math.pi * (restarts * done % 1.0)))

    return rate


@dataclass(eq=False)
class Phase:
    """One of the steps that an iteration consists of: ``parameters`` go down the sum of the losses that ``loss`` returns.

    ``loss(i, generator)`` gives named, already weighted losses; no gradient reaches any tensor but ``parameters``.
    """

    name: str
    parameters: Sequence[Tensor]
    loss: Callable[[int, torch.Generator], Mapping[str, Tensor]]
    optimiser: Optimiser
    rate: Callable[[int], float] = constant
    """Factor of the learning rate at each step; where it is 0 the phase rests."""
    clip: float | None = None
    """Largest norm of the whole gradient."""
    after: Callable[[], object] | None = None
    """Called behind every step, for projections."""
    repeat: int = 1
    """Its steps in each iteration; they are counted through."""
    made: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = list(self.parameters)
        self.made = self.optimiser.make(self.parameters)

    def step(self, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One step; returns the losses, detached."""
        for group in self.made.param_groups:
            group["lr"] = self.optimiser.lr * self.rate(i)
        with torch.enable_grad():  # callers may be under no_grad
            losses = self.loss(i, generator)
            total = sum(losses.values(), start=torch.zeros(()))
            gradients = torch.autograd.grad(total, self.parameters, allow_unused=True)
        if self.clip is not None:
            gradients = _clipped(gradients, self.clip)
        for p, g in zip(self.parameters, gradients, strict=True):
            p.grad = g
        self.made.step()
        self.made.zero_grad(set_to_none=True)
        if self.after is not None:
            self.after()
        return {f"{self.name}/{k}": v.detach() for k, v in losses.items()}


def _clipped(gradients: Sequence[Tensor | None], largest: float) -> tuple[Tensor | None, ...]:
    """Scaled down together where their common norm is larger. Out of place: gradients of sums share memory."""
    norms = [g.norm() for g in gradients if g is not None]
    if not norms:
        return tuple(gradients)
    factor = (largest / (torch.stack(norms).norm() + 1e-6)).clamp(max=1)
    return tuple(None if g is None else g * factor for g in gradients)


def _copied(x: Tensor) -> Tensor:
    return x.detach().to("cpu", copy=True)


def generator_for(seed: int, name: str, i: int) -> torch.Generator:
    """The randomness of step ``i`` of the phase ``name``; on the CPU, so that devices agree."""
    digest = hashlib.sha256(f"{seed}/{name}/{i}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class Trainer:
    """Runs ``iterations`` rounds over the phases, in their order."""

    def __init__(
        self,
        model: TrainableModel,
        phases: Sequence[Phase],
        iterations: int,
        *,
        seed: int = 0,
        average: float | None = None,
    ) -> None:
        self.model, self.phases, self.iterations, self.seed, self.average = (
            model,
            list(phases),
            iterations,
            seed,
            average,
        )
        self.done = 0
        if len({p.name for p in self.phases}) < len(self.phases):
            raise ValueError("two phases of a training have one name")
        if average is not None:
            model.start_average()

    def run(
        self,
        progress: Progress | None = None,
        watch: Watch | None = None,
        *,
        every: int = 25,
        until: int | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> Trainer:
        """Train up to iteration ``until`` (default: all).

        Losses stay on the device and are read once in ``every`` iterations, so the device is never waited for. With a
        ``checkpoint`` it begins where that was cut off, and ends as if it had not been; the file is gone at the end.

        Raises:
            TrainingFailedError: a loss is no longer a number.
        """
        end = self.iterations if until is None else min(until, self.iterations)
        sums: dict[str, Tensor] = {}
        counts = Counter[str]()
        if checkpoint is not None:
            self._continue(checkpoint)
        due = time.monotonic() + (0.0 if checkpoint is None else checkpoint.pause(0.0))
        while self.done < end:
            if progress:
                progress(self.done, self.iterations)
            for phase in self.phases:
                for i in range(self.done * phase.repeat, (self.done + 1) * phase.repeat):
                    if not phase.rate(i):
                        continue
                    for name, loss in phase.step(i, generator_for(self.seed, phase.name, i)).items():
                        sums[name] = sums[name] + loss if name in sums else loss
                        counts[name] += 1
            if self.average is not None:
                self.model.update_average(self.average)
            self.done += 1
            if self.done % every == 0 or self.done == end:
                self._read(sums, counts, watch)
                sums, counts = {}, Counter()
            if checkpoint is not None and (began := time.monotonic()) >= due:
                checkpoint.keep(self.state_dict())
                saved = time.monotonic()
                due = saved + checkpoint.pause(saved - began)
        if progress and self.done == self.iterations:
            progress(self.done, self.iterations)
        if checkpoint is not None and self.done == self.iterations:
            checkpoint.remove()
        return self

    def _continue(self, checkpoint: Checkpoint) -> None:
        """A method of its own, so that the state that was read is given back before training goes on."""
        state = checkpoint.load()
        if state is not None:
            self.load_state_dict(state)

    def _read(self, sums: Mapping[str, Tensor], counts: Mapping[str, int], watch: Watch | None) -> None:
        wide = torch.float64 if has_float64(self.model.device) else torch.float32
        values = torch.stack([x.to(wide) for x in sums.values()]).tolist() if sums else []
        means = {name: value / counts[name] for name, value in zip(sums, values, strict=True)}
        broken = [name for name, value in means.items() if not math.isfinite(value)]
        if broken:
            raise TrainingFailedError(
                f"training: the loss {broken[0]!r} is no longer a number after {self.done} steps. Lower the learning rate"
            )
        if watch:
            watch(self.model, self.done, means)

    def state_dict(self) -> dict[str, Tensor]:
        """All that a later run needs to continue, by name: copies in main memory, since a device may have no room for them."""
        state = {"done": torch.tensor(self.done)}
        for phase in self.phases:
            for i, p in enumerate(phase.parameters):
                state[f"{phase.name}/{i}"] = _copied(p)
                for name, value in phase.made.state.get(p, {}).items():
                    state[f"{phase.name}/{i}/{name}"] = _copied(value)
        for i, p in enumerate(self._averages()):
            state[f"average/{i}"] = _copied(p)
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Continue from :meth:`state_dict` of a trainer that was made in the same way."""
        self.done = int(state["done"])
        for phase in self.phases:
            moments: dict[int, dict[str, Tensor]] = {}
            for i, p in enumerate(phase.parameters):
                p.copy_(state[f"{phase.name}/{i}"])
                start = f"{phase.name}/{i}/"
                moments[i] = {k.removeprefix(start): v.clone() for k, v in state.items() if k.startswith(start)}
            groups = phase.made.state_dict()["param_groups"]
            phase.made.load_state_dict({"state": {i: x for i, x in moments.items() if x}, "param_groups": groups})
        for i, p in enumerate(self._averages()):
            p.copy_(state[f"average/{i}"])

    def _averages(self) -> Sequence[Tensor]:
        return [] if self.average is None else self.model.parameters(Weights.AVERAGE)
