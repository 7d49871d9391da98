"""Checkpoints of full size with random weights: for timing and for tests of loaders, where real ones can't be downloaded.

    python tools/full_size.py sd15 .cache/full_size      # 2.1 GB, .cache/full_size/models/checkpoints/random-sd15.safetensors
    python tools/full_size.py sdxl .cache/full_size      # 6.9 GB

Names and shapes come from ComfyUI's own classes, so that the stock Load Checkpoint node takes the file for what it imitates.
The values are normal, scaled as an initialiser would. Nothing larger than one tensor is held in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
from comfy_tree import locate

_COMMON = {
    "use_checkpoint": False,
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 320,
    "num_res_blocks": [2, 2, 2, 2],
    "use_spatial_transformer": True,
    "legacy": False,
    "use_temporal_attention": False,
    "use_temporal_resblock": False,
}
UNETS = {
    "sd15": _COMMON
    | {
        "adm_in_channels": None,
        "channel_mult": [1, 2, 4, 4],
        "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
        "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
        "transformer_depth_middle": 1,
        "use_linear_in_transformer": False,
        "context_dim": 768,
        "num_heads": 8,
        "num_head_channels": -1,
    },
    "sdxl": _COMMON
    | {
        "num_res_blocks": [2, 2, 2],
        "num_classes": "sequential",
        "adm_in_channels": 2816,
        "channel_mult": [1, 2, 4],
        "transformer_depth": [0, 0, 2, 2, 10, 10],
        "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
        "transformer_depth_middle": 10,
        "use_linear_in_transformer": True,
        "context_dim": 2048,
        "num_heads": -1,
        "num_head_channels": 64,
    },
}
_VAE = {
    "double_z": True,
    "z_channels": 4,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 2, 4, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [],
    "dropout": 0.0,
}
_PERIOD = 16_777_213  # a prime, so that no two rows of a matrix are alike


def use_comfyui(*, half: bool = False) -> None:
    """Make ``import comfy`` work in this process, on the CPU. Our repository must not be on the path."""
    sys.path.insert(0, str(locate()))
    from comfy.cli_args import args

    args.cpu = True
    args.fp16_unet = half


def shapes(family: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint's tensors, as it is distributed."""
    import comfy.ops
    import comfy.sd1_clip
    import comfy.sdxl_clip
    import comfy.supported_models
    import torch
    from comfy.ldm.models.autoencoder import AutoencoderKL
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    kind, clip_class = {
        "sd15": (comfy.supported_models.SD15, comfy.sd1_clip.SD1ClipModel),
        "sdxl": (comfy.supported_models.SDXL, comfy.sdxl_clip.SDXLClipModel),
    }[family]
    with torch.device("meta"):
        unet = UNetModel(**UNETS[family], device="meta", operations=comfy.ops.disable_weight_init)
        clip = clip_class(device="meta", dtype=torch.float16)
        vae = AutoencoderKL(ddconfig=_VAE, embed_dim=4)
        text = kind(dict(UNETS[family])).process_clip_state_dict_for_saving(dict(clip.state_dict()))
    found = {f"model.diffusion_model.{k}": tuple(v.shape) for k, v in unet.state_dict().items()}
    found |= {f"first_stage_model.{k}": tuple(v.shape) for k, v in vae.state_dict().items()}
    return found | {k: tuple(v.shape) for k, v in text.items() if not k.endswith("position_ids")}


def _values(name: str, shape: tuple[int, ...], block: np.ndarray) -> np.ndarray:
    count = int(np.prod(shape)) if shape else 1
    if name.endswith("bias"):
        return np.zeros(count, np.float16)
    if len(shape) < 2:
        return np.ones(count, np.float16)
    scale = 0.02 if "embedding" in name else float(np.prod(shape[1:])) ** -0.5
    out, done, start = np.empty(count, np.float16), 0, zlib.crc32(name.encode()) % _PERIOD
    while done < count:
        piece = block[start : start + count - done]
        out[done : done + len(piece)] = piece * np.float32(scale)
        done, start = done + len(piece), 0
    return out


def write(family: str, folder: Path, progress: Callable[[int, int], object] = lambda done, total: None) -> Path:
    """Write ``models/checkpoints/random-<family>.safetensors`` below ``folder``, if it isn't there yet.

    Raises:
        OSError: not enough room on the disk.
    """
    path = folder / "models" / "checkpoints" / f"random-{family}.safetensors"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = shapes(family)
    sizes = {name: 2 * (int(np.prod(shape)) if shape else 1) for name, shape in tensors.items()}
    need, free = sum(sizes.values()), shutil.disk_usage(path.parent).free
    if free < need + (4 << 30):
        raise OSError(
            f"{path.parent}: {need / 1e9:.1f} GB are needed and 4 GB should stay free, but {free / 1e9:.1f} are"
        )
    header: dict[str, object] = {"__metadata__": {"format": "pt", "weights": "random"}}
    end = 0
    for name, shape in tensors.items():
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + sizes[name]]}
        end += sizes[name]
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    block = np.random.default_rng(0).standard_normal(_PERIOD, dtype=np.float32)
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(raw)) + raw)
            _write_all(file, tensors, block, progress)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _write_all(
    file: BinaryIO, tensors: dict[str, tuple[int, ...]], block: np.ndarray, progress: Callable[[int, int], object]
) -> None:
    for i, (name, shape) in enumerate(tensors.items()):
        progress(i, len(tensors))
        file.write(_values(name, shape, block).tobytes())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("family", choices=UNETS)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    use_comfyui()
    written = write(options.family, options.folder)
    print(f"{written}: {written.stat().st_size / 1e9:.1f} GB")
