"""What one weight is called elsewhere: original checkpoint, diffusers, and the LoRA files of both."""

from __future__ import annotations

import re

from .port import Family

_INDEXED = re.compile(r"^(input|output)_blocks\.(\d+)\.1\.(.+)$")
_DIFFUSERS = re.compile(r"^(down|up)_blocks\.(\d+)\.attentions\.(\d+)\.(.+)$")


def to_diffusers(site: str, family: Family) -> str:
    """``input_blocks.4.1.transformer_blocks.0.attn2.to_k`` -> ``down_blocks.1.attentions.0.transformer_blocks.0...``."""
    if site.startswith("middle_block.1."):
        return "mid_block.attentions.0." + site.removeprefix("middle_block.1.")
    match = _INDEXED.match(site)
    if not match:
        raise ValueError(f"{site!r} is not the name of an attention weight in a UNet")
    side, index, rest = match[1], int(match[2]), match[3]
    per_level = family.num_res_blocks + 1
    level, number = divmod(index - 1 if side == "input" else index, per_level)
    return f"{'down' if side == 'input' else 'up'}_blocks.{level}.attentions.{number}.{rest}"


def from_diffusers(name: str, family: Family) -> str:
    """The inverse of :func:`to_diffusers`."""
    if name.startswith("mid_block.attentions.0."):
        return "middle_block.1." + name.removeprefix("mid_block.attentions.0.")
    match = _DIFFUSERS.match(name)
    if not match:
        raise ValueError(f"{name!r} is not the name of an attention weight in a diffusers UNet")
    side, level, number, rest = match[1], int(match[2]), int(match[3]), match[4]
    index = level * (family.num_res_blocks + 1) + number
    return f"{'input' if side == 'down' else 'output'}_blocks.{index + 1 if side == 'down' else index}.1.{rest}"


def to_kohya(site: str, family: Family) -> str:
    """The base name in a LoRA file that ComfyUI, kohya's trainer and the other UIs read.

    SD 1.x and 2.x files are written with diffusers names, SDXL files with the checkpoint's own; ComfyUI reads both.
    """
    name = to_diffusers(site, family) if family.name in ("sd15", "sd20") else site
    return "lora_unet_" + name.replace(".", "_")


def to_peft(site: str, family: Family) -> str:
    """The base name in a LoRA file that ``diffusers.load_lora_weights`` reads."""
    return "unet." + to_diffusers(site, family)


def to_comfy(site: str) -> str:
    """The weight's name in ComfyUI, without ``.weight``."""
    return "diffusion_model." + site
