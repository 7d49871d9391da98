"""Drawing for the benchmark: pictures with and without an erasure, those of the base model drawn only once."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ..artifact import Erasure
from .judge import Judge
from .model import EmojiCanvas
from .precision import FAST_BF16
from .splits import Shot


@dataclasses.dataclass(frozen=True)
class Sampler:
    """How pictures are drawn; part of every cache key."""

    steps: int = 20
    cfg: float = 4.0


class Studio:
    """Draws shots with and without an erasure and lets the judge look at them; base pictures are drawn once.

    ``bf16``: draw, and let methods train, in bfloat16: other pictures than float32's, though alike (docs/emojicanvas.md).
    Figures of machines that are fast in one or the other stand beside each other, and say which they are.
    """

    def __init__(self, model: EmojiCanvas, judge: Judge, sampler: Sampler, folder: Path, batch: int = 32) -> None:
        self.model, self.judge, self.sampler, self.batch = model, judge, sampler, batch
        self.bf16 = FAST_BF16
        folder.mkdir(parents=True, exist_ok=True)
        self._file = folder / "base.safetensors"
        self._base: dict[str, Tensor] = load_file(self._file) if self._file.exists() else {}

    def _key(self, shot: Shot) -> str:
        text = f"{shot.prompt}|{shot.seed}|{self.sampler}|{self.bf16}"
        return hashlib.sha256(text.encode()).hexdigest()[:24]

    def missing(self, shots: Sequence[Shot]) -> list[Shot]:
        """Those whose base picture isn't in the cache yet, without repeats."""
        return list({self._key(s): s for s in shots if self._key(s) not in self._base}.values())

    def draw(self, shots: Sequence[Shot], erasure: Erasure | None, bar: tqdm | None = None) -> Tensor:
        """[N, 3, 128, 128] in [-1, 1], rounded to 8 bits as a saved picture would be."""
        if erasure is None:
            new = self.missing(shots)
            if new:
                for shot, picture in zip(new, to_bytes(self._generate(new, None, bar)), strict=True):
                    self._base[self._key(shot)] = picture
                temporary = self._file.with_suffix(f".{os.getpid()}.tmp")  # other processes may be reading
                save_file({k: v.contiguous() for k, v in self._base.items()}, temporary)
                temporary.replace(self._file)
            pictures = torch.stack([self._base[self._key(s)] for s in shots])
        else:
            pictures = to_bytes(self._generate(shots, erasure, bar))
        return pictures.float() / 127.5 - 1

    def _generate(self, shots: Sequence[Shot], erasure: Erasure | None, bar: tqdm | None) -> Tensor:
        prompts, seeds = [s.prompt for s in shots], [s.seed for s in shots]
        return self.model.generate(
            prompts, seeds, delta=erasure, batch=self.batch, bf16=self.bf16, progress=bar and bar.update,
            **dataclasses.asdict(self.sampler),
        )  # fmt: skip


def to_bytes(pictures: Tensor) -> Tensor:
    return ((pictures + 1) * 127.5).round().clamp(0, 255).byte()


def grid(pictures: Tensor, rows: int) -> Image.Image:
    """Pictures [N, 3, H, W] of bytes in ``rows`` rows, side by side without a gap."""
    return Image.fromarray(rearrange(pictures, "(row n) c h w -> (row h) (n w) c", row=rows).numpy())
