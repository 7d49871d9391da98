"""The private replica that training runs on: the network of a MODEL with every patch in its weights and nothing of
ComfyUI's around it, so that it does not matter what is loaded, offloaded or kept in few bits at the moment."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakSet, ref

import comfy.ldm.modules.attention
import comfy.lora
import comfy.model_management as mm
import comfy.model_sampling
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ..erasure_core import Prediction
from ..erasure_core.operators.changes import FullWeights, Layers, LoRA
from ..erasure_core.operators.cond import Cond
from ..erasure_core.operators.trainable import TrainableModel, blocks_of, rows_of
from ..erasure_core.schedule import Schedule
from .modes import host_mode

PREFIX = "diffusion_model."
_SIDES = {"sd15": 512, "sd20": 512}
_LARGE = 1024
"""Pixels of the pictures that a family was trained on: these, SDXL and what came later."""
_TEXT_LENGTH = 77
_ROWS = 16
"""Of a pass without gradients at most, however small: eight pictures, guided."""
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


class Replica(TrainableModel):
    """Closing it gives its memory back at once, whoever still holds it."""

    closed = False
    room = 0
    """Bytes that a training step or drawing needs beside the weights."""
    takes = 0
    """Bytes that training takes in all, by the estimate that :func:`build` goes by."""

    def close(self) -> None:
        super().close()
        self.closed = True
        _open.discard(self)
        self.net.to("meta")
        mm.soft_empty_cache()


_open: WeakSet[Replica] = WeakSet()


def make_room() -> None:
    """For the replicas that are open, after ComfyUI has loaded something that it does not know it must take off again: a text
    encoder, a VAE, a judge."""
    for replica in _open:
        with host_mode():
            mm.free_memory(replica.room, replica.device)


def effective(entry: list[Any], key: str, device: torch.device) -> Tensor:
    """A weight with the patches of its MODEL, float32, the caller's own. ``entry`` is one of ``get_key_patches``."""
    (weight, convert), *patches = entry
    own = convert(
        mm.cast_to_device(weight, device, torch.float32, copy=True), inplace=True
    ).float()  # fp8 kinds stay half
    return comfy.lora.calculate_weight(patches, own, key) if patches else own


def build(
    model, family: str, demand: Demand, shape: tuple[int, int, int], device: torch.device | None = None
) -> Replica:
    """The replica of a MODEL on the compute device, for latents of one shape [C, h, w].

    Raises:
        ValueError: no UNet of Stable Diffusion, or not enough memory; the message says what to change.
    """
    device = device or mm.get_torch_device()
    check_trainable(model, family)
    schedule, prediction = schedule_of(model), prediction_of(model)
    half = None if demand.precise else _half(device)
    kept_in = half if half is torch.bfloat16 else torch.float32  # what attention with gradients computes in
    need = footprint(model, schedule, prediction, shape, demand, fused=_attends_in_pieces(device, kept_in))
    most = min(_ROWS, rows_of(shape))
    checkpoint, rows = _fit(need, half is torch.bfloat16, device, demand.relief, most)
    net = _network(model, torch.device("meta"))  # memory only in the type that stays
    if half is torch.bfloat16:  # autocast would round these at every pass: the same numbers in half the room
        for module in net.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                module.to(half)
    net.to_empty(device=device)
    weights = net.state_dict()
    found = model.get_key_patches(PREFIX)
    if missing := [k for k in weights if PREFIX + k not in found]:
        raise ValueError(
            f"model: {len(missing)} of its weights can't be read, first {missing[0]}. Load it in fp16 or bf16"
        )
    for key, target in weights.items():
        source = effective(found[PREFIX + key], PREFIX + key, device)
        if source.shape != target.shape:
            raise ValueError(
                f"model: {key} is stored as {tuple(source.shape)}. Load the checkpoint in fp16, bf16 or fp8"
            )
        target.copy_(source)
    made = Replica(net, schedule, prediction, shape, autocast=half, checkpoint=checkpoint)
    made.rows = rows
    how: dict[str, Any] = {"half": half is torch.bfloat16, "checkpoint": checkpoint, "rows": rows}
    made.room = need.total(**how, weights=False)
    made.takes = need.total(**how, margin=_margin(device))
    _open.add(made)
    return made


def _half(device: torch.device) -> torch.dtype | None:
    """What a GPU computes in faster."""
    if device.type not in ("cuda", "xpu"):
        return None
    return torch.bfloat16 if mm.should_use_bf16(device) else torch.float16 if mm.should_use_fp16(device) else None


def check_trainable(model, family: str) -> None:
    """Raise where training can't work on this MODEL."""
    net = model.model.diffusion_model
    works = "It works on SD 1.x, SD 2.x and SDXL checkpoints"
    if type(net) is not UNetModel or not any("attn2.to_k" in name for name, _ in net.named_modules()):
        raise ValueError(f"model: {family} can't be trained on: that needs the UNet of Stable Diffusion. {works}")
    if net.in_channels != model.model.latent_format.latent_channels:
        raise ValueError(
            f"model: its network reads {net.in_channels} channels, as inpainting and editing checkpoints do, which training "
            "can't fill. Erase on the plain checkpoint of the same family; the erasure fits this one too"
        )
    sampling = model.get_model_object("model_sampling")
    if not isinstance(sampling, comfy.model_sampling.EPS) or isinstance(sampling, comfy.model_sampling.EDM):
        raise ValueError(f"model: {family} predicts something that training does not know. {works}")
    if getattr(sampling, "sigma_data", 1.0) != 1.0 or not hasattr(sampling, "sigmas"):
        raise ValueError(f"model: the noise schedule of {family} is not one that training knows. {works}")


def prediction_of(model) -> Prediction:
    """What the network predicts, as the nodes in front say."""
    sampling = model.get_model_object("model_sampling")
    if isinstance(sampling, comfy.model_sampling.CONST):
        return Prediction.FLOW
    return Prediction.V if isinstance(sampling, comfy.model_sampling.V_PREDICTION) else Prediction.EPS


def schedule_of(model) -> Schedule:
    """Its noise levels, zero terminal SNR and the like included, as variance-preserving scales."""
    sampling = model.get_model_object("model_sampling")
    sigmas = sampling.sigmas.detach().to("cpu", copy=True)
    scale = (1 + sigmas.double().square()).sqrt()
    return Schedule(1 / scale, sigmas.double() / scale, sampling.timestep(sigmas).double())


def native_side(model, family: str) -> int:
    """The side in pixels of the pictures that a model was made for: smaller ones would teach another model."""
    if family == "sd20" and prediction_of(model) is Prediction.V:
        return 768
    return getattr(model.model.model_config, "erasure_side", None) or _SIDES.get(family, _LARGE)


def latent_shape(model, family: str) -> tuple[int, int, int]:
    """[C, h, w] of these pictures."""
    side = native_side(model, family) // 8
    return model.model.latent_format.latent_channels, side, side


def _network(model, device: torch.device) -> nn.Module:
    """A network of the same class and no weights yet, which attends with PyTorch's own differentiable attention."""
    known = inspect.signature(UNetModel.__init__).parameters
    config = {k: v for k, v in model.model.model_config.unet_config.items() if k in known}
    net = UNetModel(**{**config, "dtype": torch.float32}, device=device, operations=comfy.ops.disable_weight_init)
    net.register_forward_pre_hook(_attend, with_kwargs=True)
    return net.eval().requires_grad_(False)


def _attend(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mm.throw_exception_if_processing_interrupted()  # cancelling takes no longer than a pass
    return args, {**kwargs, "transformer_options": {"optimized_attention_override": _attention}}


def _attention(_chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _attends_in_pieces(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has a fused attention with gradients there; some devices and drivers only have the plain formula."""
    x = torch.zeros(1, 1, 8, 64, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        made = F.scaled_dot_product_attention(x, x, x).grad_fn
    return made is not None and "ScaledDotProduct" in made.name()


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
    net = _network(model, meta)
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


def _margin(device: torch.device) -> float:
    return _CPU_MARGIN if device.type == "cpu" else _MARGIN


def _fit(need: Footprint, half: bool, device: torch.device, relief: str, most: int) -> tuple[bool, int]:
    """Make room; returns whether activations must be computed again to fit, and how many rows, up to ``most``, a pass without
    gradients can have.

    Raises:
        ValueError: it does not fit even so.
    """

    def total(checkpoint: bool, rows: int) -> int:
        return need.total(half=half, checkpoint=checkpoint, rows=rows, margin=_margin(device))

    with host_mode():
        mm.free_memory(total(False, most), device)
    free = mm.get_free_memory(device)
    checkpoint, least = total(False, 1) > free, total(True, 1)
    if least > free:
        raise ValueError(
            f"model: training on it here takes about {least / 1e9:.1f} GB, and {free / 1e9:.1f} GB of {device.type} memory are "
            f"free. {relief}"
        )
    return checkpoint, max(rows for rows in range(1, most + 1) if total(checkpoint, rows) <= free)
