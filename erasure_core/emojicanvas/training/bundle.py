"""The file that the pack brings along: what the trainings made, in one checkpoint.

python -m erasure_core.emojicanvas.training.bundle
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..model import LOGIT_SCALE, NAME, PROJECTION, TEXT, UNET, VAE, VERSION, BundleError
from ..taesd import TAESD
from ..text import TextConfig
from ..unet import UNetConfig
from ..weights import BUNDLE
from .data import CACHE


def save_bundle(cache: Path, path: Path = BUNDLE) -> Path:
    """Collect ``unet.pt`` (its averaged weights) and ``vae.safetensors`` of ``cache`` into one fp16 file."""
    trained = torch.load(cache / "unet.pt", weights_only=True)
    vae = TAESD.load(cache).state_dict()
    average = trained["average"]
    out: dict[str, Tensor] = {}
    text_config, unet_config = TextConfig(), UNetConfig()
    out |= {UNET + k.removeprefix("unet."): v for k, v in average.items() if k.startswith("unet.")}
    out |= {TEXT + k.removeprefix("text."): v for k, v in average.items() if k.startswith("text.")}
    out |= {VAE + k: v for k, v in vae.items()}
    out[LOGIT_SCALE], out[PROJECTION] = torch.tensor(4.6055), torch.eye(text_config.width)
    half = {k: v.detach().half().clone(memory_format=torch.contiguous_format) for k, v in out.items()}
    broken = [k for k, v in half.items() if not torch.isfinite(v).all()]
    if broken:
        raise BundleError(f"{len(broken)} weights don't fit half precision, first {broken[0]}")
    metadata = {
        "name": NAME,
        "version": VERSION,
        "steps": str(trained["step"]),
        "unet_config": json.dumps(asdict(unet_config)),
        "text_config": json.dumps(asdict(text_config)),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(half, path, metadata)
    return path


if __name__ == "__main__":
    written = save_bundle(CACHE)
    print(f"{written}: {written.stat().st_size / 1e6:.1f} MB")
