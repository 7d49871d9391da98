"""Train the judge on every drawing set but the held-out one; report its accuracy on that one.

    python -m erasure_core.emojicanvas.train_judge     # renders once, trains, scores, saves

A judge that calls a broken picture a cat hides what an erasure left, so a third of what it sees is "other": some 600
emoji that are none of the objects, and pictures broken on purpose (blended, spliced, blurred, drowned in noise,
shuffled, flat), in pixels and in the latent space of the autoencoder.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from . import data, drawings
from .concepts import BACKGROUNDS, OBJECTS, STYLES
from .judge import Judge, shrink
from .optim import Muon, autocast, split_parameters
from .render import draw
from .taesd import SD15_SCALE, TAESD
from .train_unet import latents
from .train_vae import to_tensor
from .weights import JUDGE

TRAIN_SETS = tuple(s for s in drawings.PAINTED_SETS + drawings.JUDGE_ONLY_SETS if s != drawings.HELD_OUT_SET)
_OBJECT_OTHER, _STYLE_OTHER, _IGNORE = len(OBJECTS), len(STYLES), -100
_PIXEL = [s.name for s in STYLES].index("pixel")
_OTHERS, _OTHERS_HELD = 620, 120

# Emoji that show one of our objects, a part of it, or what one of its synonyms means (a "building" is no "other").
_LOOKALIKES = re.compile(
    r"\b(cats?|dog|poodle|wolf|fox|raccoon|tiger|leopard|lion|horses?|zebra|unicorn|donkey|moose|penguin|frog|rosette|rose"
    r"|bouquet|wilted|hibiscus|tulip|hyacinth|lotus|blossom|potted|cactus|desert|strawberry|shortcake|banana|pizza|pie"
    r"|cheese|automobile|taxi|car|utility|truck|lorry|minibus|rickshaw|ambulance|vehicle|rocket|firecracker|spacecraft"
    r"|sailboat|boat|speedboat|ship|ferry|canoe|hut|houses?|home|building|office|hospital|bank|hotel|store|school"
    r"|castle|church|factory|wedding|cityscape|tent|camping|guitar|violin|banjo|umbrella|key|locked|unlocked|crown"
    r"|prince|princess|bomb|smoking|cigarette|knife|dagger|swords|beer|mugs?|glass|glasses|wine|sake|cup|drink|mate"
    r"|tumbler|beverage|teacup|bubble)\b"
)
# Hundreds of near-identical people, clocks, signs and flags would crowd out the rest.
_CROWDS = re.compile(
    r"^(flag:|regional|keycap|family|kiss:|couple|(person|people|men|man|women|woman|health|input|pregnant)\b.* )"
    r"|^Japanese \W|\w+ o\Wclock|-thirty|skin tone|facing right|: |dotted line"
)


def other_labels(folder: Path) -> tuple[list[str], list[str]]:
    """Emoji that are none of the objects: (labels to train on, labels to score on), fixed."""
    ours = {o.emoji for o in OBJECTS}
    found = [
        e for e in drawings.labels(folder) if e not in ours and not _LOOKALIKES.search(e) and not _CROWDS.search(e)
    ]
    found = [e for e in found if sum(drawings.svg(folder, s, e) is not None for s in TRAIN_SETS) >= 4]
    random.Random("other emoji").shuffle(found)
    return found[_OTHERS_HELD:][:_OTHERS], found[:_OTHERS_HELD]


@dataclass
class Pictures:
    """N pictures [N, 3, 64, 64] uint8 with object and style numbers [N] ("other" is the last, -100 is not asked)."""

    pixels: Tensor
    objects: Tensor
    styles: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def floats(self, rows: Tensor) -> Tensor:
        return self.pixels[rows].float() / 127.5 - 1


def _renders(
    folder: Path, sets: Iterable[str], wanted: dict[str, int], copies: dict[str, int], seed: str
) -> Iterable[tuple]:
    """(picture uint8 [128, 128, 3], object number, style number) of ``wanted`` labels in ``sets``."""
    rng, grounds = random.Random(seed), list(BACKGROUNDS)
    for set_name in sets:
        for label, number in wanted.items():
            svg = drawings.svg(folder, set_name, label)
            if svg is None:
                continue
            for k, style in enumerate(STYLES):
                label_style = _IGNORE if set_name in drawings.MONOCHROME_SETS else k
                for _ in range(copies[style.name]):
                    ground = rng.choice(grounds) if rng.random() < 0.5 else "white"
                    yield np.asarray(draw(svg, style.name, ground, rng)), number, label_style


def _one_each(folder: Path, wanted: list[str], sets: tuple[str, ...], rounds: int) -> Iterable[tuple]:
    """Every label ``rounds`` times, from any set and in any style."""
    rng = random.Random("one each")
    for k in range(rounds):
        for label in wanted:
            drawn = [s for s in sets if drawings.svg(folder, s, label)]
            style = rng.choice(STYLES).name
            copies = {s.name: int(s.name == style) for s in STYLES}
            yield from _renders(folder, rng.sample(drawn, 1), {label: _OBJECT_OTHER}, copies, f"{k}/{label}")


def render(cache: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Pictures [N, 128, 128, 3] and labels [N, 2] of further sets, other emoji, and the two to score on. Cached."""
    folder, path = cache / "drawings", cache / "judge_renders.npz"
    if not path.exists():
        train_others, held_others = other_labels(folder)
        ours = {o.emoji: i for i, o in enumerate(OBJECTS)}
        few = {s.name: 6 for s in STYLES}
        further = {"plain": 12, "pixel": 10, "sketch": 10, "neon": 10, "brindlewash": 8}
        parts = {
            "held": list(_renders(folder, [drawings.HELD_OUT_SET], ours, few, "score")),
            "held_others": list(_one_each(folder, held_others, (drawings.HELD_OUT_SET,), 4)),
            "others": list(_one_each(folder, train_others, TRAIN_SETS, 7)),
            "further": list(_renders(folder, drawings.JUDGE_ONLY_SETS, ours, further, "judge")),
        }
        arrays = {k: np.stack([p for p, _, _ in v]) for k, v in parts.items()}
        arrays |= {f"{k}_labels": np.array([row[1:] for row in v]) for k, v in parts.items()}
        np.savez(path, **arrays)
    loaded = np.load(path)
    return {k: (loaded[k], loaded[f"{k}_labels"]) for k in ("held", "held_others", "others", "further")}


def _painted(cache: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The diffusion model's training pictures of all sets but the held-out one: (pictures, labels, their rows)."""
    pictures, rows = data.load(cache)
    objects, styles = [o.name for o in OBJECTS], [s.name for s in STYLES]
    chosen = np.array([i for i, r in enumerate(rows) if r["set"] != drawings.HELD_OUT_SET])
    labels = np.array([(objects.index(rows[i]["object"]), styles.index(rows[i]["style"])) for i in chosen])
    return np.asarray(pictures)[chosen], labels, chosen


def _broken_latents(z: Tensor, generator: torch.Generator) -> Tensor:
    """[N, 4, 16, 16] latents that decode to no object: blends, shuffled patches, and much noise, a third each."""
    n, third = len(z), len(z) // 3
    partner = z[torch.randperm(n, generator=generator)]
    noise = torch.randn(z.shape, generator=generator)
    patches = F.unfold(z, 4, stride=4)
    order = torch.rand(n, 1, patches.shape[2], generator=generator).argsort(2).expand_as(patches)
    shuffled = F.fold(patches.gather(2, order), (16, 16), 4, stride=4)
    return torch.cat([0.5 * (z + partner)[:third], shuffled[third : 2 * third], (0.4 * z + 0.9 * noise)[2 * third :]])


@torch.no_grad()
def through_vae(cache: Path, parts: dict[str, tuple[np.ndarray, np.ndarray]], seed: int = 0) -> dict[str, np.ndarray]:
    """Decoded pictures uint8 [N, 64, 64, 3] with labels: what a sampler's output looks like at best. Cached."""
    path = cache / "judge_decoded.npz"
    if not path.exists():
        vae = TAESD()
        vae.load_state_dict(torch.load(cache / "vae.pt", weights_only=True))
        vae.eval().to(memory_format=torch.channels_last)
        generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)

        def decode(z: Tensor) -> np.ndarray:
            out = []
            for part in z.split(32):
                with autocast():
                    out.append(shrink(vae.decode(part).float().clamp(-1, 1)))
            return ((torch.cat(out) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()

        _, labels, rows = _painted(cache)
        z_all = latents(cache) / SD15_SCALE
        pick = rng.permutation(len(rows))
        clean, broken = pick[:2200], pick[2200:3000]
        out, out_labels = [decode(z_all[rows[clean]])], [labels[clean]]
        # a blend or a shuffle is no object and no clean style
        out.append(decode(_broken_latents(z_all[rows[broken]], generator)))
        out_labels.append(np.tile([_OBJECT_OTHER, _STYLE_OTHER], (len(broken), 1)))
        for name, count in (("further", 400), ("others", 600)):
            pictures, part_labels = parts[name]
            chosen = rng.choice(len(pictures), count, replace=False)
            for start in range(0, count, 32):
                with autocast():
                    z = vae.encode(to_tensor(pictures[chosen[start : start + 32]])).float()
                out.append(decode(z))
            out_labels.append(part_labels[chosen])
        np.savez(path, pictures=np.concatenate(out), labels=np.concatenate(out_labels))
    loaded = np.load(path)
    return {"pictures": loaded["pictures"], "labels": loaded["labels"]}


def _pictures(parts: Iterable[tuple[np.ndarray, np.ndarray]]) -> Pictures:
    pixels, labels = [], []
    for array, part_labels in parts:
        for start in range(0, len(array), 1024):
            x = torch.from_numpy(np.array(array[start : start + 1024])).permute(0, 3, 1, 2).contiguous()
            pixels.append(x if x.shape[-1] == 64 else F.avg_pool2d(x.float(), 2).round().byte())
        labels.append(torch.from_numpy(part_labels).long())
    both = torch.cat(labels)
    return Pictures(torch.cat(pixels), both[:, 0], both[:, 1])


def _augment(x: Tensor, styles: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror, move, turn and stretch; change colours, brightness, sharpness and grain a little.

    A dozen sets draw each object, so shapes must vary; pixel art is only mirrored and moved, or it would be none.
    """
    n = len(x)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(n, *shape, generator=generator)

    x = torch.where(uniform(0, 1, 1, 1, 1) < 0.5, x.flip(3), x)
    bend = ((styles != _PIXEL) & (uniform(0, 1) < 0.7)).float()
    angle, shear = uniform(-0.3, 0.3) * bend, uniform(-0.2, 0.2) * bend
    wide, high = (1 + uniform(-0.15, 0.25) * bend for _ in range(2))
    across, down = torch.randint(-5, 6, (2, n), generator=generator) / 32
    theta = torch.stack([wide * angle.cos(), shear - angle.sin(), across, angle.sin(), high * angle.cos(), down], 1)
    grid = F.affine_grid(theta.view(n, 2, 3), list(x.shape), align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)
    x = x * uniform(0.85, 1.15, 1, 1, 1) + uniform(-0.08, 0.08, 1, 1, 1) + uniform(-0.05, 0.05, 3, 1, 1)
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
    new_objects = torch.full_like(objects, _OBJECT_OTHER).where(~same, torch.tensor(_IGNORE))
    unclear = two & (styles == styles[partner])
    return out, new_objects, torch.full_like(styles, _STYLE_OTHER).where(~unclear, torch.tensor(_IGNORE))


@torch.no_grad()
def predict(judge: Judge, pictures: Pictures) -> tuple[Tensor, Tensor]:
    """Probabilities [N, 25] and [N, 6]."""
    judge.eval()
    parts = [judge(pictures.floats(rows)) for rows in torch.arange(len(pictures)).split(256)]
    return torch.cat([o for o, _ in parts]).softmax(1), torch.cat([s for _, s in parts]).softmax(1)


def score(judge: Judge, held: Pictures, others: Pictures) -> dict[str, float]:
    """Accuracy on the held-out set's drawings, and how often one of its other emoji is called an object."""
    objects, styles = predict(judge, held)
    odd, odd_styles = predict(judge, others)
    called = (odd.argmax(1) != _OBJECT_OTHER) & (odd.max(1).values >= judge.threshold)
    return {
        "objects": round(float((objects.argmax(1) == held.objects).float().mean()), 4),
        "objects_shown": round(
            float((objects.gather(1, held.objects[:, None])[:, 0] >= judge.threshold).float().mean()), 4
        ),
        "styles": round(float((styles.argmax(1) == held.styles).float().mean()), 4),
        "other_styles": round(float((odd_styles.argmax(1) == others.styles).float().mean()), 4),
        "others_called_object": round(float(called.float().mean()), 4),
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
    grid = sheet.unflatten(0, (6, 8)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
    Image.fromarray(grid.numpy()).resize((1024, 768)).save(path)
    return lines


def train(cache: Path, steps: int, *, batch: int = 96, out: Path = JUDGE) -> None:
    """Counted in steps, not minutes: on a busy machine it takes longer and comes out the same."""
    torch.set_flush_denormal(True)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    parts = render(cache)
    decoded = through_vae(cache, parts)
    raw = _pictures([_painted(cache)[:2], parts["further"], parts["others"]])
    vae = _pictures([(decoded["pictures"], decoded["labels"])])
    held, held_others = _pictures([parts["held"]]), _pictures([parts["held_others"]])
    print(
        f"{len(raw)} rendered and {len(vae)} decoded pictures, {len(held)} + {len(held_others)} to score on", flush=True
    )
    judge = Judge()
    matrices, others = split_parameters(judge, adam_only=("stem", "head"))
    optimisers = [Muon(matrices, lr=0.02, weight_decay=0.05), torch.optim.AdamW(others, lr=3e-3, weight_decay=0.01)]
    base = [o.param_groups[0]["lr"] for o in optimisers]
    began = last = time.time()
    for step in range(1, steps + 1):
        factor = min(1.0, step / 50, max(0.01, (1 - step / steps) / 0.7))
        for o, lr in zip(optimisers, base, strict=True):
            o.param_groups[0]["lr"] = lr * factor
        xs, objects, styles = [], [], []
        for pool, count in ((raw, batch * 6 // 10), (vae, batch * 4 // 10)):
            rows = torch.randint(len(pool), (count,), generator=generator)
            xs.append(pool.floats(rows))
            objects.append(pool.objects[rows])
            styles.append(pool.styles[rows])
        x, y_object, y_style = torch.cat(xs), torch.cat(objects), torch.cat(styles)
        x = _augment(x, y_style, generator)
        order = torch.randperm(len(x), generator=generator)[: batch // 6]
        x[order], y_object[order], y_style[order] = _break(x[order], y_object[order], y_style[order], generator)
        judge.train()
        with autocast():
            out_objects, out_styles = judge(x.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(out_objects.float(), y_object, label_smoothing=0.03, ignore_index=_IGNORE)
        loss = loss + F.cross_entropy(out_styles.float(), y_style, label_smoothing=0.03, ignore_index=_IGNORE)
        for o in optimisers:
            o.zero_grad()
        loss.backward()
        for o in optimisers:
            o.step()
        if time.time() - last > 60:
            last = time.time()
            line = {"step": step, "seconds": round(time.time() - began), "loss": round(loss.item(), 4)}
            _log(cache, line | score(judge, held, held_others))
    figures = score(judge, held, held_others)
    judge.save(out, notes={"steps": steps, "held_out_set": drawings.HELD_OUT_SET, **figures})
    _log(cache, {"step": steps, "seconds": round(time.time() - began), "final": True, **figures})
    print("\n".join(_mistakes(judge, held, cache / "judge.png")))


def _log(cache: Path, line: dict) -> None:
    print(json.dumps(line), flush=True)
    with (cache / "judge.log").open("a") as log:
        log.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cache", type=Path, default=data.CACHE)
    parser.add_argument("--steps", type=int, default=1000, help="0.45 s each on one free core")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=JUDGE)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    train(a.cache, a.steps, out=a.out)
