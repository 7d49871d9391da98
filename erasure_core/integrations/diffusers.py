"""Stable Diffusion 1.x, 2.x and XL pipelines of diffusers: erase on them, and put an erasure on and take it off.

    port = DiffusersPort(pipe)
    erasure = erasure_core.erase(port, ConceptSpec.parse("cigarette"))
    with apply(pipe, erasure):
        pipe("a man smoking a cigarette")

Methods that train do so on a private copy of the UNet: ``erase(port, spec, "esd", {"iterations": 500})``.

Nothing here imports diffusers: a pipeline is used by what it has.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .. import names
from ..artifact import Erasure
from ..operators.changes import role_of
from ..operators.cond import Cond
from ..operators.trainable import TrainableModel
from ..port import FAMILIES, Family, Prediction, Role, Site, TextStates, token_kinds
from ..schedule import Schedule

_PREDICTIONS = {"epsilon": Prediction.EPS, "v_prediction": Prediction.V}
_BATCH, _CACHED = 16, 2048
_ORDER = {"down_blocks": 0, "mid_block": 1, "up_blocks": 2}

Read = tuple[TextStates, Tensor | None]
"""What a pipeline makes of a prompt: its states and, for XL, its pooled text [1, D]."""


class DiffusersPort:
    """A :class:`TrainablePort` of a pipeline as it is now: make a new port after changing its text encoders or adapters.

    ``autocast`` and ``checkpoint`` are for training, see :class:`TrainableModel`: bfloat16 and True need the least memory.
    """

    def __init__(self, pipe: Any, *, autocast: torch.dtype | None = None, checkpoint: bool = False) -> None:
        unet = getattr(pipe, "unet", None)
        if unet is None:
            raise ValueError(
                f"model: a {type(pipe).__name__} has no UNet. This port is for Stable Diffusion 1.x, 2.x and XL pipelines"
            )
        self.pipe, self.unet = pipe, unet
        self._autocast, self._checkpoint = autocast, checkpoint
        self.family = _family(unet)
        scheduler = getattr(pipe, "scheduler", None)
        kind = scheduler.config.get("prediction_type", "epsilon") if scheduler is not None else "epsilon"
        if kind not in _PREDICTIONS:
            raise ValueError(
                f"model: its scheduler's prediction_type {kind!r} is not supported, only {', '.join(_PREDICTIONS)}"
            )
        self.prediction = _PREDICTIONS[kind]
        self._modules = _linear_layers(unet, self.family)
        self._encoded: OrderedDict[str, Read] = OrderedDict()

    def sites(self) -> Sequence[Site]:
        return [site for site in self.linears() if site.role is not Role.OTHER]

    def linears(self) -> Sequence[Site]:
        """Every matrix that an erasure may change."""
        return [site for site, _ in self._modules.values()]

    def weight(self, site: Site) -> Tensor:
        return _effective_weight(self._modules[site.name][1])

    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        return [states for states, _ in self._read(prompts)]

    @torch.no_grad()
    def _read(self, prompts: Sequence[str]) -> list[Read]:
        known = {p: self._encoded[p] for p in prompts if p in self._encoded}
        missing = [p for p in dict.fromkeys(prompts) if p not in known]
        for start in range(0, len(missing), _BATCH):
            for one in self._encode(missing[start : start + _BATCH]):
                prompt = one[0].prompt
                known[prompt] = self._encoded[prompt] = one
        while len(self._encoded) > _CACHED:
            self._encoded.popitem(last=False)
        return [known[p] for p in prompts]

    def _encode(self, prompts: list[str]) -> list[Read]:
        """As the pipeline does it: textual inversions expanded, cut and padded to the tokenizer's length, and for XL the
        penultimate states of both encoders side by side. Token kinds come from the first tokenizer."""
        encoded = self.pipe.encode_prompt(
            prompt=prompts, device=self._device(), num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        tokenizer = getattr(self.pipe, "tokenizer", None) or self.pipe.tokenizer_2
        convert = getattr(self.pipe, "maybe_convert_prompt", None)
        ids = tokenizer(
            convert(prompts, tokenizer) if convert else prompts,
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
        ).input_ids
        states = encoded[0].detach().float().cpu()
        pooled = encoded[2].detach().float().cpu() if self._pools else None
        kinds = [token_kinds(i, bos=tokenizer.bos_token_id, eos=tokenizer.eos_token_id) for i in ids]
        return [
            (TextStates(p, states[n].clone(), kinds[n]), None if pooled is None else pooled[n : n + 1].clone())
            for n, p in enumerate(prompts)
        ]

    def predict(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if self._pools:
            raise ValueError(
                f"model: predict() supports SD 1.x and 2.x, not {self.family.name}, which needs sizes and pooled text"
            )
        to = {"device": self.unet.device, "dtype": self.unet.dtype}
        out = self.unet(z.to(**to), t.to(to["device"]), encoder_hidden_states=context.to(**to)).sample
        return out.to(z)

    @torch.no_grad()
    def conditions(self, prompts: Sequence[str]) -> list[Cond]:
        """Each prompt as the UNet reads it; XL's with its pooled text and the size of the picture, uncropped.

        The empty prompt is the encoding of "", also where the pipeline itself would put zeros in its place.
        """
        read = self._read(prompts)
        contexts = [text.states[None].to(self._device(), copy=True) for text, _ in read]
        if not self._pools:
            return [Cond(x) for x in contexts]
        pixels = [side * self.pipe.vae_scale_factor for side in self._latent_shape()[1:]]
        ids = torch.tensor([[*pixels, 0, 0, *pixels]], dtype=torch.float32, device=self._device())
        pooled = [row.to(self._device(), copy=True) for _, row in read if row is not None]
        return [Cond(x, {"text_embeds": row, "time_ids": ids}) for x, row in zip(contexts, pooled, strict=True)]

    @property
    def _pools(self) -> bool:
        """Whether its UNet reads pooled text and sizes beside the states, as XL's does."""
        return bool(getattr(self.unet.config, "addition_embed_type", None))

    def trainable(self) -> TrainableModel:
        """A float32 copy of the UNet with its adapters merged, on the device that the pipeline computes on.

        Raises:
            ValueError: an inpainting model, or one whose weights are offloaded or quantised.
        """
        config: Any = self.unet.config
        if config.in_channels != config.out_channels or getattr(config, "addition_embed_type", None) not in (
            None,
            "text_time",
        ):
            raise ValueError(
                "model: its UNet reads more than a latent and text. Training works on plain SD 1.x, 2.x and XL"
            )
        net = _Plain(_replica(self.unet))
        half = self._autocast if self._autocast is torch.bfloat16 else torch.float32
        for module in net.modules():  # matrices in what they are computed in; the few other weights are exact
            if not list(module.children()):
                module.to(half if isinstance(module, nn.Linear | nn.Conv2d) else torch.float32)
        net = net.to(self._device())
        scheduler = getattr(self.pipe, "scheduler", None)
        known = getattr(scheduler, "alphas_cumprod", None)
        schedule = Schedule.scaled_linear() if known is None else Schedule.from_alphas_cumprod(known)
        sites = {names.to_diffusers(site.name, self.family): site for site in self.linears()}
        return TrainableModel(
            net,
            schedule,
            self.prediction,
            self._latent_shape(),
            sites={f"unet.{k}": v for k, v in sites.items()},
            autocast=self._autocast,
            checkpoint=self._checkpoint,
        )

    def _latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def _device(self) -> torch.device:
        return getattr(self.pipe, "_execution_device", None) or self.unet.device


class _Plain(nn.Module):
    """A UNet of diffusers as ``net(z, t, context, **extra)``."""

    def __init__(self, unet: nn.Module) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, z: Tensor, t: Tensor, context: Tensor, **extra: Tensor) -> Tensor:
        out: Tensor = self.unet(z, t, encoder_hidden_states=context, added_cond_kwargs=extra or None).sample
        return out


def _replica(unet: nn.Module) -> nn.Module:
    """A copy that nothing of the pipeline holds on to: adapters are in its weights, offloading hooks are off."""
    for parameter in unet.parameters():
        _check_plain(parameter)
    replica = copy.deepcopy(unet)
    for name, module in list(replica.named_modules()):
        for hooked in ("_hf_hook", "_old_forward", "forward"):
            module.__dict__.pop(hooked, None)
        if hasattr(module, "get_base_layer"):
            base = _base(module)
            base.weight = nn.Parameter(_effective_weight(module), requires_grad=False)
            parent, _, leaf = name.rpartition(".")
            setattr(replica.get_submodule(parent), leaf, base)
    return replica.eval()


def _family(unet: nn.Module) -> Family:
    config: Any = unet.config
    widths = config.cross_attention_dim
    widths = set(widths) if isinstance(widths, list | tuple) else {widths}
    depths = config.layers_per_block
    depths = set(depths) if isinstance(depths, list | tuple) else {depths}
    if len(widths) != 1 or len(depths) != 1 or None in widths:
        raise ValueError("model: its blocks differ in text width or depth, so its weights have no original names")
    width = widths.pop()  # any other model of this build is "sd-like"
    return Family(FAMILIES.get(width, "sd-like"), width, depths.pop(), len(config.block_out_channels))


def _linear_layers(unet: nn.Module, family: Family) -> dict[str, tuple[Site, nn.Module]]:
    """Site and layer by canonical name, in network order, of every linear layer in a transformer block. A layer may be
    wrapped by PEFT."""
    found: dict[str, tuple[Site, nn.Module]] = {}
    wrapped: tuple[str, ...] = ()
    for name, module in unet.named_modules():
        base = _base(module)
        if base is not module:
            wrapped = (*wrapped, name + ".")
        if "transformer_blocks." not in name or not isinstance(base, nn.Linear) or name.startswith(wrapped):
            continue
        try:
            canonical = names.from_diffusers(name, family)
        except ValueError:
            continue  # added by something else, a motion module for example
        role = role_of(canonical)
        if role is not Role.OTHER and (base.bias is not None or base.in_features != family.context_dim):
            continue  # reads something other than the text
        found[name] = (Site(canonical, role, base.in_features, base.out_features), module)
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
    layers = _linear_layers(unet, _family(unet))
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
