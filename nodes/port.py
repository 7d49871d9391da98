"""ComfyUI's MODEL and CLIP as a ModelPort, and the border between inference mode and ordinary tensors.

Everything that crosses into ``erasure_core`` here is a private, ordinary tensor; nothing of the shared model is changed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import comfy.model_management as mm
import comfy.sd1_clip
import torch
from torch import Tensor

from ..erasure_core import Family, Role, Site, TextStates
from ..erasure_core.operators.changes import role_of
from ..erasure_core.operators.cond import Cond
from ..erasure_core.operators.trainable import TrainableModel
from ..erasure_core.port import FAMILIES, token_kinds
from .footprint import Demand
from .modes import host_mode
from .replica import PREFIX, build, effective, latent_shape, make_room, prediction_of

# Of a UNet: others (LTXV) have attn2 too, fed by a projection of the text that no port knows.
_TEXT_SITE = re.compile(
    r"^diffusion_model\.((?:input_blocks|middle_block|output_blocks)\..+\.attn2\.to_([kv]))\.weight$"
)
BOS, EOS = 49406, 49407
_ENCODE_AT_ONCE = 32
_CACHED_BYTES = 256 << 20

Read = tuple[TextStates, Tensor | None]
"""What a CLIP makes of a prompt: its states, and its pooled text [1, D] where one could be told apart."""

_text_cache: WeakKeyDictionary[Any, dict[tuple, Read]] = WeakKeyDictionary()


def family_of(model) -> Family:
    """Which family a MODEL belongs to, from its network's configuration."""
    config = model.model.model_config
    unet = config.unet_config
    name = getattr(config, "erasure_family", None) or FAMILIES.get(
        unet.get("context_dim"), type(config).__name__.lower()
    )
    blocks = unet.get("num_res_blocks", 1)
    levels = unet.get("channel_mult", (1,))
    return Family(name, unet.get("context_dim") or 1, blocks if isinstance(blocks, int) else blocks[0], len(levels))


class ComfyPort:
    """A :class:`TrainablePort` over a ModelPatcher and a CLIP. Use inside :func:`~.modes.ordinary_tensors`.

    Args:
        demand: what a training is going to hold beside the network.
        opened: called with every replica that is made to be trained on.
        size: (h, w) of the latents that it is trained on; None: as the model was made for.
    """

    def __init__(
        self,
        model,
        clip=None,
        *,
        demand: Demand | None = None,
        opened: Callable[[TrainableModel], object] | None = None,
        size: tuple[int, int] | None = None,
    ) -> None:
        self._model, self._clip = model, clip
        self._demand, self._opened = demand or Demand(), opened
        self.family = family_of(model)
        self.prediction = prediction_of(model)
        channels, *native = latent_shape(model, self.family.name)
        height, width = size or native
        self.latent_shape = channels, height, width
        self._patches = model.get_key_patches(PREFIX)

    def sites(self) -> Sequence[Site]:
        out = []
        for key, entry in self._patches.items():
            match = _TEXT_SITE.match(key)
            if match is not None:
                d_out, d_in = entry[0][0].shape
                out.append(Site(match[1], Role.TEXT_KEY if match[2] == "k" else Role.TEXT_VALUE, d_in, d_out))
        return out

    def linears(self) -> Sequence[Site]:
        """Every matrix that an erasure may change: :meth:`sites`, then the other linear layers of transformer blocks."""
        found = list(self.sites())
        known = {site.name for site in found}
        for key, weight in self._model.model_state_dict(PREFIX).items():
            name = key.removeprefix(PREFIX).removesuffix(".weight")
            if "transformer_blocks." in key and key.endswith(".weight") and weight.ndim == 2 and name not in known:
                found.append(Site(name, role_of(name), weight.shape[1], weight.shape[0]))
        return found

    def weight(self, site: Site) -> Tensor:
        """The weight with all patches of the incoming MODEL (user LoRAs) applied, float32, on the compute device."""
        key = f"{PREFIX}{site.name}.weight"  # any linear layer's, not only of :meth:`sites`
        return effective(self._patches[key], key, mm.get_torch_device())

    def trainable(self) -> TrainableModel:
        """The replica of replica.py. Close it after use.

        Raises:
            ValueError: the model can't be trained on, or there is not enough memory.
        """
        model = build(self._model, self.family.name, self._demand, self.latent_shape)
        if self._opened is not None:
            self._opened(model)
        return model

    def conditions(self, prompts: Sequence[str]) -> list[Cond]:
        """Each prompt as the network reads it, on the compute device; SDXL's with pooled text and picture size."""
        device = mm.get_torch_device()
        return [
            Cond(text.states[None].to(device, copy=True), self._extras(text.prompt, pooled, device))
            for text, pooled in self._read(prompts)
        ]

    def weighted(self, prompt: str) -> Cond:
        """A prompt as CLIP Text Encode reads it: words in brackets at their weights. :meth:`conditions` has all at 1."""
        device = mm.get_torch_device()
        with host_mode():
            states, pooled = self._clip.encode_from_tokens(self._clip.tokenize(prompt), return_pooled=True)
        make_room()
        return Cond(states.to(device, torch.float32, copy=True), self._extras(prompt, pooled, device))

    def _extras(self, prompt: str, pooled: Tensor | None, device: torch.device) -> dict[str, Tensor]:
        if not self._model.model.adm_channels:
            return {}
        if pooled is None:
            mm.throw_exception_if_processing_interrupted()
            with host_mode():
                pooled = self._clip.encode_from_tokens(_plain([self._clip.tokenize(prompt)]), return_pooled=True)[1]
            make_room()
        _, height, width = self.latent_shape
        y = self._model.model.encode_adm(
            pooled_output=pooled.clone().float().cpu(), width=8 * width, height=8 * height, device=torch.device("cpu")
        )
        return {"y": y.to(device, torch.float32, copy=True)}

    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        return [text for text, _ in self._read(prompts)]

    def _read(self, prompts: Sequence[str]) -> list[Read]:
        if self._clip is None:
            raise ValueError("clip: connect the CLIP that belongs to the model")
        clip = self._clip
        cache = _text_cache.setdefault(clip, {})
        if sum(x.states.nbytes for x, _ in cache.values()) > _CACHED_BYTES:
            cache.clear()
        for key in [k for k in cache if "embedding:" in k[-1]]:  # its file may have been written anew
            del cache[key]
        state = (clip.layer_idx, clip.patcher.patches_uuid)
        wanted = [p for p in dict.fromkeys(prompts) if (*state, p) not in cache]
        for start in range(0, len(wanted), _ENCODE_AT_ONCE):
            mm.throw_exception_if_processing_interrupted()
            for read in _encode(clip, wanted[start : start + _ENCODE_AT_ONCE]):
                cache[(*state, read[0].prompt)] = read
        if wanted:
            make_room()
        return [cache[(*state, p)] for p in prompts]

    def predict(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if self.family.name == "sdxl":
            raise ValueError(
                "model: predictions of SDXL need its size and pooled conditioning, which this port does not make"
            )
        model, device = self._model.model, mm.get_torch_device()
        dtype = model.manual_cast_dtype or model.get_dtype()  # not what it is stored in, which may be fp8
        with host_mode():
            mm.load_model_gpu(self._model)
            out = model.diffusion_model(z.to(device, dtype), t.to(device), context=context.to(device, dtype))
        return out.clone().float()


def _encode(clip, prompts: Sequence[str]) -> list[Read]:
    """Encode prompts together. ComfyUI encodes the sections of one prompt as a batch and lays them end to end, so
    the sections of many prompts can travel as one, every word at weight 1."""
    tokenised = [clip.tokenize(p) for p in prompts]
    lengths = [{name: len(sections) for name, sections in t.items()} for t in tokenised]
    if len(prompts) > 1 and any(len(set(n.values())) != 1 for n in lengths):  # towers that split a prompt differently
        return [s for p in prompts for s in _encode(clip, [p])]
    states, pooled = _states_and_pooled(clip, _plain(tokenised))
    first = next(iter(tokenised[0]))
    counts = [sum(len(s) for s in t[first]) for t in tokenised]
    if sum(counts) != len(states):
        raise ValueError(f"clip: {sum(counts)} tokens gave {len(states)} rows; this text encoder is not supported")
    out, start, at = [], 0, 0
    for prompt, tokens, count in zip(prompts, tokenised, counts, strict=True):
        ids = [[w[0] if isinstance(w[0], int) else -1 for w in section] for section in tokens[first]]
        kinds = torch.cat([token_kinds(section, bos=BOS, eos=EOS) for section in ids])
        own = None if pooled is None else pooled[at : at + 1].clone()  # ComfyUI takes the first section's too
        out.append((TextStates(prompt, states[start : start + count].clone(), kinds), own))
        start, at = start + count, at + len(tokens[first])
    return out


def _plain(tokenised: Sequence[dict]) -> dict[str, list]:
    """The sections of several prompts as those of one, every word at weight 1."""
    return {name: [[(word[0], 1.0) for word in s] for t in tokenised for s in t[name]] for name in tokenised[0]}


def _states_and_pooled(clip, tokens: dict[str, list]) -> tuple[Tensor, Tensor | None]:
    """States [all rows, D], and pooled text [sections, D]. ComfyUI hands out the first section's alone, so the others are
    read where they come out of the tower that this one is from; None where it isn't found."""
    towers = [x for x in clip.cond_stage_model.modules() if isinstance(x, comfy.sd1_clip.SDClipModel)]
    seen: list[Tensor | None] = []
    hooks = [x.register_forward_hook(lambda _module, _args, out: seen.append(out[1])) for x in towers]
    try:
        with host_mode():
            states, first = clip.encode_from_tokens(tokens, return_pooled=True)
    finally:
        for hook in hooks:
            hook.remove()
    rows = (x.float().cpu() for x in seen if first is not None and x is not None)
    pooled = next((x for x in rows if torch.equal(x[:1], first.float().cpu())), None)
    return states[0].float().cpu().clone(), pooled
