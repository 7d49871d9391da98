"""Trainings without their steps: what each asks of the sampler, the network and its losses, and what it would step with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from erasure_core import ConceptSpec, Erasure
from erasure_core.methods import Aids, _training, duo
from erasure_core.operators.cond import Cond
from erasure_core.operators.train_loop import Phase, Trainer, generator_for
from erasure_core.operators.trainable import TrainableModel, Weights
from erasure_core.pairs import ConceptPairs

SPEC = ConceptSpec.parse("cat, red apple\nbomb", "pear\nriver")
IN_TURN = ["cat", "bomb", "red apple", "bomb"]
"""Each concept is met as often, one with fewer words more often by each."""
KEPT = replace(SPEC, keep=("orchard", "pear"))
ALONE = replace(SPEC, erase=SPEC.erase[:1])
TEXTS = ("", "cat", "red apple", "bomb", "cat, red apple, bomb", "pear", "river", "orchard")


def quiet(done: int, total: int) -> None:
    pass


def named(port, contexts: Tensor, texts: Sequence[str] = TEXTS) -> list[str]:
    """Whose text states these are."""
    known = {text: port.conditions([text])[0].context[0] for text in texts}
    return [next((text for text, x in known.items() if torch.allclose(x, row, atol=1e-5)), "?") for row in contexts]


def falling(i: int, steps: int) -> float:
    """Half a cosine, from 1."""
    return (1 + math.cos(math.pi * i / steps)) / 2


SHORT = {"sample_steps": 2, "pictures": 2, "stages": 2, "rounds": 1, "mine_steps": 1}
"""What makes a run without its steps quick; a method takes those that it has."""


def run(method: ModuleType, port, spec: ConceptSpec = SPEC, aids: Aids | None = None, **settings: Any) -> Erasure:
    """A method at its defaults but for these settings and :data:`SHORT`."""
    names = {field.name for field in fields(method.Settings)}
    short = {name: value for name, value in SHORT.items() if name in names}
    if aids is None:
        aids = Aids(pairs=ConceptPairs(coloured(4), -coloured(4), (("", ""),), port.family) if method is duo else None)
    return method.run(port, spec, method.Settings(**{**short, **settings}), quiet, aids)


def instead(monkeypatch, look: Callable[[Trainer], object]) -> None:
    """Trainings do ``look`` in the place of their steps."""

    def run(self: Trainer, *_args, **_more) -> Trainer:
        look(self)
        return self

    monkeypatch.setattr(Trainer, "run", run)


def losses(phase: Phase, i: int = 0) -> dict[str, float]:
    """Those of step ``i``."""
    made = phase.loss(i, generator_for(0, phase.name, i))
    return {name: float(torch.as_tensor(loss).detach()) for name, loss in made.items()}


def answers(monkeypatch, owner: Any, **values: Any) -> dict[str, list[dict[str, Any]]]:
    """Functions of ``owner`` give these values from here on. Returns what each is called with, by argument."""
    asked: dict[str, list[dict[str, Any]]] = {name: [] for name in values}

    def standing_in(name: str, value: Any) -> Callable[..., Any]:
        signature = inspect.signature(getattr(owner, name))

        def answer(*args: Any, **more: Any) -> Any:
            asked[name].append(signature.bind(*args, **more).arguments)
            return value

        return answer

    for name, value in values.items():
        monkeypatch.setattr(owner, name, standing_in(name, value))
    return asked


@dataclass(frozen=True)
class Sampled:
    context: Tensor
    weights: Weights
    progress: float


def sampled(monkeypatch, module=_training) -> list[Sampled]:
    """What is asked of the sampler from here on; noise is what it gives."""
    asked: list[Sampled] = []

    def on_policy(model, cond, null, settings, generator, weights, progress) -> tuple[Tensor, Tensor]:
        asked.append(Sampled(cond.context.detach().clone(), weights, progress))
        t = torch.full((len(cond),), model.schedule.time_at(progress), dtype=torch.long)
        return model.noise(len(cond), generator), t

    monkeypatch.setattr(module, "on_policy", on_policy)
    return asked


@dataclass(frozen=True)
class Read:
    z: Tensor
    t: Tensor
    cond: Cond
    weights: Weights


def reads(monkeypatch) -> list[Read]:
    """The passes from here on. Pooled text is noted, and not read."""
    seen, plain = [], TrainableModel.predict

    def predict(self, z: Tensor, t: Tensor, cond: Cond, weights=Weights.STUDENT, memory=None) -> Tensor:
        seen.append(Read(z, t, cond, weights))
        return plain(self, z, t, Cond(cond.context), weights, memory)

    monkeypatch.setattr(TrainableModel, "predict", predict)
    return seen


def coloured(count: int) -> Tensor:
    """Pictures whose number can be read through noise at any time."""
    return 100 * torch.arange(1, count + 1).view(-1, 1, 1, 1).expand(-1, 4, 4, 4).float()


def numbers(port, read: Read) -> list[int]:
    """Which of those pictures a network is shown."""
    return (read.z.mean((1, 2, 3)) / port.schedule.signal[read.t] / 100 - 1).round().int().tolist()
