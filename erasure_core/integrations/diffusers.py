"""Stable Diffusion 1.x, 2.x and XL pipelines of diffusers: erase on them, and put an erasure on and take it off.

    port = DiffusersPort(pipe)
    erasure = erasure_core.erase(port, ConceptSpec.parse("cigarette"))
    with apply(pipe, erasure):
        pipe("a man smoking a cigarette")

Nothing here imports diffusers: a pipeline is used by what it has.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import names
from ..artifact import Erasure
from ..port import Family, Prediction, Role, Site, TextStates, token_kinds

FAMILIES = {768: "sd15", 1024: "sd20", 2048: "sdxl"}
"""By the width of the text states; any other model of this build is "sd-like"."""
_PREDICTIONS = {"epsilon": Prediction.EPS, "v_prediction": Prediction.V}
_ROLES = {"to_k": Role.TEXT_KEY, "to_v": Role.TEXT_VALUE}
_BATCH, _CACHED = 16, 2048
_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}


class DiffusersPort:
    """A :class:`ModelPort` of a pipeline as it is now: make a new port after changing its text encoders or adapters."""

    def __init__(self, pipe: Any) -> None:
        unet = getattr(pipe, "unet", None)
        if unet is None:
            raise ValueError(
                f"model: a {type(pipe).__name__} has no UNet. This port is for Stable Diffusion 1.x, 2.x and XL pipelines"
            )
        self.pipe, self.unet = pipe, unet
        self.family = _family(unet)
        scheduler = getattr(pipe, "scheduler", None)
        kind = scheduler.config.get("prediction_type", "epsilon") if scheduler is not None else "epsilon"
        if kind not in _PREDICTIONS:
            raise ValueError(
                f"model: its scheduler's prediction_type {kind!r} is not supported, only {', '.join(_PREDICTIONS)}"
            )
        self.prediction = _PREDICTIONS[kind]
        self._modules = _text_layers(unet, self.family)
        self._encoded: OrderedDict[str, TextStates] = OrderedDict()

    def sites(self) -> Sequence[Site]:
        return [site for site, _ in self._modules.values()]

    def weight(self, site: Site) -> Tensor:
        return _effective_weight(self._modules[site.name][1])

    @torch.no_grad()
    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        states = {p: self._encoded[p] for p in prompts if p in self._encoded}
        missing = [p for p in dict.fromkeys(prompts) if p not in states]
        for start in range(0, len(missing), _BATCH):
            for one in self._encode(missing[start : start + _BATCH]):
                states[one.prompt] = self._encoded[one.prompt] = one
        while len(self._encoded) > _CACHED:
            self._encoded.popitem(last=False)
        return [states[p] for p in prompts]

    def _encode(self, prompts: list[str]) -> list[TextStates]:
        """As the pipeline does it: textual inversions expanded, cut and padded to the tokenizer's length, and for XL the
        penultimate states of both encoders side by side. Token kinds come from the first tokenizer."""
        device = getattr(self.pipe, "_execution_device", None) or self.unet.device
        encoded = self.pipe.encode_prompt(
            prompt=prompts, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        tokenizer = getattr(self.pipe, "tokenizer", None) or self.pipe.tokenizer_2
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        ids = tokenizer(
            convert(prompts, tokenizer) if convert else prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
        ).input_ids
        states = encoded.detach().float().cpu()
        return [
            TextStates(p, s.clone(), token_kinds(i, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id))
            for p, s, i in zip(prompts, states, ids, strict=True)
        ]

    def predict(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if getattr(self.unet.config, "addition_embed_type", None):
            raise ValueError(
                f"model: predict() supports SD 1.x and 2.x, not {self.family.name}, which needs sizes and pooled text"
            )
        to = {"device": self.unet.device, "dtype": self.unet.dtype}
        out = self.unet(z.to(**to), t.to(to["device"]), encoder_hidden_states=context.to(**to)).sample
        return out.to(z)


def _family(unet: nn.Module) -> Family:
    config: Any = unet.config
    widths = config.cross_attention_dim
    widths = set(widths) if isinstance(widths, list | tuple) else {widths}
    depths = config.layers_per_block
    depths = set(depths) if isinstance(depths, list | tuple) else {depths}
    if len(widths) != 1 or len(depths) != 1 or None in widths:
        raise ValueError("model: its blocks differ in text width or depth, so its weights have no original names")
    width = widths.pop()
    return Family(FAMILIES.get(width, "sd-like"), width, depths.pop(), len(config.block_out_channels))


def _text_layers(unet: nn.Module, family: Family) -> dict[str, tuple[Site, nn.Module]]:
    """Site and layer by canonical name, in network order. A layer may be wrapped by PEFT."""
    found = {}
    for name, module in unet.named_modules():
        leaf = name.rpartition(".")[2]
        if leaf not in _ROLES or ".attn2." not in name:
            continue
        base = _base(module)
        if getattr(base, "bias", None) is not None or getattr(base, "in_features", None) != family.context_dim:
            continue  # reads something other than the text
        try:
            canonical = names.from_diffusers(name, family)
        except ValueError:
            continue  # added by something else, a motion module for example
        found[name] = (Site(canonical, _ROLES[leaf], base.in_features, base.out_features), module)
    ordered = sorted(found, key=lambda name: _ORDER.get(name.partition(".")[0], 3))
    return {found[name][0].name: found[name] for name in ordered}


def _base(module: nn.Module) -> Any:
    return module.get_base_layer() if hasattr(module, "get_base_layer") else module


def _check_plain(weight: Tensor) -> Tensor:
    if weight.is_meta:
        raise ValueError("model: its weights are offloaded. Use the pipeline without sequential CPU offload")
    if not weight.is_floating_point():
        raise ValueError(f"model: its weights are quantised ({weight.dtype}). Load it in float16, bfloat16 or float32")
    return weight


def _effective_weight(module: Any) -> Tensor:
    """Float32 copy of what the layer multiplies by: fused LoRAs are in its weight, active PEFT adapters are added."""
    weight = _check_plain(_base(module).weight).detach().to(torch.float32, copy=True)
    if not hasattr(module, "lora_A"):
        return weight
    merged = [a for a in module.merged_adapters if a in module.lora_A]
    active = [a for a in module.active_adapters if a in module.lora_A]
    added = [] if merged else [(a, 1.0) for a in active]
    change = [(a, -1.0) for a in merged] if module.disable_adapters else added
    for adapter, sign in change:
        if adapter in getattr(module, "lora_variant", {}):
            raise ValueError(f"model: adapter {adapter!r} is not a plain LoRA. Fuse it first (pipe.fuse_lora())")
        weight += sign * module.get_delta_weight(adapter).detach().to(weight)
    return weight


@dataclass(eq=False)
class Applied:
    """An erasure on a pipeline; :func:`remove` takes it off."""

    unet: nn.Module
    kept: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list)


def attach(pipe: Any, erasure: Erasure, strength: float = 1.0) -> Applied:
    """Add an erasure to a pipeline's weights until :func:`remove`; memory: a copy of the edited matrices.

    Raises:
        WrongModelError: it was made for another kind of model. Nothing is changed then.
    """
    unet = pipe.unet
    layers = _text_layers(unet, _family(unet))
    erasure.check_fits([site for site, _ in layers.values()])
    applied = Applied(unet)
    if strength != 0:
        replaced = []
        for name, delta in erasure.deltas.items():
            parameter = _base(layers[name][1]).weight
            old = _check_plain(parameter).data
            dense = delta.dense().to(device=old.device, dtype=torch.float32)
            replaced.append((parameter, (old.float() + strength * dense).to(old.dtype)))
        for parameter, new in replaced:
            applied.kept.append((parameter, parameter.data))
            parameter.data = new
    _stack(unet).append(applied)
    return applied


def remove(applied: Applied) -> None:
    """Take an erasure off: every weight is what it was, bit for bit.

    Raises:
        RuntimeError: another one was attached later and is still on.
    """
    stack = _stack(applied.unet)
    if applied not in stack:
        return
    if stack[-1] is not applied:
        raise RuntimeError("erasure: another one was attached after it. Remove that one first")
    stack.pop()
    for parameter, old in applied.kept:
        parameter.data = old.to(parameter.device)  # the pipeline may have moved meanwhile
    applied.kept.clear()


def _stack(unet: Any) -> list[Applied]:
    if "_erasures_on" not in unet.__dict__:
        unet.__dict__["_erasures_on"] = []
    return unet.__dict__["_erasures_on"]


@contextmanager
def apply(pipe: Any, erasure: Erasure, strength: float = 1.0) -> Iterator[Any]:
    """``with apply(pipe, erasure) as pipe:`` - the erasure is on inside, and off behind it whatever happens."""
    applied = attach(pipe, erasure, strength)
    try:
        yield pipe
    finally:
        remove(applied)
