"""The private replica that training runs on: the network of a MODEL with every patch in its weights and nothing of
ComfyUI's around it, so that it does not matter what is loaded, offloaded or kept in few bits at the moment."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import comfy.lora
import comfy.model_management as mm
import comfy.model_sampling
import torch
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn

from ..erasure_core import Prediction
from ..erasure_core.operators.trainable import TrainableModel, rows_of
from ..erasure_core.schedule import Schedule
from .footprint import Demand, Footprint, footprint, margin_on
from .modes import host_mode
from .network import attends_in_pieces, network

PREFIX = "diffusion_model."
_SIDES = {"sd15": 512, "sd20": 512}
_LARGE = 1024
"""Pixels of the pictures that a family was trained on: these, SDXL and what came later."""
_ROWS = 16
"""Of a pass without gradients at most, however small: eight pictures, guided."""


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
    need = footprint(model, schedule, prediction, shape, demand, fused=attends_in_pieces(device, kept_in))
    most = min(_ROWS, rows_of(shape))
    checkpoint, rows = _fit(need, half is torch.bfloat16, device, demand.relief, most)
    net = network(model, torch.device("meta"))  # memory only in the type that stays
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
    made.takes = need.total(**how, margin=margin_on(device))
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


def _fit(need: Footprint, half: bool, device: torch.device, relief: str, most: int) -> tuple[bool, int]:
    """Make room; returns whether activations must be computed again to fit, and how many rows, up to ``most``, a pass without
    gradients can have.

    Raises:
        ValueError: it does not fit even so.
    """

    def total(checkpoint: bool, rows: int) -> int:
        return need.total(half=half, checkpoint=checkpoint, rows=rows, margin=margin_on(device))

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
