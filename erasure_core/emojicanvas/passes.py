"""What a training step costs beside the passes of the network that it makes (docs/results/passes.{json,md}).

Every pass that a method makes is seen by hooks on its network: how many latents, how many text rows, whether gradients ran
back through it, and to what. After each step the same passes are made again on a bare copy of the network, with no change,
memory or hook on it, in the same type, and both are timed. So the two share whatever else the machine does, and nothing is
assumed about what a pass should cost.
"""

from __future__ import annotations

import copy
import re
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from ..api import erase
from ..concept import ConceptSpec
from ..methods import Aids, all_methods
from ..operators.train_loop import Phase
from ..operators.trainable import LoRA, TrainableModel
from ..suppress import Settings as Suppress
from ..suppress import suppress
from .bench_settings import aids_for, settings_for
from .model import EmojiCanvasPort
from .rows import Bench

STEPS = 16
WARM_UP = 3
"""Steps at the start that are not counted."""
SHORT: dict[str, Mapping[str, Any]] = {
    "cpe": {"stages": 2, "attack_steps": STEPS},
    "dark_miner": {"rounds": 1, "mine_steps": STEPS, "sample_steps": 4},
}
"""Fewer steps of methods that have more than one kind, beside the iterations."""
SUPPRESS = "suppress mode"


class Back(StrEnum):
    """Where the gradients of a pass ran to."""

    NOWHERE = "forward only"
    WEIGHTS = "to the weights of the trained layers"
    OUTPUTS = "to the outputs of the trained layers, beside which a LoRA is trained"
    TEXT = "to the text"
    ATTENTION = "from the attentions to the weights of the trained layers"


@dataclass(frozen=True)
class Took:
    """Seconds on the clock, and of the processor for all threads together: the second also on a busy machine."""

    wall: float
    cpu: float


class Watch:
    """Took since it was made."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def read(self) -> Took:
        return Took(time.perf_counter() - self._wall, time.process_time() - self._cpu)


@dataclass
class Pass:
    """One call of the network: ``latents`` of them, ``rows`` of text each."""

    latents: int
    rows: int
    grad: bool
    back: Back = Back.NOWHERE


@dataclass
class Interval:
    """From one call of ``progress`` to the next: what was stepped, the passes, and what both took."""

    phases: tuple[str, ...]
    passes: list[Pass]
    took: Took
    bare: Took


class _Tap(torch.autograd.Function):
    """Its input, unchanged; gradients have to come this far, and nothing is computed from them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, end: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        return g, torch.zeros(())


@dataclass
class Meter:
    """Listens to a network in training, and repeats its passes on a bare one."""

    bare: nn.Module
    autocast: torch.dtype | None
    intervals: list[Interval] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    """The layers that are trained, and whether as a LoRA."""
    low_rank: bool = False
    _passes: list[Pass] = field(default_factory=list)
    _open: list[Pass] = field(default_factory=list)
    _phases: list[str] = field(default_factory=list)
    _stepping: Phase | None = None
    _trained: set[int] = field(default_factory=set)
    _watch: Watch = field(default_factory=Watch)

    def listen(self, model: TrainableModel) -> None:
        """Hear every pass of a model from here on."""
        self._model = model
        model.net.register_forward_hook(self._heard)

    def _heard(self, _module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        one = Pass(len(args[0]), args[2].shape[1], out.requires_grad)
        self._passes.append(one)
        if out.requires_grad:
            self._open.append(one)

            def back(_: Tensor) -> None:
                to = Back.OUTPUTS if self.low_rank else Back.WEIGHTS
                one.back = to if self._for_weights else Back.TEXT

            out.register_hook(back)

    @property
    def _for_weights(self) -> bool:
        """Whether the phase that is stepping changes the weights, rather than what the network reads."""
        own = {id(p) for p in self._model.parameters()}
        return self._stepping is not None and any(id(p) in own for p in self._stepping.parameters)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Know which phase takes a step."""
        step = Phase.step

        def heard(phase: Phase, i: int, generator: torch.Generator) -> dict[str, Tensor]:
            self._stepping = phase
            self._open.clear()
            losses = step(phase, i, generator)
            for one in self._open:
                if one.back is Back.NOWHERE:  # the loss did not read the output: gradients began at the attentions
                    one.back = Back.ATTENTION
            self._phases.append(re.sub(r" \d+$", "", phase.name))
            self._stepping = None
            return losses

        Phase.step = heard  # type: ignore[method-assign, assignment]
        self._watch = Watch()
        try:
            yield
        finally:
            Phase.step = step  # type: ignore[method-assign]

    def progress(self, done: int = 0, total: int = 0) -> None:
        """Close the interval: make its passes again, bare, and go on."""
        took = self._watch.read()
        passes, phases = list(self._passes), tuple(dict.fromkeys(self._phases))
        self.intervals.append(Interval(phases, passes, took, self._again(passes)))
        self._passes.clear()
        self._phases.clear()
        self._watch = Watch()

    def _again(self, passes: Sequence[Pass]) -> Took:
        made = [(one, *self._inputs(one)) for one in passes]
        watch = Watch()
        for one, z, t, text in made:
            self._repeat(one, z, t, text)
        return watch.read()

    def _inputs(self, one: Pass) -> tuple[Tensor, Tensor, Tensor]:
        z, text = torch.randn(one.latents, 4, 16, 16), torch.randn(one.latents, one.rows, 128)
        return z, torch.randint(0, 1000, (one.latents,)), text

    def _repeat(self, one: Pass, z: Tensor, t: Tensor, text: Tensor) -> None:
        with self._ends(one, text) as (begin, end), torch.set_grad_enabled(one.grad):
            with torch.autocast("cpu", self.autocast or torch.float32, enabled=self.autocast is not None):
                out = self.bare(z, t, text)
            if end:
                begin = begin or [out]
                torch.autograd.grad(begin, end, [torch.ones_like(x) for x in begin], allow_unused=True)

    @contextmanager
    def _ends(self, one: Pass, text: Tensor) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Where the gradients of a pass begin (nothing: at the output), and where they end."""
        begin: list[Tensor] = []
        layers = [self.bare.get_submodule(name) for name in self.sites]
        weights = [x.weight for x in layers] if one.back in (Back.WEIGHTS, Back.ATTENTION) else []
        end, hooks = list(weights), []
        if one.back is Back.TEXT:
            end = [text.requires_grad_()]
        if one.back is Back.OUTPUTS:
            end = [torch.zeros((), requires_grad=True) for _ in layers]
            for layer, tap in zip(layers, end, strict=True):
                hooks.append(layer.register_forward_hook(lambda _m, _a, out, tap=tap: _Tap.apply(out, tap)))
        if one.back is Back.ATTENTION:
            for name, module in self.bare.named_modules():
                if name.endswith(("attn2.to_q", "attn2.to_k")):
                    hooks.append(module.register_forward_hook(lambda _m, _a, out: begin.append(out)))
        for w in weights:
            w.requires_grad_(True)
        try:
            yield begin, end
        finally:
            for w in weights:
                w.requires_grad_(False)
            for hook in hooks:
                hook.remove()


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
    bf16 = bench.plan.sampler.bf16
    port = HeardPort(canvas, bf16=bf16)
    meter = Meter(copy.deepcopy(canvas.unet).requires_grad_(False), torch.bfloat16 if bf16 else None)
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
