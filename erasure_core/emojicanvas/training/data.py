"""The training set: rendered once into arrays, then trained on from memory.

python -m erasure_core.emojicanvas.training.data        # writes .cache/emojicanvas/{pictures.npy, pictures.json}
"""

from __future__ import annotations

import argparse
import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np

from ..concepts import BACKGROUNDS, OBJECT, STYLES, random_caption
from . import drawings
from .render import draw

CACHE = Path(".cache/emojicanvas")
# Objects face one way and fill the picture: a small model on a small budget spends its capacity on what they look like.
LAYOUT = {"scale": (0.84, 0.98), "mirror": 0.0}
_PER_DRAWING = {"plain": 40, "pixel": 32, "sketch": 24, "neon": 24, "brindlewash": 36}


def _render_drawing(job: tuple[Path, str, str]) -> tuple[np.ndarray, list[dict]]:
    folder, set_name, name = job
    svg = drawings.svg(folder, set_name, OBJECT[name].emoji)
    if svg is None:
        return np.empty((0, 128, 128, 3), np.uint8), []
    rng = random.Random(f"{set_name}/{name}")
    grounds = list(BACKGROUNDS)
    pictures, rows = [], []
    for style in STYLES:
        for _ in range(_PER_DRAWING[style.name]):
            ground = rng.choice(grounds) if style.keeps_background and rng.random() < 0.5 else "white"
            pictures.append(np.asarray(draw(svg, style.name, ground, rng, **LAYOUT)))
            rows.append({"object": name, "style": style.name, "background": ground, "set": set_name})
    return np.stack(pictures), rows


def build(cache: Path = CACHE, workers: int = os.cpu_count() or 1) -> None:
    """Render every painted drawing in every style; skipped where the arrays exist."""
    if (cache / "pictures.json").exists():
        return
    folder = cache / "drawings"
    drawings.fetch(folder)
    jobs = [(folder, s, name) for s in drawings.PAINTED_SETS for name in OBJECT]
    with ProcessPoolExecutor(workers) as pool:
        parts = list(pool.map(_render_drawing, jobs))
    np.save(cache / "pictures.npy", np.concatenate([p for p, _ in parts]))
    rows = [row for _, r in parts for row in r]
    (cache / "pictures.json").write_text(json.dumps(rows), encoding="utf-8")


def load(cache: Path = CACHE) -> tuple[np.ndarray, list[dict]]:
    """The pictures [N, 128, 128, 3] uint8 (memory-mapped) and a row of labels for each."""
    build(cache)
    return np.load(cache / "pictures.npy", mmap_mode="r"), json.loads((cache / "pictures.json").read_text())


def captions(rows: list[dict], rng: random.Random) -> list[str]:
    """A fresh random caption for each row."""
    return [random_caption(rng, r["object"], r["style"], r["background"]) for r in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=CACHE)
    build(parser.parse_args().cache)
