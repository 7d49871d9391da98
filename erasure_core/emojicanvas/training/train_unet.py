"""Train text encoder and UNet together on cached latents; resumable, with a log and sample sheets.

python -m erasure_core.emojicanvas.training.train_unet --steps 8000
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..concepts import OBJECTS, STYLES, prompt
from ..diffusion import STEPS, add_noise, alphas_cumprod, sample
from ..model import EmojiCanvas
from ..precision import autocast
from ..studio import grid, to_bytes
from ..taesd import SD15_SCALE, TAESD
from ..text import TextEncoder, tokenize
from ..unet import UNet
from . import data
from .optim import Muon, split_parameters
from .train_vae import to_tensor

_EMA, _MIN_SNR, _EMPTY_CAPTIONS, _DECAY = 0.998, 5.0, 0.1, 0.75


class TextToLatent(torch.nn.Module):
    """The trainable pair; its state is what checkpoints hold."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.unet = TextEncoder(), UNet()

    def forward(self, z: Tensor, t: Tensor, ids: Tensor) -> Tensor:
        return self.unet(z, t, self.text(ids))


def initialise(net: TextToLatent) -> None:
    """Zero the last layer of every residual branch; draw word vectors with one bit per entry.

    Words that no caption uses keep their first value, so the table of 49,408 rows packs to a few hundred KB.
    """
    for name, p in net.named_parameters():
        if name.endswith(("out_layers.3.weight", "proj_out.weight", "unet.out.2.weight")):
            torch.nn.init.zeros_(p)
    table = net.text.text_model.embeddings.token_embedding.weight
    with torch.no_grad():
        table.copy_((torch.rand(table.shape) < 0.5).float() * 0.04 - 0.02)
        torch.nn.init.normal_(net.text.text_model.embeddings.position_embedding.weight, std=0.01)


@torch.no_grad()
def latents(cache: Path) -> Tensor:
    """Scaled latents of all pictures [N, 4, 16, 16], encoded once."""
    path = cache / "latents.npy"
    if not path.exists():
        pictures, _ = data.load(cache)
        vae = TAESD.load(cache)
        vae.to(memory_format=torch.channels_last)
        parts = []
        for start in range(0, len(pictures), 64):
            with autocast():
                parts.append(vae.encode(to_tensor(pictures[start : start + 64])).float() * SD15_SCALE)
        np.save(path, torch.cat(parts).contiguous().numpy())
    return torch.from_numpy(np.load(path))


def sample_sheet(net: TextToLatent, cache: Path, path: Path, seed: int = 0) -> None:
    """Every object, in the styles in turn, drawn by the averaged weights."""
    vae = TAESD.load(cache)
    prompts = [prompt(o.name, STYLES[i % len(STYLES)].name) for i, o in enumerate(OBJECTS)]
    prompts += [prompt(o.name) for o in OBJECTS]
    with torch.no_grad(), autocast():
        cond, uncond = net.text(tokenize(prompts)), net.text(tokenize([""]))
        noise = torch.randn(len(prompts), 4, 16, 16, generator=torch.Generator().manual_seed(seed))
        z = sample(net.unet, noise, cond, uncond, steps=16, cfg=4.0)
        pictures = vae.decode(z / SD15_SCALE).float().clamp(-1, 1)
    grid(to_bytes(pictures), rows=4).save(path)


def train(cache: Path, steps: int, *, batch: int, sheet_minutes: float, from_bundle: bool) -> None:
    """Counted in steps, not minutes: a busy machine takes longer and comes out the same."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    z_all, rows = latents(cache), data.load(cache)[1]
    net = TextToLatent()
    initialise(net)
    if from_bundle:
        shipped = EmojiCanvas.load()
        net.text.load_state_dict(shipped.text_encoder.state_dict())
        net.unet.load_state_dict(shipped.unet.state_dict())
    adam_only = ("embedding", "input_blocks.0.", "unet.out.", "time_embed")
    matrices, others = split_parameters(net, adam_only=adam_only)
    optimisers = [Muon(matrices, lr=0.02), torch.optim.AdamW(others, lr=2e-3, betas=(0.9, 0.98), weight_decay=0)]
    base = [o.param_groups[0]["lr"] for o in optimisers]
    average = {k: v.clone() for k, v in net.state_dict().items()}
    step, state_file = 0, cache / "unet.pt"
    if state_file.exists() and not from_bundle:
        state = torch.load(state_file, weights_only=True)
        net.load_state_dict(state["net"])
        average, step = state["average"], state["step"]
        for o, s in zip(optimisers, state["optimisers"], strict=True):
            o.load_state_dict(s)
    rng, torch_rng = random.Random(step), torch.Generator().manual_seed(step)
    weight = (_MIN_SNR * (1 - alphas_cumprod()) / alphas_cumprod()).clamp(max=1.0)  # min(snr, 5) / snr
    began = last_log = last_sheet = time.time()
    losses: list[Tensor] = []

    def save() -> None:
        state = {"net": net.state_dict(), "average": average, "step": step}
        state["optimisers"] = [o.state_dict() for o in optimisers]
        torch.save(state, state_file.with_suffix(".tmp"))
        state_file.with_suffix(".tmp").replace(state_file)

    while step < steps:
        factor = min(1.0, (step + 1) / 100, max(0.01, (1 - step / steps) / _DECAY))
        for o, lr in zip(optimisers, base, strict=True):
            o.param_groups[0]["lr"] = lr * factor
        chosen = torch.randint(len(z_all), (batch,), generator=torch_rng)
        captions = data.captions([rows[i] for i in chosen.tolist()], rng)
        captions = ["" if rng.random() < _EMPTY_CAPTIONS else c for c in captions]
        z0 = z_all[chosen]
        noise = torch.randn(z0.shape, generator=torch_rng)
        t = torch.randint(STEPS, (batch,), generator=torch_rng)
        with autocast():
            eps = net(add_noise(z0, noise, t), t, tokenize(captions))
        loss = ((eps.float() - noise).square().mean((1, 2, 3)) * weight[t]).mean()
        for o in optimisers:
            o.zero_grad()
        loss.backward()
        for o in optimisers:
            o.step()
        step += 1
        keep = min(_EMA, 1 - 1 / (0.1 * step + 1))
        torch._foreach_lerp_(list(average.values()), list(net.state_dict().values()), 1 - keep)
        losses.append(loss.detach())
        if time.time() - last_log > 60:
            last_log = time.time()
            mean = round(float(torch.stack(losses).mean()), 4)
            line = {"step": step, "of": steps, "seconds": round(time.time() - began), "loss": mean}
            losses = []
            print(json.dumps(line), flush=True)
            with (cache / "unet.log").open("a") as log:
                log.write(json.dumps(line) + "\n")
        if time.time() - last_sheet > sheet_minutes * 60:
            last_sheet = time.time()
            save()
            shown = TextToLatent()
            shown.load_state_dict(average)
            sample_sheet(shown, cache, cache / f"unet_{step:06d}.png")
    save()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=data.CACHE)
    parser.add_argument(
        "--steps", type=int, default=8000, help="in all, earlier runs included; 1 s each on 2 free cores"
    )
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--sheet-minutes", type=float, default=8)
    parser.add_argument("--from-bundle", action="store_true", help="start from the shipped weights")
    a = parser.parse_args()
    train(a.cache, a.steps, batch=a.batch, sheet_minutes=a.sheet_minutes, from_bundle=a.from_bundle)
