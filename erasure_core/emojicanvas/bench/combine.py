"""Several erasures on one model: added up, merged, or each behind its gate; and one alone behind its gate."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...artifact import Erasure
from ...fusion import added, merge
from ...gating import gated
from ...port import ModelPort
from ..model import EmojiCanvasPort
from ..splits import Erasing, Shot, erasings
from ..studio import Studio
from .effect import summary, table
from .measures import measure
from .rows import RESULTS, Bench, arithmetic, errors_by_kind, is_measured, keep, method_version

METHODS = ("uce", "esd", "spm")
"""In closed form, trained, and the one that is meant to be gated."""


class How(StrEnum):
    """How erasures that were made one at a time come onto one model."""

    ADDED = "added"
    """As *Apply Erasure* behind *Apply Erasure*."""
    MERGED = "merged"
    GATED = "gated"


def draw_with(
    studio: Studio, port: ModelPort, erasures: Sequence[Erasure], how: How
) -> Callable[[Sequence[Shot]], Tensor]:
    """What draws shots with all ``erasures`` on the model."""
    if how is How.MERGED:
        merged = merge(port, erasures)
        return lambda shots: studio.draw(shots, merged)
    if how is How.ADDED:
        names = dict.fromkeys(name for e in erasures for name in e.deltas)
        total = Erasure(erasures[0].header, {name: added(name, erasures) for name in names})
        return lambda shots: studio.draw(shots, total)

    def draw(shots: Sequence[Shot]) -> Tensor:
        of_prompt: dict[str, list[int]] = defaultdict(list)
        for number, shot in enumerate(shots):
            of_prompt[shot.prompt].append(number)
        drawn = [studio.draw([shots[n] for n in ns], gated(port, erasures, p)) for p, ns in of_prompt.items()]
        order = torch.tensor([n for ns in of_prompt.values() for n in ns])
        return torch.cat(drawn)[order.argsort()]

    return draw


def alone(together: Erasing) -> list[Erasing]:
    """What is erased together, one at a time."""
    return [Erasing(objects=(name,)) for name in together.objects]


def row_path(bench: Bench, asked: Erasing, method: str, settings: Mapping[str, Any], how: How) -> Path:
    plan = bench.plan
    protocol = [plan.split.name, plan.seeds, plan.rounds, plan.replace_with, dataclasses.astuple(plan.sampler)]
    return bench.path("rows", ".json", "combine", how.value, *protocol, asked.label, method, settings)


def measured(bench: Bench, asked: Erasing, method: str, settings: Mapping[str, Any], how: How) -> dict[str, Any]:
    """One row; drawn once, then read from its file."""
    path = row_path(bench, asked, method, settings, how)
    if not is_measured(path):
        erasures = [bench.erase(e, method, settings)[0] for e in (alone(asked) if len(asked.objects) > 1 else [asked])]
        port = EmojiCanvasPort(bench.studio.model, bf16=bench.studio.bf16)
        draw = draw_with(bench.studio, port, erasures, how)
        found, moved = measure(bench.studio, bench.asked(asked), asked, draw)
        row = {"erased": asked.label, "kind": asked.kind, "method": method,
               "method_version": method_version(method), "how": how.value, "settings": dict(settings), "seconds": None,
               "bf16": bench.studio.bf16, **moved,
               **{k: v.to_json() for k, v in found.items()}}  # fmt: skip
        keep(path, row)
    return json.loads(path.read_text(encoding="utf-8"))


def combine(bench: Bench, chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """docs/results/combine.{md,json}: what the split erases together, made one at a time and brought onto one model.

    Raises:
        SystemExit: *effect* was not run for one of the methods yet, whose rows stand beside these.
    """
    together = erasings(bench.plan.split)[-1]
    one = alone(together)
    plain = [(e, m, s) for m, s in {"none": {}, **chosen}.items() for e in (together, *one)]
    if missing := list(dict.fromkeys(m for e, m, s in plain if not is_measured(bench.row_path(e, m, s)))):
        raise SystemExit(f"combine: measure these first: nox -s bench -- effect --method {' '.join(missing)}")
    rows = [row for e, m, s in plain if (row := bench.row(e, m, s)) is not None]
    todo = [(together, m, s, how) for m, s in chosen.items() for how in How]
    todo += [(e, m, s, How.GATED) for m, s in chosen.items() for e in one]
    with tqdm(todo, unit="row") as bar:
        for asked, method, settings, how in bar:
            bar.set_description(f"{method}, {how}: {asked.label}")
            rows.append(measured(bench, asked, method, settings, how) | {"method": f"{method}, {how}"})
    rows.sort(key=lambda row: (row["method"] != "none", row["method"]))  # how it is made beside what it is made of
    errors = errors_by_kind(bench)
    kinds = {
        kind: table(summary([r for r in rows if r["kind"] == kind]), errors) for kind in ("several objects", "object")
    }
    text = f"""# Several erasures on one model

Made by `nox -s bench -- combine --method {" ".join(chosen)}` (after `effect` for the same), on scoring prompts and seeds:
{", ".join(e.label for e in one)}, each erased alone, then brought onto one model in three ways. Shares of pictures after the
judge's error, with 95 % intervals that count it too; the columns are those of [effect](effect.md). {arithmetic(rows)}

- **added**: *Apply Erasure* behind *Apply Erasure*.
- **merged**: *Merge Erasures*.
- **gated**: *Gate Erasures* with the prompt that is drawn. (The nodes take four at a time.)
- without a word behind the method: erased at once, in one go.

{kinds["several objects"]}

## One erasure, with and without a gate

Over the same {len(one)}, each alone. Kept pictures are the same for every erasure: over several erasures their intervals are
narrower than so few pictures allow.

{kinds["object"]}
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "combine.md").write_text(text, encoding="utf-8")
    paths = [bench.row_path(e, m, s) for e, m, s in plain] + [row_path(bench, *each) for each in todo]
    (RESULTS / "combine.json").write_text(json.dumps(bench.record(paths), indent=1), encoding="utf-8")
    print(text)
