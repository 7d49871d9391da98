"""Before/after sheets: pictures of the real sampler in a running ComfyUI, laid out and labelled."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from comfy_client import ComfyClient
from PIL import Image, ImageDraw, ImageFont
from workflow_parts import DEMO_SAMPLER, SEED

Json = dict[str, Any]
TILE = 128
GAP = 2
INK, FAINT, PAPER = "#1b1b1f", "#6b6b76", "#ffffff"
COLORS = {"erased": "#a1309b", "kept": "#2f7d4f", "": "#1b1b1f"}


@dataclass(frozen=True)
class Column:
    """One prompt, and the band of columns that it belongs to."""

    prompt: str
    band: str
    kind: str = ""
    """"erased" or "kept"; colours the band."""


def sample_graph(prompts: Sequence[str], seed: int, batch: int, erase: Json | None = None) -> Json:
    """The demo model with each prompt sampled at the same seeds, in API format; with `erase`, behind Erase Concept.

    Pictures of prompt i are saved by node ``save<i>``.
    """
    graph: Json = {
        "demo": {"class_type": "ErasureLoadDemo", "inputs": {}},
        "negative": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["demo", 1]}},
        "latent": {"class_type": "EmptyLatentImage", "inputs": {"width": TILE, "height": TILE, "batch_size": batch}},
    }
    model: list[Any] = ["demo", 0]
    if erase is not None:
        words = {"replace_with": "", "keep": "", "keep_everyday": True, "quality": "fast"} | erase
        inputs = {"model": ["demo", 0], "clip": ["demo", 1], **words}
        graph["erase"] = {"class_type": "ErasureEraseConcept", "inputs": inputs}
        model = ["erase", 0]
    for i, prompt in enumerate(prompts):
        graph[f"text{i}"] = {"class_type": "CLIPTextEncode", "inputs": {"text": prompt, "clip": ["demo", 1]}}
        sampler = {
            "model": model,
            "positive": [f"text{i}", 0],
            "negative": ["negative", 0],
            "latent_image": ["latent", 0],
        }
        graph[f"sample{i}"] = {"class_type": "KSampler", "inputs": sampler | DEMO_SAMPLER | {"seed": seed}}
        graph[f"decode{i}"] = {"class_type": "VAEDecode", "inputs": {"samples": [f"sample{i}", 0], "vae": ["demo", 2]}}
        saved = {"images": [f"decode{i}", 0], "filename_prefix": "sheet"}
        graph[f"save{i}"] = {"class_type": "SaveImage", "inputs": saved}
    return graph


def sample(
    client: ComfyClient, prompts: Sequence[str], batch: int, erase: Json | None = None
) -> list[list[Image.Image]]:
    """Pictures by prompt, then seed."""
    run = client.run(sample_graph(prompts, SEED, batch, erase), timeout=1800)
    pictures = [client.images(run, f"save{i}") for i in range(len(prompts))]
    return [[Image.open(io.BytesIO(png)).convert("RGB") for png in column] for column in pictures]


def font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def draw_sheet(
    title: str,
    subtitle: str,
    columns: Sequence[Column],
    before: Sequence[Sequence[Image.Image]],
    after: Sequence[Sequence[Image.Image]],
    across: int = 2,
    scale: int = 1,
) -> Image.Image:
    """Two rows, before and after; each column holds the seeds of one prompt in the same places above and below."""
    tile = TILE * scale
    seeds = len(before[0])
    down = -(-seeds // across)
    cell_w, cell_h = across * (tile + GAP) - GAP, down * (tile + GAP) - GAP
    side, margin, gutter = 96, 24, 18
    band_gap = 22
    x, xs = margin + side, []
    for i, column in enumerate(columns):
        x += band_gap if i and column.band != columns[i - 1].band else 0
        xs.append(x)
        x += cell_w + gutter
    width = x - gutter + margin
    notes = textwrap.wrap(subtitle, width // 8)
    top = margin + 40 + 22 * len(notes) + 100
    height = top + 2 * cell_h + 26 + margin
    sheet = Image.new("RGB", (width, height), PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((margin, margin), title, INK, font(28))
    for i, line in enumerate(notes):
        draw.text((margin, margin + 42 + 22 * i), line, FAINT, font(16))
    for band in dict.fromkeys(c.band for c in columns):
        members = [i for i, c in enumerate(columns) if c.band == band]
        left, right = xs[members[0]], xs[members[-1]] + cell_w
        color = COLORS[columns[members[0]].kind]
        draw.text(((left + right) / 2, top - 68), band, color, font(17), anchor="mm")
        draw.line((left, top - 52, right, top - 52), color, 3)
    rows = (("before", top, before), ("after", top + cell_h + 26, after))
    for name, y, pictures in rows:
        draw.text((margin, y + cell_h / 2), name, INK, font(22), anchor="lm")
        for left, column, cell in zip(xs, columns, pictures, strict=True):
            if name == "before":
                draw.text((left + cell_w / 2, top - 26), f"“{column.prompt}”", INK, font(18), anchor="mm")
            for k, picture in enumerate(cell):
                at = (left + k % across * (tile + GAP), y + k // across * (tile + GAP))
                sheet.paste(picture.resize((tile, tile), Image.Resampling.NEAREST), at)
    return sheet


def save_picture(picture: Image.Image, path: Path, quality: int = 90) -> Path:
    """As JPEG or PNG by the name; JPEG without colour subsampling, since drawings have hard edges."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".jpg":
        picture.convert("RGB").save(path, quality=quality, optimize=True, subsampling=0)
    else:
        picture.save(path, optimize=True)
    return path
