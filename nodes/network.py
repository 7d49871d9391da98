"""A network of a MODEL's class that can be trained on: no weights yet, nothing of ComfyUI's memory management."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management as mm
import comfy.ops
import torch
import torch.nn.functional as F
from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel
from torch import Tensor, nn


def network(model, device: torch.device) -> nn.Module:
    """A network of the same class and no weights yet, which attends with PyTorch's own differentiable attention."""
    known = inspect.signature(UNetModel.__init__).parameters
    config = {k: v for k, v in model.model.model_config.unet_config.items() if k in known}
    net = UNetModel(**{**config, "dtype": torch.float32}, device=device, operations=comfy.ops.disable_weight_init)
    net.register_forward_pre_hook(_attend, with_kwargs=True)
    return net.eval().requires_grad_(False)


def _attend(_module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    mm.throw_exception_if_processing_interrupted()  # cancelling takes no longer than a pass
    return args, {**kwargs, "transformer_options": {"optimized_attention_override": attention}}


def attention(_chosen: Any, *args: Any, **kwargs: Any) -> Tensor:
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def attends_in_pieces(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether PyTorch has a fused attention with gradients there; some devices and drivers only have the plain formula."""
    x = torch.zeros(1, 1, 8, 64, device=device, dtype=dtype, requires_grad=True)
    with torch.enable_grad():
        made = F.scaled_dot_product_attention(x, x, x).grad_fn
    return made is not None and "ScaledDotProduct" in made.name()
