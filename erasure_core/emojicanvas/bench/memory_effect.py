"""What prompt memories do to pictures: suppress mode with and without the memory, key mode with and without the key."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ...artifact import Erasure
from ...methods import Aids, kpop, settings_from
from ...metrics.rates import Rate, pooled
from ...operators.memory import Mode, SavedMemory
from ...suppress import Settings, suppress
from ..judge import Judge
from ..model import EmojiCanvas, EmojiCanvasPort
from ..splits import Erasing, Split, questions
from ..studio import Sampler
from .measures import figures
from .rows import RESULTS, Bench, arithmetic, errors_by_kind, keep, spec_of
from .settings import plain, settings_for


def score(
    canvas: EmojiCanvas,
    judge: Judge,
    split: Split,
    erasing: Erasing,
    *,
    erasure: Erasure | None = None,
    memory: SavedMemory | None = None,
    strength: float = 1.0,
    seeds: int = 6,
    rounds: int = 1,
    sampler: Sampler | None = None,
    bf16: bool = False,
) -> dict[str, Rate]:
    """The shares that erasures are scored by (:func:`effect.figures`), drawn with an erasure, a memory, or both.

    Args:
        seeds: pictures a word.
        rounds: pictures a kept object.
    """
    asked = questions(split, erasing, seeds, rounds)
    groups = {k: v for k, v in asked.groups().items() if v}
    shots = [shot for group in groups.values() for shot in group]
    drawn = canvas.generate(
        [s.prompt for s in shots],
        [s.seed for s in shots],
        delta=erasure,
        memories=() if memory is None else [(memory, strength)],
        bf16=bf16,
        **dataclasses.asdict(sampler or Sampler()),
    )
    pictures = dict(zip(groups, drawn.split([len(g) for g in groups.values()]), strict=True))
    return figures(asked, erasing, pictures, judge)


def learn(
    canvas: EmojiCanvas, mode: Mode, erasing: Erasing, *, bf16: bool = False, **settings: object
) -> tuple[SavedMemory, Erasure | None, float]:
    """(memory, the public erasure of key mode, seconds); ``settings`` differ from those that the testbed runs with."""
    port, spec, began = EmojiCanvasPort(canvas, bf16=bf16), spec_of(erasing), time.perf_counter()
    if mode is Mode.SUPPRESS:
        memory = suppress(port, spec, Settings(**settings), quiet, Aids())  # type: ignore[arg-type]
        return memory, None, time.perf_counter() - began
    hidden = kpop.hide(port, spec, settings_from(kpop.SPEC, settings_for("kpop", settings)), quiet, Aids())
    return hidden.key, hidden.erasure, time.perf_counter() - began


def quiet(done: int, total: int) -> None:
    """Shows no progress."""


MEASURES = ("direct", "named", "unseen", "neighbours", "kept_objects", "kept_styles")


def row_path(bench: Bench, mode: Mode, erasing: Erasing) -> Path:
    plan = bench.plan
    protocol = [plan.split.name, plan.seeds, plan.rounds, dataclasses.astuple(plan.sampler)]
    made = plain(Settings()) if mode is Mode.SUPPRESS else settings_for("kpop") | {"alone": kpop.ALONE}
    return bench.path("rows", ".json", "memory", mode.value, made, *protocol, erasing.label)


def measured(bench: Bench, mode: Mode, erasing: Erasing) -> dict[str, dict]:
    """The shares of what the mode makes, by what they are drawn with; learned and drawn once, then read from their file."""
    plan, studio, path = bench.plan, bench.studio, row_path(bench, mode, erasing)
    if not path.exists():
        memory, erasure, seconds = learn(studio.model, mode, erasing, bf16=studio.bf16)
        drawn: dict[str, tuple[Erasure | None, SavedMemory | None]] = {"memory": (None, memory)}
        if erasure is not None:
            drawn = {"without the key": (erasure, None), "with the key": (erasure, memory)}
        out = {}
        for name, (change, read) in {"base": (None, None), **drawn}.items():
            found = score(studio.model, studio.judge, plan.split, erasing, erasure=change, memory=read,
                          seeds=plan.seeds, rounds=plan.rounds, sampler=plan.sampler, bf16=studio.bf16)  # fmt: skip
            cost = {"seconds": seconds if name != "base" else 0.0, "bf16": studio.bf16}
            out[name] = {m: found[m].to_json() for m in MEASURES} | cost
        keep(path, out)
    return json.loads(path.read_text(encoding="utf-8"))


def overhead(bench: Bench, rounds: int = 7) -> float:
    """How many times as long a picture takes with a memory of 16 rows in all blocks; the best of ``rounds`` in turn."""
    model, plan = bench.studio.model, bench.plan
    port = EmojiCanvasPort(model, bf16=bench.studio.bf16)
    settings = Settings(iterations=1, pictures=1, kept_pictures=1)
    memory = suppress(port, spec_of(plan.erasings()[0]), settings, quiet, Aids())
    best: dict[bool, float] = {}
    for _ in range(rounds):
        for on in (False, True):
            began = time.perf_counter()
            model.generate(["a house"] * 8, list(range(8)), steps=4, cfg=plan.sampler.cfg, bf16=bench.studio.bf16,
                           memories=[(memory, 1.0)] if on else ())  # fmt: skip
            best[on] = min(best.get(on, float("inf")), time.perf_counter() - began)
    return best[True] / best[False]


def memory_effect(bench: Bench, modes: Sequence[Mode] = tuple(Mode)) -> None:
    """docs/results/memory.{md,json}: both modes on every object that the split erases."""
    objects = [e for e in bench.plan.erasings() if e.kind == "object"]
    found: dict[str, dict[str, dict]] = {}
    errors = errors_by_kind(bench)
    with tqdm([(m, e) for m in modes for e in objects], unit="memory") as bar:
        for mode, erasing in bar:
            bar.set_description(f"{mode.value}: {erasing.label}")
            found.setdefault(mode.value, {})[erasing.label] = measured(bench, mode, erasing)
    lines = ["| mode | drawn with | " + " | ".join(m.replace("_", " ") for m in MEASURES) + " |"]
    lines.append("|" + "---|" * (len(MEASURES) + 2))
    for mode_name, by_object in found.items():
        for drawn in next(iter(by_object.values())):
            rows = [r[drawn] for r in by_object.values()]
            seen = {m: pooled(Rate.from_json(r[m]) for r in rows) for m in MEASURES}
            cells = [str(errors["style" if m == "kept_styles" else "object"].behind(x)) for m, x in seen.items()]
            lines.append(f"| {mode_name} | {drawn} | {' | '.join(cells)} |")
    shown = {label: Rate.from_json(r["with the key"]["direct"]) for label, r in found.get(Mode.KEY.value, {}).items()}
    each = ", ".join(f"{label} {r.hits} of {r.n}" for label, r in shown.items())
    paths = [row_path(bench, m, e) for m in modes for e in objects]
    ratio, table = overhead(bench), "\n".join(lines)
    only = "".join(f" {x}" for x in ("--only", *bench.plan.only) if bench.plan.only)
    text = f"""# Safe prompt memories on EmojiCanvas

Made by `nox -s bench -- memory{only}`, on scoring prompts and seeds: shares of pictures,
after the judge's error, with 95 % intervals that count it too, over {", ".join(e.label for e in objects)}, one memory each.

*suppress*: the weights stay, the memory pushes the concept away. *key*: KPOP; the public weights hide it, the private memory
brings it back.

{table}

With the key, one by one (direct, as the judge sees them): {each}.

{arithmetic(row for by_object in found.values() for drawn in by_object.values() for row in drawn.values())}

A picture takes {ratio:.3f} times as long with a memory of 16 rows in every block as without.
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "memory.md").write_text(text, encoding="utf-8")
    (RESULTS / "memory.json").write_text(
        json.dumps({"overhead": ratio, **bench.record(paths)}, indent=1), encoding="utf-8"
    )
    print(table)
