"""Train the judge on every drawing set but the held-out one; report its accuracy on that one.

    python -m erasure_core.emojicanvas.training.train_judge     # renders once, trains, scores, saves

A judge that calls a broken picture a cat hides what an erasure left, so a third of what it sees is "other": some 600
emoji that are none of the objects, and pictures broken on purpose (blended, spliced, blurred, drowned in noise,
shuffled, flat), in pixels and in the latent space of the autoencoder. To compare settings, leave out another set than
the one that is reported (``--leave-out fxemoji``).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concepts import STYLES
from ..judge import Judge
from ..precision import autocast
from ..studio import grid
from ..weights import JUDGE
from . import data, drawings
from .judge_data import EMOJI_SETS, IGNORE, OBJECT_OTHER, SETS, STYLE_OTHER, Part, decoded, painted, rendered, to_score
from .optim import Muon, split_parameters

_PIXEL = [s.name for s in STYLES].index("pixel")
# A batch, in percent: what the diffusion model learns from, further sets, further names, icons, other emoji, decoded.
_MIX = {"painted": 18, "further": 27, "also": 5, "icons": 9, "others": 17, "decoded": 24}
# Bending blurs everything but pixel art, so sharp pictures would be called that: at last they are left as they are.
_SETTLE = 150


@dataclass
class Pictures:
    """N pictures [N, 3, 64, 64] uint8 with object and style numbers [N] ("other" is the last, -100 is not asked)."""

    pixels: Tensor
    objects: Tensor
    styles: Tensor

    @classmethod
    def of(cls, part: Part, without: str = "") -> Pictures:
        """A part, shrunk, without the rows of one set."""
        array, labels = part
        kept = (labels[:, 2] != SETS.index(without)).nonzero()[0] if without else range(len(labels))
        pixels = []
        for start in range(0, len(kept), 1024):
            x = torch.from_numpy(array[kept[start : start + 1024]]).permute(0, 3, 1, 2).contiguous()
            pixels.append(x if x.shape[-1] == 64 else F.avg_pool2d(x.float(), 2).round().byte())
        numbers = torch.from_numpy(labels[kept]).long()
        return cls(torch.cat(pixels), numbers[:, 0], numbers[:, 1])

    def __len__(self) -> int:
        return len(self.pixels)

    def floats(self, rows: Tensor) -> Tensor:
        return self.pixels[rows].float() / 127.5 - 1


def _recolour(x: Tensor, angle: Tensor, saturation: Tensor) -> Tensor:
    """Colours turned about the grey axis by ``angle`` and scaled by ``saturation`` [N]: every set has its own."""
    grey = x.mean(1, keepdim=True)
    colour = (x - grey) * saturation.view(-1, 1, 1, 1)
    across = (colour.roll(1, 1) - colour.roll(-1, 1)) / math.sqrt(3)  # (1, 1, 1) / sqrt(3) x colour
    return grey + colour * angle.cos().view(-1, 1, 1, 1) + across * angle.sin().view(-1, 1, 1, 1)


def _augment(x: Tensor, styles: Tensor, generator: torch.Generator, bent: float) -> Tensor:
    """Mirror, move, turn, stretch and ripple; change colours, brightness, sharpness and grain a little.

    A dozen sets draw each object, so shapes must vary. Ripples of a few pixels are what a small diffusion model makes
    of a straight edge. A share ``bent`` is resampled; pixel art is only mirrored and moved, or it would be none.
    """
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    x = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, x.flip(3), x)
    bend = ((styles != _PIXEL) & (uniform(0, 1) < bent)).float()
    angle, shear = uniform(-0.35, 0.35) * bend, uniform(-0.2, 0.2) * bend
    wide, high = (1 + uniform(-0.2, 0.3) * bend for _ in range(2))
    across, down = torch.randint(-6, 7, (2, n), generator=generator) / 32
    theta = torch.stack([wide * angle.cos(), shear - angle.sin(), across, angle.sin(), high * angle.cos(), down], 1)
    grid = F.affine_grid(theta.view(n, 2, 3), list(x.shape), align_corners=False)
    cells = 2 ** torch.randint(2, 6, (1,), generator=generator).item()  # waves of 16 to 2 pixels
    ripple = torch.randn(n, 2, cells, cells, generator=generator) * (uniform(-0.1, 0.25, 1, 1, 1) / cells).clamp(min=0)
    ripple = F.interpolate(ripple * bend.view(n, 1, 1, 1), size=x.shape[2:], mode="bilinear")
    x = F.grid_sample(x, grid + ripple.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)
    x = _recolour(x, uniform(-0.5, 0.5), uniform(0.5, 1.3))
    x = x * uniform(0.8, 1.2, 1, 1, 1) + uniform(-0.1, 0.1, 1, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = x.lerp(soft, uniform(-0.6, 0.6, 1, 1, 1).clamp(min=0))
    x = x + uniform(-0.05, 0.05, 1, 1, 1).clamp(min=0) * torch.randn(x.shape, generator=generator)
    return x.clamp(-1, 1).contiguous()


def _break(x: Tensor, objects: Tensor, styles: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures that show nothing any more, with labels: six kinds of damage in turn.

    Blends and splices of two pictures in one style keep texture of it, so their style isn't asked.
    """
    n = len(x)
    kind = torch.arange(n) % 6
    partner = torch.randperm(n, generator=generator)
    mix = 0.38 + 0.24 * torch.rand(n, 1, 1, 1, generator=generator)
    blend = x * mix + x[partner] * (1 - mix)
    cut = torch.arange(64).view(1, 1, 1, 64) < 32
    splice = torch.where(cut, x, x[partner])
    blur = F.interpolate(F.avg_pool2d(x, 16), scale_factor=16, mode="bicubic")
    coarse = 2 ** torch.randint(0, 5, (1,), generator=generator).item()
    grain = F.interpolate(
        torch.randn(n, 3, 64 // coarse, 64 // coarse, generator=generator), scale_factor=coarse, mode="bilinear"
    )
    noise = 0.25 * x + 0.9 * grain
    patches = F.unfold(x, 16, stride=16)
    order = torch.rand(n, 1, 16, generator=generator).argsort(2).expand_as(patches)
    shuffle = F.fold(patches.gather(2, order), (64, 64), 16, stride=16)
    flat = x[:, :, :2, :2].mean((2, 3), keepdim=True) + 0.05 * blur.flip(2)
    out = torch.stack([blend, splice, blur, noise, shuffle, flat])[kind, torch.arange(n)].clamp(-1, 1)
    two = kind < 2
    same = two & (objects == objects[partner])  # two cats, half and half, may well be a cat
    new_objects = torch.full_like(objects, OBJECT_OTHER).where(~same, torch.tensor(IGNORE))
    unclear = two & (styles == styles[partner])
    return out, new_objects, torch.full_like(styles, STYLE_OTHER).where(~unclear, torch.tensor(IGNORE))


@torch.no_grad()
def predict(judge: Judge, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Probabilities [N, 25] and [N, 6]."""
    judge.eval()
    parts = [judge.probabilities(pictures.floats(rows)) for rows in torch.arange(len(pictures)).split(256)]
    return torch.cat([o for o, _ in parts]), torch.cat([s for _, s in parts])


def score(judge: Judge, held: Pictures, others: Pictures) -> dict[str, object]:
    """Accuracy on the left-out set's drawings, its worst objects, how often its other emoji are called an object."""
    objects, styles = predict(judge, held)
    odd, odd_styles = predict(judge, others)
    called = (odd.argmax(1) != OBJECT_OTHER) & (odd.max(1).values >= judge.threshold)
    right = (objects.argmax(1) == held.objects).float()
    shown = (objects.gather(1, held.objects[:, None])[:, 0] >= judge.threshold).float()
    each = {judge.object_labels[k]: round(float(right[held.objects == k].mean()), 3) for k in held.objects.unique()}
    return {
        "objects": round(float(right.mean()), 4),
        "objects_shown": round(float(shown.mean()), 4),
        "styles": round(float((styles.argmax(1) == held.styles).float().mean()), 4),
        "other_styles": round(float((odd_styles.argmax(1) == others.styles).float().mean()), 4),
        "others_called_object": round(float(called.float().mean()), 4),
        "worst": {k: v for k, v in sorted(each.items(), key=lambda item: item[1])[:6] if v < 1},
    }


def _mistakes(judge: Judge, held: Pictures, path: Path) -> list[str]:
    objects, styles = predict(judge, held)
    wrong = ((objects.argmax(1) != held.objects) | (styles.argmax(1) != held.styles)).nonzero().flatten()[:48]
    names, style_names = judge.object_labels, judge.style_labels
    lines = []
    for i in wrong.tolist():
        truth = f"{names[held.objects[i]]}/{style_names[held.styles[i]]}"
        lines.append(f"{truth} -> {names[objects[i].argmax()]}/{style_names[styles[i].argmax()]}")
    sheet = torch.full((48, 3, 64, 64), 255, dtype=torch.uint8)
    sheet[: len(wrong)] = held.pixels[wrong]
    grid(sheet, rows=6).resize((1024, 768)).save(path)
    return lines


def train(cache: Path, steps: int, *, leave_out: str = drawings.HELD_OUT_SET, batch: int = 100, out: Path) -> None:
    """Counted in steps, not minutes: on a busy machine it takes longer and comes out the same."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    parts = rendered(cache) | {"painted": painted(cache)}
    parts["decoded"] = decoded(cache, parts)
    pools = {name: Pictures.of(parts.pop(name), leave_out) for name in _MIX}
    held, held_others = (Pictures.of(part) for part in to_score(cache, leave_out))
    print({k: len(v) for k, v in pools.items()}, f"and {len(held)} + {len(held_others)} to score on", flush=True)
    judge = Judge()
    matrices, others = split_parameters(judge, adam_only=("stem", "head"))
    optimisers = [Muon(matrices, lr=0.02, weight_decay=0.05), torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01)]
    base = [o.param_groups[0]["lr"] for o in optimisers]
    began = time.time()
    for step in range(1, steps + _SETTLE + 1):
        settling = step > steps
        factor = 0.1 if settling else min(1.0, step / 50, max(0.01, (1 - step / steps) / 0.7))
        for o, lr in zip(optimisers, base, strict=True):
            o.param_groups[0]["lr"] = lr * factor
        drawn = {
            name: torch.randint(len(pools[name]), (batch * _MIX[name] // 100,), generator=generator) for name in _MIX
        }
        x = torch.cat([pools[name].floats(rows) for name, rows in drawn.items()])
        y_object = torch.cat([pools[name].objects[rows] for name, rows in drawn.items()])
        y_style = torch.cat([pools[name].styles[rows] for name, rows in drawn.items()])
        x = _augment(x, y_style, generator, bent=0.0 if settling else 0.8)
        order = torch.randperm(len(x), generator=generator)[: batch // 6]
        x[order], y_object[order], y_style[order] = _break(x[order], y_object[order], y_style[order], generator)
        judge.train()
        with autocast():
            out_objects, out_styles = judge(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(out_objects.float(), y_object, label_smoothing=0.03, ignore_index=IGNORE)
        loss = loss + F.cross_entropy(out_styles.float(), y_style, label_smoothing=0.03, ignore_index=IGNORE)
        for o in optimisers:
            o.zero_grad()
        loss.backward()
        for o in optimisers:
            o.step()
        if step % 200 == 0:
            line = {"step": step, "seconds": round(time.time() - began), "loss": round(loss.item(), 4)}
            _log(cache, line | score(judge, held, held_others))
    figures = score(judge, held, held_others)
    judge.save(out, notes={"steps": steps + _SETTLE, "held_out_set": leave_out, "pictures": len(held), **figures})
    line = {"step": steps + _SETTLE, "seconds": round(time.time() - began), "final": True, "set": leave_out}
    _log(cache, line | figures)
    print("\n".join(_mistakes(judge, held, cache / "judge.png")))


def _log(cache: Path, line: dict) -> None:
    print(json.dumps(line), flush=True)
    with (cache / "judge.log").open("a") as log:
        log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=data.CACHE)
    parser.add_argument("--steps", type=int, default=2000, help="0.2 s each on one free core")
    parser.add_argument("--leave-out", choices=EMOJI_SETS, default=drawings.HELD_OUT_SET, help="the set to score on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=JUDGE)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    train(a.cache, a.steps, leave_out=a.leave_out, out=a.out)
