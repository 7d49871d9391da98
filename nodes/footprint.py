"""How much memory a training on a network will take, measured before it begins: without data, on the meta device."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..erasure_core import Prediction
from ..erasure_core.operators.changes import FullWeights, Layers, LoRA
from ..erasure_core.operators.cond import Cond
from ..erasure_core.operators.trainable import TrainableModel, blocks_of
from ..erasure_core.schedule import Schedule
from .network import network

_TEXT_LENGTH = 77
_MARGIN, _CPU_MARGIN = 1.15, 1.35
"""What allocators and short-lived tensors take on top of the estimate. On the CPU it is more: with SD 1.5, 5.3 GB in tensors
were 6.4 GB of a process, and 3.9 GB with blocks computed again 5.1."""


@dataclass(frozen=True)
class Demand:
    """What a training will hold beside the network, for the memory estimate."""

    what: FullWeights | LoRA = LoRA(Layers.ALL, 4)
    copies: int = 0
    """Further copies of what is trained, such as a running average."""
    pictures: int = 3
    """Latents whose activations are kept at the same time."""
    keeps: Callable[[TrainableModel], int] | None = None
    """Bytes that a step keeps beside that, as :class:`MethodSpec` has it."""
    latents: int = 0
    """Latents that it holds from the first step to the last."""
    beside: int = 0
    """Numbers of gated changes that it holds."""
    precise: bool = False
    """Whether it computes in float32 where others compute in half precision."""
    relief: str = "Close what else uses that memory"
    """What to do where it doesn't fit."""


class _Fused(TorchFunctionMode):
    """Attention on the meta device as other devices compute it: piece by piece, keeping inputs, output and a number a row.

    There PyTorch itself takes the plain formula, which keeps every attention matrix, more than all else together.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:  # nothing here attends with a mask
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*args[:3])[0]
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    """Adds up the tensors that a pass without gradients holds at the same time."""

    def __init__(self, before: set[int]) -> None:
        super().__init__()
        self.most, self._now = 0, 0
        self._known: dict[int, Any] = dict.fromkeys(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for x in made if isinstance(made, tuple | list) else (made,):
            if torch.is_tensor(x) and (key := _storage(x)) not in self._known:
                storage = x.untyped_storage()
                self._known[key] = ref(storage, partial(self._gone, key, storage.nbytes()))
                self._now += storage.nbytes()
        self.most = max(self.most, self._now)
        return made

    def _gone(self, key: int, size: int, _: object) -> None:
        del self._known[key]  # another may lie there next
        self._now -= size


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training in float32, measured on a network without data."""

    matrices: int
    """Weights that can be stored in half precision."""
    others: int
    trained: int
    """What is trained, its gradient, and Adam's two moments; latents that are held all the while."""
    activations: int
    checkpointed: int
    """Activations when the blocks are computed again."""
    drawn: int
    """Activations of a row in a pass without gradients."""
    kept: int
    """What a step keeps that is of no pass, float32 everywhere."""

    def total(self, *, half: bool, checkpoint: bool, rows: int, margin: float = _MARGIN, weights: bool = True) -> int:
        """Where ``rows`` are drawn at a time. Half precision halves the matrices; of the activations those around norms stay
        in float32."""
        share = 0.7 if half else 1
        learned = self.kept + (self.checkpointed if checkpoint else self.activations) * share
        moving = max(learned, rows * self.drawn * share)  # no step is under way while pictures are drawn
        held = self.others + self.matrices / (2 if half else 1) if weights else 0
        return int(margin * (held + self.trained + moving))


def footprint(
    model, schedule: Schedule, prediction: Prediction, shape: tuple[int, int, int], demand: Demand, *, fused: bool = True
) -> Footprint:  # fmt: skip
    """Run two passes on the meta device, where tensors have shapes but no contents: one to add up what autograd keeps, and one
    without gradients.

    Args:
        fused: no attention matrix is kept.
    """
    meta = torch.device("meta")
    net = network(model, meta)
    sizes = {name: p.numel() * 4 for name, p in net.named_parameters()}
    matrices = sum(size for name, size in sizes.items() if net.get_parameter(name).ndim > 1)
    with TrainableModel(net, schedule, prediction, shape) as trained:
        parameters = trained.train(demand.what)
        weights = {_storage(p) for p in [*net.parameters(), *parameters]}
        inside: list[nn.Module] = []
        kept: dict[nn.Module | None, dict[int, torch.UntypedStorage]] = {None: {}}
        entering = 0
        handles = []

        def enter(module: nn.Module, args: Any) -> None:
            nonlocal entering
            inside.append(module)
            kept.setdefault(module, {})
            entering += sum(x.numel() * 4 for x in args if torch.is_tensor(x))

        def leave(*_: Any) -> None:
            inside.pop()

        for block in blocks_of(net):
            handles += [block.register_forward_pre_hook(enter), block.register_forward_hook(leave)]

        def pack(x: Tensor) -> None:
            """Keeps the memory apart from the graph: one that holds its own outputs through a hook is never freed."""
            if _storage(x) not in weights:
                kept[inside[-1] if inside else None][_storage(x)] = x.detach().untyped_storage()

        adm = getattr(net, "num_classes", None) is not None
        extra = {"y": torch.empty(1, model.model.adm_channels, device=meta)} if adm else {}
        width = model.model.model_config.unet_config["context_dim"]
        cond = Cond(torch.empty(1, _TEXT_LENGTH, width, device=meta), extra)
        z = torch.empty(1, *shape, device=meta)
        t, alive = torch.zeros(1, dtype=torch.long), _Alive(weights)
        with _Fused() if fused else nullcontext():
            with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(pack, lambda _: None):
                out = trained.predict(z, t, cond)
            for handle in handles:
                handle.remove()
            with alive:
                trained.reference(z, t, cond)
        bytes_of = {block: sum(s.nbytes() for s in storages.values()) for block, storages in kept.items()}
        outside = bytes_of.pop(None)
        blocks = list(bytes_of.values())
        amount = sum(p.numel() * 4 for p in parameters)
        beside = demand.keeps(trained) if demand.keeps else 0
        del out
    n, held = demand.pictures, demand.latents * math.prod(shape) * 4 + demand.beside * 4
    return Footprint(
        matrices, sum(sizes.values()) - matrices, amount * (4 + demand.copies) + held,
        n * (outside + sum(blocks)), n * (outside + entering + max(blocks, default=0)), alive.most, beside,
    )  # fmt: skip


def _storage(x: Tensor) -> int:
    """Which memory a tensor looks at; on the meta device there is no address."""
    return x.untyped_storage()._cdata


def margin_on(device: torch.device) -> float:
    """The factor of what comes on top of the estimate there."""
    return _CPU_MARGIN if device.type == "cpu" else _MARGIN
