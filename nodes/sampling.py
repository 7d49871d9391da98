"""Pictures by ComfyUI's own sampler, as KSampler draws them: for receipts and comparison sheets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from .modes import host_mode
from .port import family_of
from .replica import latent_shape

PLACE = "{}"
"""Stands for the word in prompts."""


@dataclass(frozen=True)
class Drawing:
    """How pictures are drawn; its fields are the widgets of :func:`widgets`."""

    steps: int = 20
    cfg: float = 7.0
    sampler_name: str = "euler"
    scheduler: str = "normal"
    width: int = 0
    height: int = 0
    """0: the size that the model was made for."""

    def check(self) -> None:
        """ComfyUI 0.3.75 does not look at what API calls send for a choice.

        Raises:
            ValueError: an unknown sampler or scheduler.
        """
        for what, value, known in (
            ("sampler_name", self.sampler_name, comfy.samplers.KSampler.SAMPLERS),
            ("scheduler", self.scheduler, comfy.samplers.KSampler.SCHEDULERS),
        ):
            if value not in known:
                raise ValueError(f"{what}: {value!r} is not one that this ComfyUI has")


def widgets() -> list[Any]:
    """Inputs that :class:`Drawing` is made of."""
    return [
        io.Int.Input("steps", default=20, min=1, max=200, tooltip="Sampling steps of each picture."),
        io.Float.Input(
            "cfg", default=7.0, min=1.0, max=30.0, step=0.5, tooltip="How closely pictures follow the prompt. Demo: 4."
        ),
        io.Combo.Input(
            "sampler_name",
            options=comfy.samplers.KSampler.SAMPLERS,
            default="euler",
            tooltip="As in KSampler: the same one gives the same pictures.",
        ),
        io.Combo.Input(
            "scheduler",
            options=comfy.samplers.KSampler.SCHEDULERS,
            default="normal",
            tooltip="As in KSampler: the same one gives the same pictures.",
        ),
        io.Int.Input("width", default=0, min=0, max=4096, step=8, tooltip="0: the size that the model was made for."),
        io.Int.Input("height", default=0, min=0, max=4096, step=8, tooltip="0: the size that the model was made for."),
    ]


def template(prompt: str) -> str:
    """A prompt with :data:`PLACE` where the word goes; what an older version wrote there is read, too."""
    return prompt.replace("{concept}", PLACE)


def encode(clip, prompt: str) -> list:
    """CONDITIONING, as the stock CLIP Text Encode makes it."""
    with host_mode():
        return clip.encode_from_tokens_scheduled(clip.tokenize(prompt))


def sample(
    model,
    positive: list,
    negative: list,
    seeds: Sequence[int],
    how: Drawing,
    *,
    at_once: int = 8,
    step: Callable[[float], object] | None = None,
) -> Tensor:
    """Latents [n, C, h, w] of one prompt, one for each seed, as KSampler draws them alone at that seed.

    Args:
        step: called with the share of the work that is done, from 0 to 1.
    """
    how.check()
    _, h, w = latent_shape(model, family_of(model).name)
    h, w = how.height // 8 or h, how.width // 8 or w
    # Samplers that add noise on the way draw it for the whole batch from one seed.
    size = at_once if how.sampler_name in _QUIET else 1
    out: list[Tensor] = []
    for start in range(0, len(seeds), size):
        part = seeds[start : start + size]
        empty = comfy.sample.fix_empty_latent_channels(model, torch.zeros(len(part), 4, h, w))
        noise = torch.cat([comfy.sample.prepare_noise(empty[:1], seed) for seed in part])

        def done(i: int, _denoised: Tensor, _x: Tensor, total: int, start: int = start, n: int = len(part)) -> None:
            if step:
                step((start + n * (i + 1) / total) / len(seeds))

        with host_mode():
            drawn = comfy.sample.sample(
                model, noise, how.steps, how.cfg, how.sampler_name, how.scheduler, positive, negative, empty,
                denoise=1.0, callback=done, disable_pbar=True, seed=part[0],
            )  # fmt: skip
        out.append(drawn.cpu())
    return torch.cat(out)


_QUIET = {"euler", "euler_cfg_pp", "heun", "heunpp2", "dpm_2", "lms", "dpm_fast", "dpmpp_2m", "dpmpp_2m_cfg_pp", "ddim",
    "uni_pc", "uni_pc_bh2", "ipndm", "ipndm_v", "deis", "res_multistep"}  # fmt: skip
"""Samplers without noise of their own: pictures of a batch are those of each seed alone."""


def decode(vae, latents: Tensor, at_once: int = 8) -> Tensor:
    """IMAGE [n, H, W, 3] in [0, 1] on the CPU."""
    with host_mode():
        made = [vae.decode(part) for part in latents.split(at_once)]
    return torch.cat([x.reshape(-1, *x.shape[-3:])[..., :3].float().cpu() for x in made])
