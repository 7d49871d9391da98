"""Which passes of its network a training makes, and what they take on a bare one.

Hooks on the network see every call: how many latents, how many text rows, whether gradients ran back through it, and to
what. Between steps the same calls are made again on a bare copy, with no change, memory or hook on it, in the same type.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, nn

from ...operators.train_loop import Phase
from ...operators.trainable import TrainableModel


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
    half: bool = False
    """Whether it computed in bfloat16."""


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
    intervals: list[Interval] = field(default_factory=list)
    sites: list[str] = field(default_factory=list)
    """The layers that are trained, and whether as a LoRA."""
    low_rank: bool = False
    _passes: list[Pass] = field(default_factory=list)
    _open: list[Pass] = field(default_factory=list)
    _phases: list[str] = field(default_factory=list)
    _stepping: Phase | None = None
    _watch: Watch = field(default_factory=Watch)

    def listen(self, model: TrainableModel) -> None:
        """Hear every pass of a model from here on."""
        self._model = model
        model.net.register_forward_hook(self._heard)

    def _heard(self, _module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> None:
        one = Pass(len(args[0]), args[2].shape[1], out.requires_grad, half=torch.is_autocast_enabled("cpu"))
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
            with torch.autocast("cpu", torch.bfloat16, enabled=one.half):
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
