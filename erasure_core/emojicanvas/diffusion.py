"""Stable Diffusion 1.x's noise schedule and the samplers that the testbed is scored with (eps prediction)."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

STEPS = 1000


@cache
def alphas_cumprod() -> Tensor:
    """SD's "scaled linear" schedule, [1000] float32: alpha-bar at t = 0..999."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, STEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


def add_noise(z0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """z_t = sqrt(abar) z0 + sqrt(1 - abar) noise, for t [B]."""
    a = alphas_cumprod().to(z0.device)[t].view(-1, 1, 1, 1)
    return a.sqrt() * z0 + (1 - a).sqrt() * noise


def sigmas(steps: int) -> tuple[Tensor, Tensor]:
    """ComfyUI's "normal" scheduler: sigmas [steps + 1] ending in 0, and the times [steps] they belong to."""
    times = torch.linspace(STEPS - 1, 0, steps)
    log_sigma = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt().log()
    low = times.floor().long()
    high = times.ceil().long()
    mix = times.frac()
    s = ((1 - mix) * log_sigma[low] + mix * log_sigma[high]).exp()
    return torch.cat([s, torch.zeros(1)]), times


@torch.no_grad()
def sample(
    eps: Callable[[Tensor, Tensor, Tensor], Tensor],
    noise: Tensor,
    cond: Tensor,
    uncond: Tensor,
    *,
    steps: int = 20,
    cfg: float = 4.0,
) -> Tensor:
    """Euler sampling with classifier-free guidance, as ComfyUI's KSampler ("euler", "normal") does it.

    ``eps(z, t, context)`` predicts noise; ``noise`` [B, C, h, w] is standard normal; ``cond`` and ``uncond`` are
    [B or 1, L, D]. Returns the scaled latent z0.
    """
    s, _ = sigmas(steps)
    log_sigma = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt().log()
    n = noise.shape[0]
    context = torch.cat([uncond.expand(n, -1, -1), cond.expand(n, -1, -1)])
    x = noise * (1 + s[0] ** 2).sqrt()
    for i in range(steps):
        t = (s[i].log() - log_sigma).abs().argmin().expand(2 * n)  # the net sees whole timesteps
        e = eps((x / (s[i] ** 2 + 1).sqrt()).repeat(2, 1, 1, 1), t, context)
        e_uncond, e_cond = e.chunk(2)
        x = x + (e_uncond + cfg * (e_cond - e_uncond)) * (s[i + 1] - s[i])
    return x
