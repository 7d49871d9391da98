"""What the judge is trained and scored on: rendered pictures of all sets, other emoji, and what the VAE makes of them.

Every part is an array of pictures uint8 [N, side, side, 3] and one of labels [N, 3]: object, style, drawing set.
Shapes must come from many hands, so what shows an object under another name (a grinning cat, a house with a garden)
counts as that object, and monochrome sets and icons teach shapes but no style.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..concepts import BACKGROUNDS, OBJECTS, STYLES
from ..judge import shrink
from ..precision import autocast
from ..taesd import SD15_SCALE, TAESD
from . import data, drawings
from .render import draw
from .train_vae import to_tensor

Part = tuple[np.ndarray, np.ndarray]

EMOJI_SETS = drawings.PAINTED_SETS + drawings.JUDGE_ONLY_SETS
SETS = EMOJI_SETS + drawings.ICON_SETS
TRAIN_SETS = tuple(s for s in EMOJI_SETS if s != drawings.HELD_OUT_SET)
_SHAPE_SETS = drawings.MONOCHROME_SETS + drawings.ICON_SETS
OBJECT_OTHER, STYLE_OTHER, IGNORE = len(OBJECTS), len(STYLES), -100
_OTHERS, _OTHERS_HELD = 620, 120

# Labels (or, with a number, names in one set) of more drawings that show an object.
_ALSO: dict[str, tuple[str, ...]] = {
    "cat": ("cat", "black cat", "grinning cat", "cat with wry smile", "pouting cat"),
    "dog": ("dog", "guide dog"),
    "tiger": ("tiger",),
    "horse": ("horse",),
    "penguin": ("penguin-1", "penguin-2"),
    "frog": ("frog-face",),
    "cactus": ("cactus-1", "cactus-2"),
    "strawberry": ("strawberry-1", "strawberry-2"),
    "pizza": ("pizza-1", "pizza-2"),
    "car": ("oncoming automobile",),
    "house": ("house with garden",),
    "umbrella": ("umbrella",),
    "key": ("old key",),
    "beer": ("clinking beer mugs",),
}
_ICONS: dict[str, str] = {
    "cat": "cat cat-fill cat-duotone",
    "dog": "dog dog-fill dog-duotone dog-side sitting-dog",
    "tiger": "tiger tiger-head",
    "horse": "horse horse-head horse-variant horse-fill horse-duotone",
    "penguin": "penguin",
    "frog": "frog",
    "rose": "rose",
    "tulip": "flower-tulip flower-tulip-fill flower-tulip-duotone",
    "cactus": "cactus cactus-fill cactus-duotone",
    "strawberry": "strawberry",
    "banana": "banana",
    "pizza": "pizza pizza-slice pizza-fill pizza-duotone",
    "car": "car car-fill car-side car-hatchback car-profile-fill car-profile-duotone city-car",
    "rocket": "rocket rocket-launch rocket-fill rocket-duotone",
    "sailboat": "sailboat sail-boat sailboat-fill sailboat-duotone sailboat-one",
    "house": "house home house-line-fill house-duotone",
    "guitar": "guitar guitar-electric guitar-acoustic guitar-fill guitar-duotone",
    "umbrella": "umbrella umbrella-fill umbrella-duotone",
    "key": "key key-variant key-fill key-duotone key-filled",
    "crown": "crown crown-fill crown-filled crown-cross-duotone",
    "bomb": "bomb unlit-bomb bomb-fill bomb-filled",
    "cigarette": "cigarette smoking cigarette-fill cigarette-duotone",
    "knife": "knife knife-fill knife-duotone bowie-knife",
    "beer": "beer beer-mug beer-filled beer-stein beer-stein-fill beer-stein-duotone beer-mug-empty glass-mug-variant",
}
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


def _renders(
    folder: Path, sets: Iterable[str], wanted: dict[str, int], copies: dict[str, int], seed: str
) -> Iterable[tuple]:
    """(picture uint8 [128, 128, 3], object, style, set number) of ``wanted`` labels in ``sets``."""
    rng, grounds = random.Random(seed), list(BACKGROUNDS)
    for set_name in sets:
        for label, number in wanted.items():
            svg = drawings.svg(folder, set_name, label)
            if svg is None:
                continue
            for k, style in enumerate(STYLES):
                label_style = IGNORE if set_name in _SHAPE_SETS else k
                for _ in range(copies[style.name]):
                    ground = rng.choice(grounds) if rng.random() < 0.5 else "white"
                    painted_svg = svg.replace("currentColor", f"#{rng.randrange(1 << 24):06x}")
                    yield (
                        np.asarray(draw(painted_svg, style.name, ground, rng)),
                        number,
                        label_style,
                        SETS.index(set_name),
                    )


def _one_each(folder: Path, wanted: list[str], sets: tuple[str, ...], rounds: int) -> Iterable[tuple]:
    """Every label ``rounds`` times, from any set and in any style."""
    rng = random.Random("one each")
    for k in range(rounds):
        for label in wanted:
            drawn = [s for s in sets if drawings.svg(folder, s, label)]
            style = rng.choice(STYLES).name
            copies = {s.name: int(s.name == style) for s in STYLES}
            yield from _renders(
                folder, rng.sample(drawn, min(1, len(drawn))), {label: OBJECT_OTHER}, copies, f"{k}/{label}"
            )


def _cached(path: Path, rows: Iterable[tuple]) -> Part:
    if not path.exists():
        listed = list(rows)
        np.savez(path, pictures=np.stack([row[0] for row in listed]), labels=np.array([row[1:] for row in listed]))
    loaded = np.load(path)
    return loaded["pictures"], loaded["labels"]


def rendered(cache: Path) -> dict[str, Part]:
    """Pictures at 128 pixels to train on: objects in further sets, under further names and as icons, other emoji."""
    folder = cache / "drawings"
    ours = {o.emoji: i for i, o in enumerate(OBJECTS)}
    also = {label: i for i, o in enumerate(OBJECTS) for label in _ALSO.get(o.name, ())}
    icons = {name: i for i, o in enumerate(OBJECTS) for name in _ICONS[o.name].split()}
    many = {"plain": 10, "pixel": 8, "sketch": 8, "neon": 8, "brindlewash": 6}
    few = {"plain": 3, "pixel": 2, "sketch": 2, "neon": 2, "brindlewash": 2}
    parts = {
        "further": _renders(folder, drawings.JUDGE_ONLY_SETS, ours, many, "judge"),
        "also": _renders(folder, TRAIN_SETS, also, few, "also"),
        "icons": _renders(folder, drawings.ICON_SETS, icons, few, "icons"),
        "others": _one_each(folder, other_labels(folder)[0], TRAIN_SETS, 7),
    }
    return {name: _cached(cache / f"judge_{name}.npz", rows) for name, rows in parts.items()}


def to_score(cache: Path, set_name: str) -> tuple[Part, Part]:
    """(objects, other emoji) of the set that a judge is scored on, at 128 pixels."""
    folder = cache / "drawings"
    ours = {o.emoji: i for i, o in enumerate(OBJECTS)}
    objects = _renders(folder, [set_name], ours, {s.name: 6 for s in STYLES}, "score")
    others = _one_each(folder, other_labels(folder)[1], (set_name,), 4)
    return _cached(cache / f"judge_score_{set_name}.npz", objects), _cached(
        cache / f"judge_score_{set_name}_others.npz", others
    )


def painted(cache: Path) -> Part:
    """The diffusion model's training pictures of all sets but the held-out one."""
    pictures, rows = data.load(cache)
    objects, styles = [o.name for o in OBJECTS], [s.name for s in STYLES]
    chosen = [i for i, r in enumerate(rows) if r["set"] != drawings.HELD_OUT_SET]
    labels = [
        (objects.index(r["object"]), styles.index(r["style"]), SETS.index(r["set"]))
        for r in map(rows.__getitem__, chosen)
    ]
    return np.asarray(pictures)[chosen], np.array(labels)


def _imperfect(z: Tensor, generator: torch.Generator) -> Tensor:
    """Scaled latents [N, 4, 16, 16] as a model samples them: somewhat smooth, somewhat noisy, one in three clean."""
    n = len(z)
    amount = torch.rand(2, n, 1, 1, 1, generator=generator) * (torch.arange(n) % 3 > 0).view(n, 1, 1, 1)
    smooth = F.avg_pool2d(F.pad(z, (1, 1, 1, 1), mode="replicate"), 3, 1)
    return z.lerp(smooth, 0.4 * amount[0]) + 0.3 * amount[1] * torch.randn(z.shape, generator=generator)


def _broken_latents(z: Tensor, generator: torch.Generator) -> Tensor:
    """[N, 4, 16, 16] scaled latents that decode to no object: blends, shuffled patches, much noise, a third each."""
    n, third = len(z), len(z) // 3
    partner = z[torch.randperm(n, generator=generator)]
    noise = torch.randn(z.shape, generator=generator)
    patches = F.unfold(z, 4, stride=4)
    order = torch.rand(n, 1, patches.shape[2], generator=generator).argsort(2).expand_as(patches)
    shuffled = F.fold(patches.gather(2, order), (16, 16), 4, stride=4)
    return torch.cat([0.5 * (z + partner)[:third], shuffled[third : 2 * third], (0.4 * z + 0.9 * noise)[2 * third :]])


@torch.no_grad()
def decoded(cache: Path, parts: dict[str, Part], seed: int = 0) -> Part:
    """Pictures at 64 pixels as a sampler's output looks: encoded, made imperfect or broken, decoded."""
    path = cache / "judge_decoded.npz"
    if not path.exists():
        vae = TAESD.load(cache)
        vae.eval().to(memory_format=torch.channels_last)
        generator, rng = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
        out, out_labels = [], []
        for name, count in (("painted", 1300), ("further", 600), ("also", 150), ("others", 450), ("broken", 540)):
            pictures, labels = parts["painted" if name == "broken" else name]
            chosen = rng.choice(len(pictures), count, replace=False)
            out_labels.append(labels[chosen])
            if name == "broken":  # a blend or a shuffle is no object and no clean style
                out_labels[-1][:, :2] = OBJECT_OTHER, STYLE_OTHER
            for start in range(0, count, 30):
                with autocast():
                    z = vae.encode(to_tensor(pictures[chosen[start : start + 30]])).float() * SD15_SCALE
                    z = _broken_latents(z, generator) if name == "broken" else _imperfect(z, generator)
                    small = shrink(vae.decode(z / SD15_SCALE).float().clamp(-1, 1))
                out.append(((small + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy())
        np.savez(path, pictures=np.concatenate(out), labels=np.concatenate(out_labels))
    loaded = np.load(path)
    return loaded["pictures"], loaded["labels"]
