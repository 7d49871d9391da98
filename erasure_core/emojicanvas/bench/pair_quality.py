"""SDEdit pairs looked at: is the concept in every unsafe member and in no safe one, and does the rest stay?

Objects are paired with a look-alike, in several styles and on several grounds that both prompts name, styles with the plain
one, on several objects. The judge knows no grounds, so these are measured: the median colour of the outer pixels, called by
the nearest ground of the captions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from ...metrics.rates import Rate, rate
from ...pairs import NoPairsError, Tally, make_pairs
from ..concepts import BACKGROUNDS, NEIGHBOURS, STYLE, prompt
from ..model import EmojiCanvasPort
from ..splits import STYLE_OBJECTS, Erasing, Split
from ..studio import to_bytes
from . import perceptual
from .rows import Bench, keep
from .settings import look_for

EACH = 3
"""Pairs of a scene."""
EDIT: Mapping[str, Any] = {"strength": 0.5, "strongest": 0.85, "guidance": 4.0, "steps": 20, "max_redraws": 10}
"""How they are made; chosen on the tuning split."""
EDGE = 4
"""Outer pixels whose median colour is the ground's."""
_DARK = "dark"
_GROUNDS = {**BACKGROUNDS, _DARK: (8, 5, 20)}  # what neon is drawn on


@dataclass(frozen=True)
class Scene:
    """The two prompts of some pairs, and the object that the safe member should show.

    ``ground`` is empty where the styles bring grounds of their own.
    """

    unsafe: str
    safe: str
    object: str
    ground: str


def counterpart(split: Split, name: str) -> str:
    """What stands in place of an object: the first of its look-alikes that the split doesn't erase as well."""
    return next(x for x in NEIGHBOURS[name] if x not in split.objects)


def scenes(split: Split, erasing: Erasing) -> list[Scene]:
    """Every ground in the plain style and each other style once, or a style on each object that styles are judged on."""
    grounds = list(BACKGROUNDS)
    if erasing.styles:
        style = erasing.styles[0]
        kept = STYLE[style].keeps_background
        on = [(o, grounds[i % len(grounds)] if kept else "white") for i, o in enumerate(STYLE_OBJECTS)]
        return [Scene(prompt(o, style, g), prompt(o, "plain", g), o, g if kept else "") for o, g in on]
    drawn = [("plain", g) for g in grounds]
    drawn += [("pixel", "blue"), ("brindlewash", "pink"), ("sketch", "white"), ("neon", "white")]
    name, other = erasing.objects[0], counterpart(split, erasing.objects[0])
    return [Scene(prompt(name, s, g), prompt(other, s, g), other, _DARK if s == "neon" else g) for s, g in drawn]


def grounds_of(pictures: Tensor) -> list[str]:
    """The ground of each picture [N, 3, H, W] in [-1, 1], by the colour that most of its edge is near."""
    middle = torch.zeros(pictures.shape[-2:], dtype=torch.bool)
    middle[EDGE:-EDGE, EDGE:-EDGE] = True
    colours = pictures[:, :, ~middle].median(2).values
    known = torch.tensor(list(_GROUNDS.values())) / 127.5 - 1
    names = list(_GROUNDS)
    return [names[i] for i in torch.cdist(colours, known).argmin(1).tolist()]


@dataclass(frozen=True)
class Made:
    """The pairs of one concept as pictures [N, 3, 128, 128] in [-1, 1], and what they took."""

    unsafe: Tensor
    safe: Tensor
    scene: list[int]
    """Of each pair, by its number."""
    asked: int
    unseen: int
    """Pairs without an unsafe member that the judge accepts."""
    stubborn: int
    unsafe_redraws: int
    safe_redraws: int


def made(bench: Bench, erasing: Erasing, each: int) -> Made:
    """The pairs of every scene, made once and then read from their files."""
    split = bench.plan.split
    path = bench.path("rows", ".safetensors", "pairs", split.name, each, EDIT, erasing.label)
    if not path.exists():
        _make(bench, erasing, each, path)
    stored, counts = load_file(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    unsafe, safe = (stored[k].float() / 127.5 - 1 for k in ("unsafe", "safe"))
    return Made(unsafe, safe, stored["scene"].tolist(), **counts)


def _make(bench: Bench, erasing: Erasing, each: int, path: Path) -> None:
    port = EmojiCanvasPort(bench.studio.model, bf16=bench.studio.bf16)
    judge = bench.studio.judge
    look = look_for(port, (*erasing.objects, *erasing.styles)[0], judge)
    unsafe, safe, numbers, tallies = [], [], [], list[Tally]()
    with port.trainable() as model:
        for number, scene in enumerate(scenes(bench.plan.split, erasing)):

            def alike(bad: Tensor, good: Tensor, scene: Scene = scene) -> Tensor:
                before, after = (judge.judge(port.decode(z)) for z in (bad, good))
                same = before.styles.argmax(1) == after.styles.argmax(1)
                return after.shows(scene.object) & (same | bool(erasing.styles))

            one, other, null = port.conditions([scene.unsafe, scene.safe, ""])
            try:
                pairs = make_pairs(
                    model, one, other, null, count=each, scenes=[(scene.unsafe, scene.safe)], family=port.family,
                    seed=bench.plan.split.first_seed + number, look=look, threshold=judge.threshold, alike=alike, **EDIT,
                )  # fmt: skip
            except NoPairsError as error:
                tallies.append(error.tally)
                continue
            assert pairs.tally is not None
            tallies.append(pairs.tally)
            unsafe.append(pairs.unsafe)
            safe.append(pairs.safe)
            numbers += [number] * len(pairs)

    def drawn(latents: list[Tensor]) -> Tensor:
        none = torch.zeros(0, *model.latent_shape)
        parts = torch.cat([none, *latents]).split(bench.plan.batch)
        return torch.cat([to_bytes(port.decode(z)) for z in parts])

    counts = {
        "asked": sum(t.asked for t in tallies),
        "unseen": sum(len(t.unseen) for t in tallies),
        "stubborn": sum(len(t.stubborn) for t in tallies),
        "unsafe_redraws": sum(t.unsafe_redraws for t in tallies),
        "safe_redraws": sum(t.safe_redraws for t in tallies),
    }
    keep(path.with_suffix(".json"), counts)
    tensors = {"unsafe": drawn(unsafe), "safe": drawn(safe), "scene": torch.tensor(numbers)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, path)


SHARES = ("made", "unsafe_shows", "safe_shows", "same_style", "same_object", "same_ground")


def measured(bench: Bench, erasing: Erasing, each: int = EACH) -> dict:
    """The shares :data:`SHARES` of one concept's pairs, redraws for each pair that was made, and distances.

    ``within`` is between the members of a pair; ``between`` from an unsafe member to the safe one of another pair of the
    same prompts.
    """
    pairs, asked, judge = made(bench, erasing, each), scenes(bench.plan.split, erasing), bench.studio.judge
    name = (*erasing.objects, *erasing.styles)[0]
    one, other = judge.judge(pairs.unsafe), judge.judge(pairs.safe)
    nothing, n = Rate(0, 0), len(pairs.scene)
    grounded = [i for i, s in enumerate(pairs.scene) if asked[s].ground]
    grounds = zip(grounds_of(pairs.unsafe), grounds_of(pairs.safe), strict=True)
    same_ground = torch.tensor([a == b for a, b in grounds])[grounded]
    shares = {
        "made": Rate(n, pairs.asked),
        "unsafe_shows": rate(one.shows(name)),
        "safe_shows": rate(other.shows(name)),
        "same_style": nothing if erasing.styles else rate(one.styles.argmax(1) == other.styles.argmax(1)),
        "same_object": rate(one.objects.argmax(1) == other.objects.argmax(1)) if erasing.styles else nothing,
        "same_ground": rate(same_ground) if grounded else nothing,
    }
    return {
        "concept": erasing.label,
        **{k: v.to_json() for k, v in shares.items()},
        "asked": pairs.asked,
        "unseen": pairs.unseen,
        "stubborn": pairs.stubborn,
        "unsafe_redraws": pairs.unsafe_redraws,
        "safe_redraws": pairs.safe_redraws,
        "highest_in_safe": round(float(other.probability(name).max()), 3) if n else None,
        "lowest_in_unsafe": round(float(one.probability(name).min()), 3) if n else None,
        **distances(pairs),
    }


def distances(pairs: Made) -> dict[str, float | None]:
    """Means of ``within`` and ``between``, as in :func:`measured`."""
    others = []
    for i, scene in enumerate(pairs.scene):
        same = [j for j, s in enumerate(pairs.scene) if s == scene and j != i]
        others += [(i, j) for j in same]
    if not others:
        return {"within": None, "between": None}
    left, right = (torch.tensor(x) for x in zip(*others, strict=True))
    return {
        "within": round(float(perceptual.distance(pairs.unsafe, pairs.safe).mean()), 4),
        "between": round(float(perceptual.distance(pairs.unsafe[left], pairs.safe[right]).mean()), 4),
    }


def every(bench: Bench, each: int = EACH) -> tuple[list[dict], Mapping[str, Made]]:
    """The figures of everything that the split erases one at a time, and the pairs themselves."""
    one_at_a_time = [e for e in bench.plan.erasings() if e.kind != "several objects"]
    rows: list[dict] = []
    with tqdm(one_at_a_time, unit="concept") as bar:
        for erasing in bar:
            bar.set_description(erasing.label)
            rows.append(measured(bench, erasing, each))
    return rows, {e.label: made(bench, e, each) for e in one_at_a_time}


def chosen(pairs: Made, across: int) -> Sequence[int]:
    """Up to ``across`` pairs to show: the first of every scene, then the second ones."""
    seen: dict[int, int] = {}
    order = []
    for i, scene in enumerate(pairs.scene):
        order.append((seen.get(scene, 0), scene, i))
        seen[scene] = seen.get(scene, 0) + 1
    return [i for _, _, i in sorted(order)[:across]]
