"""Train the autoencoder on 64 px crops; resumable, with a log and a sheet of reconstructions.

python -m erasure_core.emojicanvas.training.train_vae --minutes 25
python -m erasure_core.emojicanvas.training.train_vae --minutes 25 --decoder-only    # polish; latents stay as they are
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..concepts import IMAGE_SIZE
from ..precision import autocast
from ..studio import grid, to_bytes
from ..taesd import SD15_SCALE, TAESD, TRAINED
from . import data
from .optim import Muon, split_parameters


def to_tensor(pictures: np.ndarray) -> Tensor:
    """[N, H, W, 3] uint8 -> [N, 3, H, W] float in [-1, 1], channels last in memory."""
    return torch.from_numpy(pictures.copy()).permute(0, 3, 1, 2).float() / 127.5 - 1


def _gradient(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 + 2 L2 + L1 of the horizontal and vertical differences."""
    edges = sum(F.l1_loss(a, b) for a, b in zip(_gradient(output), _gradient(target), strict=True))
    return F.l1_loss(output, target) + 2 * F.mse_loss(output, target) + edges


def _crops(pictures: np.ndarray, rng: np.random.Generator, batch: int, side: int) -> Tensor:
    out = np.empty((batch, side, side, 3), np.uint8)
    for k in range(batch):
        y, x = rng.integers(0, (IMAGE_SIZE - side) // 8 + 1, 2) * 8
        out[k] = pictures[rng.integers(len(pictures)), y : y + side, x : x + side]
    return to_tensor(out)


@torch.no_grad()
def psnr(vae: TAESD, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio in dB over whole pictures, in [0, 1] units."""
    error = (vae.decode(vae.encode(pictures)).clamp(-1, 1) - pictures).div(2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


@torch.no_grad()
def normalise(vae: TAESD, pictures: Tensor) -> None:
    """Set vae_scale / vae_shift so that scaled latents (SD15_SCALE * z) have mean 0 and deviation 1."""
    raw = vae.taesd_encoder(pictures * 0.5 + 0.5)
    vae.vae_scale.fill_(float(raw.std()) * SD15_SCALE)
    vae.vae_shift.fill_(-float(raw.mean()) / float(vae.vae_scale))


def _sheet(vae: TAESD, pictures: Tensor, path: Path) -> None:
    with torch.no_grad():
        both = torch.cat([pictures, vae.decode(vae.encode(pictures)).clamp(-1, 1)])
    grid(to_bytes(both), rows=2).save(path)


def train(cache: Path, minutes: float, *, batch: int = 16, side: int = 64, decoder_only: bool = False) -> None:
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    pictures = np.asarray(data.load(cache)[0])
    rng = np.random.default_rng(time.time_ns() % 2**32)
    check = to_tensor(pictures[np.random.default_rng(0).choice(len(pictures), 64, replace=False)])
    vae = TAESD()
    for name, p in vae.named_parameters():
        if name.endswith("conv.4.weight"):  # blocks start as the identity
            torch.nn.init.zeros_(p)
    if (cache / TRAINED).exists():
        vae = TAESD.load(cache)
    vae.to(memory_format=torch.channels_last)
    net = vae.taesd_decoder if decoder_only else vae
    ends = ("encoder.0.", "encoder.14.", "decoder.1.", "decoder.18.", "vae_s")
    matrices, others = split_parameters(net, adam_only=ends)
    muon = Muon(matrices, lr=0.02)
    adam = torch.optim.AdamW([p for p in others if p.requires_grad], lr=2e-3, betas=(0.9, 0.95), weight_decay=0)
    average = {k: v.clone() for k, v in vae.state_dict().items()}
    began, step, last = time.time(), 0, 0.0
    while (elapsed := time.time() - began) < minutes * 60:
        done = elapsed / (minutes * 60)
        factor = min(1.0, (step + 1) / 20, (1 - done) / 0.7)
        for group, lr in ((muon.param_groups[0], 0.02), (adam.param_groups[0], 2e-3)):
            group["lr"] = lr * factor
        x = _crops(pictures, rng, batch, side)
        with autocast():
            z = vae.taesd_encoder(x * 0.5 + 0.5)
            z = z + 0.05 * torch.randn_like(z)  # the decoder must bear what a sampler leaves
            out = vae.taesd_decoder(z) * 2 - 1
        loss = reconstruction_loss(out.float(), x) + 1e-4 * z.float().square().mean()
        muon.zero_grad()
        adam.zero_grad()
        loss.backward()
        muon.step()
        adam.step()
        step += 1
        keep = min(0.995, 1 - 1 / (0.1 * step + 1))
        for k, v in vae.state_dict().items():
            average[k].lerp_(v.float(), 1 - keep)
        if time.time() - last > 60 or step == 1:
            last = time.time()
            trained, ema = {k: v.clone() for k, v in vae.state_dict().items()}, average
            vae.load_state_dict(ema)
            line = {
                "step": step,
                "seconds": round(elapsed),
                "loss": round(loss.item(), 4),
                "psnr": round(psnr(vae, check), 2),
            }
            _sheet(vae, check[:12], cache / "vae.png")
            vae.load_state_dict(trained)
            print(json.dumps(line), flush=True)
            with (cache / "vae.log").open("a") as log:
                log.write(json.dumps(line) + "\n")
    vae.load_state_dict(average)
    if not decoder_only:
        normalise(vae, check)
    vae.save(cache)
    print(f"{step} steps, {psnr(vae, check):.2f} dB on whole pictures")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=data.CACHE)
    parser.add_argument("--minutes", type=float, default=25)
    parser.add_argument("--decoder-only", action="store_true")
    a = parser.parse_args()
    train(a.cache, a.minutes, decoder_only=a.decoder_only)
