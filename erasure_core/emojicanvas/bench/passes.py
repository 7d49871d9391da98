"""What a training step costs beside the passes of the network that it makes (docs/results/passes.{json,md}).

Steps, and after each one the passes that it made, again on a bare network (pass_meter.py), are timed in turn. So the two
share whatever else the machine does, and nothing is assumed about what a pass should cost.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...api import erase
from ...concept import ConceptSpec
from ...methods import Aids, all_methods
from ...operators.changes import LoRA
from ...operators.trainable import TrainableModel
from ...suppress import Settings as Suppress
from ...suppress import suppress
from ..model import EmojiCanvasPort
from .pass_meter import Back, Interval, Meter, Pass
from .rows import Bench
from .settings import aids_for, settings_for

STEPS = 16
WARM_UP = 3
"""Steps at the start that are not counted."""
SHORT: dict[str, Mapping[str, Any]] = {
    "cpe": {"stages": 2, "attack_steps": STEPS},
    "dark_miner": {"rounds": 1, "mine_steps": STEPS, "sample_steps": 4},
}
"""Fewer steps of methods that have more than one kind, beside the iterations."""
SUPPRESS = "suppress mode"


class HeardPort(EmojiCanvasPort):
    """The port whose trainings a meter listens to."""

    meter: Meter

    def trainable(self) -> TrainableModel:
        model = super().trainable()
        train = model.train

        def chosen(what: Any, seed: int = 0) -> list[nn.Parameter]:
            made = train(what, seed)
            self.meter.sites = [s.name for s in model.sites if what.layers.covers(s.name)]
            self.meter.low_rank = isinstance(what, LoRA)
            return made

        model.train = chosen  # type: ignore[method-assign]
        self.meter.listen(model)
        return model


def heard(bench: Bench, method: str, steps: int = STEPS) -> list[Interval]:
    """Every interval of a short training of the first thing that the plan erases."""
    erasing, canvas = bench.plan.erasings()[0], bench.studio.model
    bf16 = bench.studio.bf16
    port = HeardPort(canvas, bf16=bf16)
    meter = Meter(copy.deepcopy(canvas.unet).requires_grad_(False))
    spec: ConceptSpec = bench.spec(erasing)
    aids = (
        aids_for(method, EmojiCanvasPort(canvas, bf16=bf16), erasing, bench.studio.judge)
        if method != SUPPRESS
        else Aids()
    )
    port.meter = meter
    with meter.stepping():
        if method == SUPPRESS:
            suppress(port, spec, Suppress(iterations=steps), meter.progress, aids)
        else:
            short = {"iterations": steps, **SHORT.get(method, {})}
            erase(port, spec, method, settings_for(method, short), meter.progress, aids)
        meter.progress()
    return meter.intervals


@dataclass(frozen=True)
class Cost:
    """The steps of one kind."""

    method: str
    step: str
    steps: int
    forward: float
    """Passes without gradient of a step, in the mean, and how many latents are in one."""
    forward_latents: float
    backward: float
    backward_latents: float
    seconds: float
    """Median of the whole step."""
    bare: float
    multiple: float | None
    """Median of step over bare passes, step by step; None where there are no passes."""
    cpu_multiple: float | None
    """The same in time of the processor."""


def costs(method: str, intervals: Sequence[Interval]) -> list[Cost]:
    """One for each kind of step, by the names of its phases. Intervals without a step are not among them."""
    out = []
    for phases in dict.fromkeys(x.phases for x in intervals if x.phases):
        # The first ones warm up; each search and each stage has its own, so they are dropped once.
        same = [x for x in intervals if x.phases == phases][WARM_UP:]
        if not same:
            continue
        ratios = [(x.took.wall / x.bare.wall, x.took.cpu / x.bare.cpu) for x in same if x.passes]
        wall, cpu = zip(*ratios, strict=True) if ratios else ((), ())
        forward = [p for x in same for p in x.passes if p.back is Back.NOWHERE]
        backward = [p for x in same for p in x.passes if p.back is not Back.NOWHERE]

        def mean(passes: Sequence[Pass]) -> float:
            return statistics.fmean(p.latents for p in passes) if passes else 0.0

        out.append(
            Cost(
                method, " + ".join(phases), len(same), len(forward) / len(same), mean(forward),
                len(backward) / len(same), mean(backward), statistics.median(x.took.wall for x in same),
                statistics.median(x.bare.wall for x in same), statistics.median(wall) if wall else None,
                statistics.median(cpu) if cpu else None,
            )
        )  # fmt: skip
    return out


def beside(intervals: Sequence[Interval]) -> float:
    """Seconds before, between and after the steps that are not passes: copying the network, text, storing the change."""
    return sum(x.took.wall - x.bare.wall for x in intervals if not x.phases)


def trained() -> list[str]:
    """Every method that trains, and suppress mode."""
    return [name for name, spec in all_methods().items() if spec.trains] + [SUPPRESS]
