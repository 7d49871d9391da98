"""The bundle: one checkpoint file of text encoder, UNet and autoencoder, a sampler over it, and its port.

The keys are those of a checkpoint that ComfyUI's nodes can split (``unet.``, ``clip.clip_l.``, ``vae.``).
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from ..artifact import Erasure
from ..operators.cond import Cond
from ..operators.memory import SavedMemory, extended, quarters_of
from ..operators.trainable import TrainableModel, linear_sites
from ..port import Family, Prediction, Role, Site, TextStates, token_kinds
from ..schedule import Schedule
from .diffusion import alphas_cumprod, sample
from .taesd import SD15_SCALE, TAESD
from .text import BOS, EOS, TextConfig, TextEncoder, tokenize
from .unet import UNet, UNetConfig
from .weights import BUNDLE

NAME, VERSION = "emojicanvas", "1"
UNET, TEXT, VAE = "unet.", "clip.clip_l.transformer.", "vae."
"""What keys of the file begin with."""
# ComfyUI's CLIP class expects both; EmojiCanvas trains neither (no pooled output is used).
LOGIT_SCALE, PROJECTION = "clip.clip_l.logit_scale", "clip.clip_l.transformer.text_projection.weight"
_SITE_ROLES = {"attn2.to_k": Role.TEXT_KEY, "attn2.to_v": Role.TEXT_VALUE}


class BundleError(ValueError):
    """A file is not an EmojiCanvas bundle."""


@contextmanager
def patched(unet: UNet, erasure: Erasure | None) -> Iterator[UNet]:
    """The network with an erasure's changes added; afterwards every weight has its old bits back."""
    if erasure is None:
        yield unet
        return
    erasure.check_fits(linear_sites(unet))
    weights = {name: unet.get_submodule(name).weight for name in erasure.deltas}
    before = {name: w.detach().clone() for name, w in weights.items()}
    try:
        with torch.no_grad():
            for name, delta in erasure.deltas.items():
                weights[name].add_(delta.dense().to(weights[name]))
        yield unet
    finally:
        with torch.no_grad():
            for name, w in weights.items():
                w.copy_(before[name])


@contextmanager
def reading(unet: UNet, memories: Sequence[tuple[SavedMemory, float]]) -> Iterator[UNet]:
    """The network whose cross-attention reads prompt memories, each at its strength, behind every prompt, also ""."""
    hooks = []

    def append(parts: list[tuple[Tensor, int, int]]) -> Callable[[nn.Module, Any], Any]:
        return lambda _module, args: (extended(args[0], parts), *args[1:])

    try:
        for site in sites_of(unet):
            parts = [
                (memory.key if site.role is Role.TEXT_KEY else memory.value, memory.length, quarters_of(strength))
                for memory, strength in memories
                if memory.placement.covers(site.name)
            ]
            hooks.append(unet.get_submodule(site.name).register_forward_pre_hook(append(parts)))
        yield unet
    finally:
        for hook in hooks:
            hook.remove()


def sites_of(unet: UNet) -> list[Site]:
    """The cross-attention matrices that read the text, in network order."""
    found = []
    for name, module in unet.named_modules():
        role = next((r for end, r in _SITE_ROLES.items() if name.endswith(end)), None)
        if role and isinstance(module, nn.Linear):
            found.append(Site(name, role, module.in_features, module.out_features))
    return found


def noise_of(seeds: Sequence[int], channels: int = 4, side: int = 16) -> Tensor:
    """[N, C, 16, 16]: for each picture the noise that ComfyUI draws for its seed in a batch of one."""
    shape = (1, channels, side, side)
    return torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


class EmojiCanvas:
    """The whole text-to-image model, float32 and frozen. ``EmojiCanvas.load().generate(["a cat"], [1])``."""

    def __init__(self, unet: UNet, text_encoder: TextEncoder, vae: TAESD) -> None:
        self.unet, self.text_encoder, self.vae = (
            m.float().eval().requires_grad_(False) for m in (unet, text_encoder, vae)
        )
        self.vae.to(memory_format=torch.channels_last)
        self.steps_trained = 0
        self._states: dict[str, Tensor] = {}

    @classmethod
    def load(cls, path: Path = BUNDLE) -> EmojiCanvas:
        """Read a bundle.

        Raises:
            BundleError: another kind of file, or one of another version.
        """
        if not path.is_file():
            raise BundleError(
                f"{path}: there is no such file. Train the model, then run erasure_core.emojicanvas.training.bundle"
            )
        with safe_open(path, framework="pt") as f:
            metadata, keys = f.metadata() or {}, list(f.keys())
            if metadata.get("name") != NAME or metadata.get("version") != VERSION:
                raise BundleError(f"{path.name}: not an {NAME} bundle of version {VERSION}")
            tensors = {k: f.get_tensor(k).float() for k in keys if k not in (LOGIT_SCALE, PROJECTION)}
        unet_config: dict[str, Any] = json.loads(metadata["unet_config"])
        unet_config = {k: tuple(v) if isinstance(v, list) else v for k, v in unet_config.items()}
        model = cls(
            UNet(UNetConfig(**unet_config)), TextEncoder(TextConfig(**json.loads(metadata["text_config"]))), TAESD()
        )
        for module, prefix in ((model.unet, UNET), (model.text_encoder, TEXT), (model.vae, VAE)):
            module.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        model.steps_trained = int(metadata.get("steps", 0))
        return model

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text states [N, 77, D]; each prompt is encoded once and remembered."""
        new = [p for p in dict.fromkeys(prompts) if p not in self._states]
        if new:
            self._states.update(zip(new, self.text_encoder(tokenize(new)), strict=True))
        return torch.stack([self._states[p] for p in prompts])

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        *,
        steps: int = 20,
        cfg: float = 4.0,
        negative: str = "",
        delta: Erasure | None = None,
        memories: Sequence[tuple[SavedMemory, float]] = (),
        batch: int = 32,
        bf16: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> Tensor:
        """Pictures [N, 3, 128, 128] in [-1, 1], one for each prompt and its seed.

        Args:
            delta: an erasure to draw with; the weights are as before afterwards, also after an error.
            memories: prompt memories to draw with and their strengths, whole quarters.
            bf16: bfloat16 autocast: other pictures than float32's, though alike.
            progress: called with the number of pictures that were just finished.
        """
        if len(prompts) != len(seeds):
            raise ValueError(f"generate: {len(prompts)} prompts for {len(seeds)} seeds")
        side = 16
        pictures = [torch.empty(0, 3, 8 * side, 8 * side)]
        uncond = self.encode([negative])
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
        with patched(self.unet, delta), reading(self.unet, memories), autocast:
            for start in range(0, len(prompts), batch):
                end = min(start + batch, len(prompts))
                noise = noise_of(seeds[start:end], self.unet.config.channels, side)
                z = sample(self.unet, noise, self.encode(prompts[start:end]), uncond, steps=steps, cfg=cfg)
                pictures.append(self.vae.decode(z / SD15_SCALE).float().clamp(-1, 1).contiguous())
                if progress:
                    progress(end - start)
        return torch.cat(pictures)


class EmojiCanvasPort:
    """EmojiCanvas as a :class:`~erasure_core.port.ModelPort`, with an ``erasure`` as if it were merged into the weights.

    ``bf16``: trainings compute in bfloat16, five times as fast on a CPU that can.

    Raises:
        WrongModelError: the erasure was made for another family.
    """

    prediction = Prediction.EPS

    def __init__(self, model: EmojiCanvas, erasure: Erasure | None = None, *, bf16: bool = False) -> None:
        self.model, self.erasure, self.bf16 = model, erasure, bf16
        config = model.unet.config
        self.family = Family(NAME, config.context_dim, config.num_res_blocks, len(config.channel_mult))
        if erasure is not None:
            erasure.check_fits(linear_sites(model.unet))

    def sites(self) -> Sequence[Site]:
        return sites_of(self.model.unet)

    def linears(self) -> Sequence[Site]:
        return linear_sites(self.model.unet)

    def weight(self, site: Site) -> Tensor:
        weight = self.model.unet.get_submodule(site.name).weight.detach().float().clone()
        delta = None if self.erasure is None else self.erasure.deltas.get(site.name)
        return weight if delta is None else weight + delta.dense().to(weight)

    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        if not prompts:
            return []
        kinds = [token_kinds(ids, bos=BOS, eos=EOS) for ids in tokenize(prompts).tolist()]
        return [TextStates(p, s.clone(), k) for p, s, k in zip(prompts, self.model.encode(prompts), kinds, strict=True)]

    def predict(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with patched(self.model.unet, self.erasure) as unet:
            return unet(z, t, context)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Clean, scaled latents [N, 4, h, w] -> pictures [N, 3, 8 h, 8 w] in [-1, 1]."""
        return self.model.vae.decode(latents / SD15_SCALE).clamp(-1, 1)

    def conditions(self, prompts: Sequence[str]) -> list[Cond]:
        return [Cond(text.states[None]) for text in self.text(prompts)]

    def trainable(self) -> TrainableModel:
        with patched(self.model.unet, self.erasure) as unet:
            replica = copy.deepcopy(unet)
        schedule = Schedule.from_alphas_cumprod(alphas_cumprod())
        shape = (replica.config.channels, 16, 16)
        return TrainableModel(replica, schedule, self.prediction, shape, autocast=torch.bfloat16 if self.bf16 else None)
