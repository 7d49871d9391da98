"""Labelled sheets of pictures: a row and a column for each thing that was varied."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_INK, _FAINT, _PAPER = "#1b1b1f", "#6b6b76", "#ffffff"
_GAP, _MARGIN, _SIDE = 4, 16, 120
_TEXT, _TITLE = 14, 22


def font(size: int) -> Any:
    """Pillow's own; before 10.1 it has one size only."""
    try:
        return ImageFont.load_default(size)
    except TypeError:
        return ImageFont.load_default()


def plain(text: str) -> str:
    """``text`` in the letters that the built-in font has; others become question marks."""
    return text.encode("latin-1", "replace").decode("latin-1")


def to_image(picture: Tensor) -> Image.Image:
    """[H, W, 3] in [0, 1] -> a Pillow picture, rounded down as Save Image does."""
    return Image.fromarray((picture.float().cpu().clamp(0, 1) * 255).to(torch.uint8).numpy())


def to_tensor(image: Image.Image) -> Tensor:
    """A Pillow picture -> IMAGE [1, H, W, 3] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).float()[None] / 255


def sheet(
    cells: Sequence[Sequence[Sequence[Image.Image]]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    captions: Sequence[Sequence[str]] = (),
    title: str = "",
    notes: Sequence[str] = (),
    tile: int = 128,
    across: int = 2,
) -> Image.Image:
    """A grid of cells, each with the pictures of its seeds in the same places.

    Args:
        cells: by row, then column, the pictures of one cell; missing ones stay empty, so that a sheet can grow.
        rows, columns: their labels.
        captions: by row, then column, a few words below each cell.
        notes: lines below the title.
        tile: pixels of a picture's longer side on the sheet; pictures are enlarged by whole pixels only.
        across: pictures of a cell side by side.
    """
    most = max((len(cell) for row in cells for cell in row), default=1) or 1
    first = next((p for row in cells for cell in row for p in cell), None)
    width, height = (tile, tile) if first is None else _fit(first.size, tile)
    across = min(across, most)
    down = -(-most // across)
    said = 18 if captions else 0
    cell_w, cell_h = across * (width + _GAP) - _GAP, down * (height + _GAP) - _GAP + said
    total = _MARGIN * 2 + _SIDE + len(columns) * (cell_w + 2 * _GAP)
    wrapped = [line for note in notes for line in textwrap.wrap(plain(note), max(20, total // 8)) or [""]]
    labels = [textwrap.wrap(plain(c), max(8, cell_w // 8))[:3] for c in columns]
    label_h = 18 * max((len(x) for x in labels), default=1) + 8
    top = _MARGIN + (34 if title else 0) + 18 * len(wrapped) + label_h
    out = Image.new("RGB", (total, top + len(rows) * (cell_h + 2 * _GAP) + _MARGIN), _PAPER)
    draw = ImageDraw.Draw(out)
    if title:
        draw.text((_MARGIN, _MARGIN), plain(title), _INK, font(_TITLE))
    for i, line in enumerate(wrapped):
        draw.text((_MARGIN, _MARGIN + (34 if title else 0) + 18 * i), line, _FAINT, font(_TEXT))
    for c, lines in enumerate(labels):
        x = _MARGIN + _SIDE + c * (cell_w + 2 * _GAP)
        for i, line in enumerate(lines):
            draw.text((x, top - label_h + 18 * i), line, _INK, font(_TEXT))
    for r, name in enumerate(rows):
        y = top + r * (cell_h + 2 * _GAP)
        for i, line in enumerate(textwrap.wrap(plain(name), _SIDE // 8)[: max(1, cell_h // 18)]):
            draw.text((_MARGIN, y + 18 * i), line, _INK, font(_TEXT))
        for c in range(len(columns)):
            x = _MARGIN + _SIDE + c * (cell_w + 2 * _GAP)
            for k, picture in enumerate(cells[r][c] if r < len(cells) and c < len(cells[r]) else ()):
                at = (x + k % across * (width + _GAP), y + k // across * (height + _GAP))
                out.paste(_resized(picture, (width, height)), at)
            if r < len(captions) and c < len(captions[r]):
                draw.text((x, y + cell_h - said), plain(captions[r][c]), _FAINT, font(_TEXT))
    return out


def _fit(size: tuple[int, int], tile: int) -> tuple[int, int]:
    scale = tile / max(size)
    if scale > 1:
        scale = max(1, int(scale))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def _resized(picture: Image.Image, size: tuple[int, int]) -> Image.Image:
    enlarged = size[0] > picture.width
    return picture.convert("RGB").resize(size, Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
