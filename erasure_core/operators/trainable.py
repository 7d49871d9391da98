"""The trainable view of a model: a frozen network, and beside it what is trained.

The network's own weights are never changed: each trained layer computes ``W x + change(x)``, the second term added by a
forward hook. So the reference prediction is the same network with the hook off, a cancelled run leaves nothing behind, and
what was trained is the weight change itself. Passes that nothing is learned from, as those of sampling, take a LoRA into a
weight of their own, ``(W + change) x``, which is quicker.

Only the linear layers of transformer blocks can be trained. Convolutions (and SD 1.x's 1x1 ``proj_in/out``), the residual
blocks and the time embedding stay fixed: a change of theirs has no 2-D form that every LoRA reader takes.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from functools import partial
from itertools import pairwise
from typing import Any, Protocol, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..artifact import Delta
from ..devices import moved, unrounded
from ..port import ModelPort, Prediction, Role, Site
from ..schedule import Schedule, space_of
from .changes import Full, FullWeights, LoRA, LowRank, role_of, truncated
from .cond import Cond
from .gates import GATES, added
from .memory import PromptMemory

_BLOCK = re.compile(r"transformer_blocks\.\d+$")


class Weights(StrEnum):
    """Whose prediction: with the change being trained, without it, or with its running average."""

    STUDENT = "student"
    FROZEN = "frozen"
    AVERAGE = "ema"


class TrainablePort(ModelPort, Protocol):
    """A port that can also be trained on."""

    def linears(self) -> Sequence[Site]:
        """Every matrix that an erasure may change: those of ``sites()`` and the other ones of transformer blocks."""
        ...

    def trainable(self) -> TrainableModel:
        """A private replica of the network, effective weights, float32, on the compute device. Close it after use."""
        ...

    def conditions(self, prompts: Sequence[str]) -> list[Cond]:
        """Each prompt as the network reads it, a batch of one each."""
        ...


def linear_sites(net: nn.Module) -> list[Site]:
    """Every linear layer inside a transformer block, in network order."""
    return [
        Site(name, role_of(name), m.in_features, m.out_features)
        for name, m in net.named_modules()
        if isinstance(m, nn.Linear) and "transformer_blocks." in name
    ]


def blocks_of(net: nn.Module) -> list[nn.Module]:
    """The parts of a UNet that are worth computing again in the backward pass: transformer and residual blocks."""
    return [m for name, m in net.named_modules() if _BLOCK.search(name) or type(m).__name__ == "ResBlock"]


def rows_of(latent_shape: tuple[int, int, int]) -> int:
    """Rows of a pass without gradients at most: as many as take the room of sixteen of 512 pixels, and two of any size."""
    _, h, w = latent_shape
    return max(2, 16 * 64 * 64 // (h * w))


def _goes_inside(change: nn.Module | None) -> TypeGuard[LowRank]:
    """Where nothing is learned from a pass, rounding the changed weight as the weight is does no harm."""
    return isinstance(change, LowRank) and not torch.is_grad_enabled()


class TrainableModel(AbstractContextManager["TrainableModel"]):
    """A plain network ``net(z, t, context, **extra)`` with trainable changes beside its weights.

    Use as a context manager: leaving it takes all hooks off, whatever happened. The network itself must not recompute
    parts of its forward pass during backward (gradient checkpointing): by then the change may be off.

    Args:
        sites: the linear layers that can be trained, by their path in ``net``; default: :func:`linear_sites`, whose names
            are paths.
        autocast: compute in this type. bfloat16 in all passes; float16, whose gradients need scaling, in sampling only.
        checkpoint: keep no activations inside the blocks, compute them again in the backward pass, the change as it was.
    """

    def __init__(
        self,
        net: nn.Module,
        schedule: Schedule,
        prediction: Prediction,
        latent_shape: tuple[int, int, int],
        *,
        sites: Mapping[str, Site] | None = None,
        autocast: torch.dtype | None = None,
        checkpoint: bool = False,
    ) -> None:
        self.net, self.schedule, self.prediction, self.latent_shape = net, schedule, prediction, latent_shape
        self.autocast, self.checkpoint, self._precise = autocast, checkpoint, False
        self.space = space_of(prediction)
        self.rows = rows_of(latent_shape)
        """Passes that nothing is learned from, as those of sampling, are made with so many rows at a time. Less memory takes a
        smaller number; what is predicted is the same but for rounding."""
        sites = sites or {site.name: site for site in linear_sites(net)}
        self.sites, self._paths = list(sites.values()), {site.name: path for path, site in sites.items()}
        self._changes: dict[Weights, dict[str, Any]] = {Weights.STUDENT: {}, Weights.FROZEN: {}}
        self._active: Mapping[str, Any] = {}
        self._memory: PromptMemory | None = None
        self.reads: PromptMemory | None = None
        """What the student reads where a call names no memory: a memory that is trained without the weights."""
        self._otherwise, self._open = torch.zeros(1, 0), torch.zeros(1, 0)
        self._required = [(p, p.requires_grad) for p in net.parameters()]
        for p, _ in self._required:
            p.requires_grad_(False)
        self._hooks = []
        self._forwards: list[tuple[nn.Module, Any]] = []
        for site in self.sites:
            module = self.module(site.name)
            self._forwards.append((module, module.__dict__.get("forward")))
            module.forward = self._with_change_inside(site.name, module)
            self._hooks.append(module.register_forward_hook(self._add_change(site.name)))
            if site.role is not Role.OTHER:
                self._hooks.append(module.register_forward_pre_hook(self._add_memory(site.name)))
        first = next(net.parameters())
        self.device = first.device
        self.dtype = first.dtype if autocast is None else torch.float32  # weights may be stored in the autocast type
        self._blocks = blocks_of(net) if checkpoint else []
        for block in self._blocks:
            block.forward = self._recomputed(block.forward)

    def gate(self, changes: Sequence[Mapping[str, Delta]], otherwise: Sequence[float]) -> None:
        """From here on, in every prediction, each of ``changes`` (by site) is added to the weights as far as the conditioning's
        GATES [B, n] say; as far as ``otherwise`` [n] says where it has none."""
        self._otherwise = moved(torch.tensor([list(otherwise)]), self.device, self.dtype)
        for i, deltas in enumerate(changes):
            for name, delta in deltas.items():
                if delta.rank:
                    here = delta.on(self.device, self.autocast or self.dtype)  # in what passes are made in
                    hook = added(here, partial(self._opened, i))
                    self._hooks.append(self.module(name).register_forward_hook(hook))

    def _opened(self, gate: int) -> Tensor:
        """How far a gate is open in the pass that is made, [B]."""
        return self._open[:, gate]

    @property
    def at_once(self) -> int:
        """Pictures to draw side by side: as many as take the room of eight of 512 pixels, and no more than eight."""
        _, h, w = self.latent_shape
        return max(1, min(8, 8 * 64 * 64 // (h * w)))

    def module(self, site: str) -> nn.Module:
        """The layer of a site."""
        return self.net.get_submodule(self._paths[site])

    def parent(self, site: str) -> nn.Module:
        """The module that the layer of a site is part of, an attention for example."""
        return self.net.get_submodule(self._paths[site].rpartition(".")[0])

    def _recomputed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if not (self.checkpoint and torch.is_grad_enabled()):
                return forward(*args, **kwargs)
            then = self._active, self._memory, self._open

            def again(*args: Any, **kwargs: Any) -> Any:
                now = self._active, self._memory, self._open
                self._active, self._memory, self._open = then
                try:
                    return forward(*args, **kwargs)
                finally:
                    self._active, self._memory, self._open = now

            return checkpoint(again, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)

        return run

    def _add_change(self, name: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        def hook(_module: nn.Module, args: Any, out: Tensor) -> Tensor | None:
            change = self._active.get(name)
            return None if change is None or _goes_inside(change) else out + change(args[0])

        return hook

    def _with_change_inside(self, name: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The layer's forward pass that sampling with a LoRA makes: one product, rather than three with all the rows."""
        forward = module.forward

        def run(x: Tensor) -> Tensor:
            change = self._active.get(name)
            if not _goes_inside(change):
                return forward(x)
            return F.linear(x, change.into(module.weight), module.bias)

        return run

    def _add_memory(self, name: str) -> Callable[[nn.Module, Any], Any]:
        def hook(_module: nn.Module, args: Any) -> Any:
            return None if self._memory is None else (self._memory.extend(name, args[0]), *args[1:])

        return hook

    def close(self) -> None:
        """Take every hook off; the network is what it was."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for module, own in self._forwards:
            del module.forward  # the class's again
            if own is not None:
                module.forward = own
        self._forwards.clear()
        for block in self._blocks:
            del block.forward
        self._blocks.clear()
        for p, required in self._required:
            p.requires_grad_(required)
        self._required.clear()

    def __exit__(self, *_: object) -> None:
        self.close()

    def train(self, what: FullWeights | LoRA, seed: int = 0) -> list[nn.Parameter]:
        """Choose what is trained, from zero change; returns its parameters, in network order.

        Raises:
            ValueError: the network has no such layers, or the rank is below one.
        """
        chosen = [s for s in self.sites if what.layers.covers(s.name)]
        if not chosen:
            raise ValueError(f"model: it has no linear layers of the kind {what.layers.value!r} in transformer blocks")
        if isinstance(what, LoRA) and what.rank < 1:
            raise ValueError(f"rank must be at least 1, got {what.rank}")
        generator = torch.Generator().manual_seed(seed)
        changes = {
            s.name: (Full(s) if isinstance(what, FullWeights) else LowRank(s, what, generator)).to(
                self.device, torch.float64 if self.dtype == torch.float64 else torch.float32
            )
            for s in chosen
        }
        self._changes = {Weights.STUDENT: changes, Weights.FROZEN: {}}
        return self.parameters()

    def parameters(self, weights: Weights = Weights.STUDENT) -> list[nn.Parameter]:
        """The tensors of a set of changes, in a fixed order."""
        return [p for change in self._changes[weights].values() for p in change.parameters()]

    def change(self, site: str) -> nn.Module:
        """What the student adds to a trained layer's output, as a function of the layer's input."""
        return self._student[site]

    def tensors(self) -> dict[str, Tensor]:
        """The student's parameters by name, to save."""
        return {f"change/{i}": p.detach() for i, p in enumerate(self.parameters())}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take the parameters from :meth:`tensors` of a training of the same layers."""
        for i, p in enumerate(self.parameters()):
            p.copy_(state[f"change/{i}"])

    def start_average(self) -> None:
        """Keep a running average of the change from here on."""
        average = {name: copy.deepcopy(change).requires_grad_(False) for name, change in self._student.items()}
        self._changes[Weights.AVERAGE] = average

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average <- decay average + (1 - decay) student."""
        torch._foreach_lerp_(self.parameters(Weights.AVERAGE), self.parameters(), 1 - decay)

    @property
    def _student(self) -> dict[str, Any]:
        return self._changes[Weights.STUDENT]

    def deltas(self, weights: Weights = Weights.STUDENT, energy: float = 1.0) -> dict[str, Delta]:
        """What was trained, float32 on the CPU: exact factors of a LoRA, a dense matrix of full weights.

        ``energy`` below 1 stores dense changes at the lowest rank that holds this share of their squared singular
        values, so that they fit a LoRA file; it leaves LoRAs as they are.
        """
        exported = {name: change.export() for name, change in self._changes[weights].items()}
        return {name: truncated(delta, energy) for name, delta in exported.items()}

    def predict(
        self,
        z: Tensor,
        t: Tensor,
        cond: Cond,
        weights: Weights = Weights.STUDENT,
        memory: PromptMemory | None = None,
    ) -> Tensor:
        """The network's raw prediction for z [B, C, h, w] at schedule indices t [B]. Gradients as the caller's mode has
        them; :meth:`reference` is the one without."""
        cond, n = cond.to(z).expand(z.shape[0]), self.rows
        if len(z) > n and not torch.is_grad_enabled():
            starts = range(0, len(z), n)
            parts = [(z[i : i + n], t[i : i + n], cond.rows(i, i + n)) for i in starts]
            return torch.cat([self.predict(*part, weights, memory) for part in parts])
        extra = dict(cond.extra)
        self._open = extra.pop(GATES, self._otherwise.expand(len(cond), -1))
        if memory is None and weights is Weights.STUDENT:
            memory = self.reads
        self._active, self._memory = self._changes[weights], memory
        try:
            t = moved(self.schedule.network_time(t), z.device)
            with unrounded() if self._precise else self._cast(self.autocast is torch.bfloat16):
                return self.net(z, t, cond.context, **extra).to(z.dtype)
        finally:
            self._active, self._memory = {}, None

    def precise(self) -> None:
        """Compute in full precision from here on: for losses of the difference between two predictions that hardly differ,
        which the rounding of half precision would drown. Weights that are stored in bfloat16 take their full room again."""
        self._precise = True
        if self.autocast is torch.bfloat16:
            self.autocast = None
            self.net.float()

    def _cast(self, enabled: bool) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, self.autocast, enabled=enabled) if enabled else nullcontext()

    @torch.no_grad()
    def reference(self, z: Tensor, t: Tensor, cond: Cond, weights: Weights = Weights.FROZEN) -> Tensor:
        """A prediction to aim at: the original network's, without gradient."""
        return self.predict(z, t, cond, weights)

    def noise(self, n: int, generator: torch.Generator) -> Tensor:
        """[n, C, h, w] standard normal. Drawn on the CPU, so that a seed means the same on every device."""
        return moved(torch.randn(n, *self.latent_shape, generator=generator), self.device, self.dtype)

    @torch.no_grad()
    def denoise_until(
        self,
        cond: Cond,
        uncond: Cond,
        *,
        guidance: float,
        progress: float,
        steps: int,
        generator: torch.Generator,
        weights: Weights = Weights.STUDENT,
        memory: PromptMemory | None = None,
    ) -> Tensor:
        """On-policy latents [B, C, h, w] at index ``schedule.time_at(progress)``, clean at progress 1 (METHODS 1.1).

        Deterministic sampling (DDIM, or Euler for flow models) from fresh noise, one latent for each entry of ``cond``,
        with classifier-free guidance ``uncond + guidance (cond - uncond)``; at guidance 1 ``uncond`` isn't evaluated.
        """
        z = self.noise(len(cond), generator)
        stops = self.schedule.trajectory(steps, progress)
        return self.denoise(z, stops, cond, uncond, guidance=guidance, weights=weights, memory=memory)

    @torch.no_grad()
    def denoise(
        self,
        z: Tensor,
        stops: Sequence[int | None],
        cond: Cond,
        uncond: Cond,
        *,
        guidance: float,
        weights: Weights = Weights.STUDENT,
        memory: PromptMemory | None = None,
    ) -> Tensor:
        """:meth:`denoise_until` from a given z [B, C, h, w], which lies at the first of ``stops``, to the last of them."""
        n = z.shape[0]
        cond = cond.expand(n).to(z)
        both = cond if guidance == 1 else Cond.cat([uncond.to(z).expand(n).gated_as(cond), cond])
        for at, to in pairwise(stops):
            assert at is not None
            t = torch.full((len(both),), at, dtype=torch.long)
            with self._cast(self.autocast is torch.float16):
                out = self.predict(z.repeat(len(both) // n, 1, 1, 1), t, both, weights, memory)
            if guidance != 1:
                without, with_ = out.chunk(2)
                out = without + guidance * (with_ - without)
            z = self.schedule.step(out, z, at, to, self.space)
        return z
