"""TAESD in plain torch, with the parameter names that ComfyUI's ``comfy.taesd`` class reads.

Architecture: https://github.com/madebyollin/taesd (MIT). Latents have 4 channels and 1/8 of the sides.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

TRAINED = "vae.safetensors"
"""Its weights in the folder of a training."""

SD15_SCALE = 0.18215
"""ComfyUI's SD1.5 latent format multiplies VAE latents by this before they enter the UNet."""


def _conv(n_in: int, n_out: int, **kwargs) -> nn.Conv2d:
    return nn.Conv2d(n_in, n_out, 3, padding=1, **kwargs)


class _Clamp(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(64, 64), nn.ReLU(), _conv(64, 64), nn.ReLU(), _conv(64, 64))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(x) + x)


def _blocks(n: int) -> list[nn.Module]:
    return [_Block() for _ in range(n)]


class TAESD(nn.Module):
    """Pictures in [-1, 1] <-> latents, as ComfyUI's VAE object hands them over."""

    def __init__(self, latent_channels: int = 4) -> None:
        super().__init__()
        down = [layer for _ in range(3) for layer in (_conv(64, 64, stride=2, bias=False), *_blocks(3))]
        self.taesd_encoder = nn.Sequential(_conv(3, 64), _Block(), *down, _conv(64, latent_channels))
        up = [
            layer for n in (3, 3, 3) for layer in (*_blocks(n), nn.Upsample(scale_factor=2), _conv(64, 64, bias=False))
        ]
        self.taesd_decoder = nn.Sequential(_Clamp(), _conv(latent_channels, 64), nn.ReLU(), *up, _Block(), _conv(64, 3))
        self.vae_scale = nn.Parameter(torch.tensor(1.0), requires_grad=False)
        self.vae_shift = nn.Parameter(torch.tensor(0.0), requires_grad=False)

    @classmethod
    def load(cls, folder: Path) -> TAESD:
        """The autoencoder that was trained in ``folder``."""
        made = cls()
        made.load_state_dict(load_file(folder / TRAINED))
        return made

    def save(self, folder: Path) -> None:
        """Write the weights into ``folder``, in one move."""
        part = folder / f"{TRAINED}.tmp"
        save_file(
            {k: v.detach().clone(memory_format=torch.contiguous_format) for k, v in self.state_dict().items()}, part
        )
        part.replace(folder / TRAINED)

    def encode(self, x: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> [B, 4, H/8, W/8]."""
        return self.taesd_encoder(x * 0.5 + 0.5) / self.vae_scale + self.vae_shift

    def decode(self, z: Tensor) -> Tensor:
        """[B, 4, h, w] -> [B, 3, 8h, 8w] in about [-1, 1]."""
        return self.taesd_decoder((z - self.vae_shift) * self.vae_scale) * 2 - 1
