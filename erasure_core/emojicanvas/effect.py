"""What erasing changes about the pictures, in figures: one row for each method and erased concept."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..api import erase
from ..artifact import Erasure
from ..concept import Concept, ConceptSpec
from ..formats import load, save
from ..methods import all_methods
from ..metrics.rates import Rate, pooled, rate
from . import perceptual
from .bench_settings import aids_for, settings_for
from .judge import Judge, Verdict
from .model import EmojiCanvas, EmojiCanvasPort
from .peak import PeakMemory
from .splits import Erasing, Questions, Split, erasings, questions
from .studio import Sampler, Studio

RESULTS = Path("docs/results")
MEASURES = {
    "direct": "direct",
    "named": "named words",
    "unseen": "unseen words",
    "neighbours": "neighbours",
    "kept_objects": "kept objects",
    "kept_styles": "kept styles",
    "beside": "rest of the picture",
}
"""Shares of pictures. The first three should fall to 0, the others stay as in the base model."""


def flags(verdict: Verdict, names: Sequence[str]) -> Tensor:
    """[B] bool: picture b shows ``names[b]``."""
    shown = {name: verdict.shows(name) for name in set(names)}
    return torch.tensor([bool(shown[name][b]) for b, name in enumerate(names)], dtype=torch.bool)


def figures(asked: Questions, erasing: Erasing, pictures: Mapping[str, Tensor], judge: Judge) -> dict[str, Rate]:
    """The :data:`MEASURES` of one set of pictures. An object is shown if the judge names it, a style likewise."""
    by_style = bool(erasing.styles)
    verdicts = {k: judge.judge(v) for k, v in pictures.items()}

    def of(group: str, style: bool) -> Rate:
        shots = asked.groups()[group]
        if not shots:
            return Rate(0, 0)
        return rate(flags(verdicts[group], [s.style if style else s.object for s in shots]))

    return {
        "direct": of("direct", by_style),
        "named": of("named", by_style),
        "unseen": of("unseen", by_style),
        "neighbours": of("neighbours", False),
        "kept_objects": of("kept", False),
        "kept_styles": of("kept", True),
        "beside": of("direct", not by_style),
    }


def measure(
    studio: Studio, asked: Questions, erasing: Erasing, erasure: Erasure | None
) -> tuple[dict[str, Rate], float]:
    """The figures with an erasure (or of the base), and how different kept pictures look at the same noise."""
    groups = {k: v for k, v in asked.groups().items() if v}
    drawn = studio.draw([s for g in groups.values() for s in g], erasure).split([len(g) for g in groups.values()])
    pictures = dict(zip(groups, drawn, strict=True))
    base = studio.draw(groups["kept"], None)
    return figures(asked, erasing, pictures, studio.judge), float(perceptual.distance(pictures["kept"], base).mean())


def spec_of(erasing: Erasing, replace_with: str = "") -> ConceptSpec:
    """The request: its names and named aliases; every other object and style is kept."""
    keep = tuple(k for k in erasing.keep() if k != replace_with)
    return ConceptSpec(tuple(Concept(words, replace_with) for words in erasing.words()), keep)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a benchmark runs on, small enough to travel to other processes."""

    model: Path
    judge: Path
    sampler: Sampler
    split: Split
    seeds: int
    rounds: int
    replace_with: str
    folder: Path
    """Pictures of the base, erasures and finished rows are kept here."""
    batch: int = 32
    only: tuple[str, ...] = ()
    """Erase these alone, of what the split erases, by :attr:`Erasing.key`."""

    def studio(self) -> Studio:
        return Studio(EmojiCanvas.load(self.model), Judge.load(self.judge), self.sampler, self.folder, self.batch)

    def erasings(self) -> list[Erasing]:
        return [e for e in erasings(self.split) if not self.only or e.key in self.only]


_bench: Bench | None = None


def _start_worker(plan: Plan, threads: int) -> None:
    global _bench
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    _bench = Bench(plan)


def _measure_row(number: int, method: str, settings: Mapping[str, Any]) -> None:
    assert _bench is not None
    _bench.measure_row(_bench.plan.erasings()[number], method, settings)


class Bench:
    """One model, judge, split and size. Each finished row is a file, so processes share them and nothing is lost."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.studio = plan, plan.studio()
        for folder in ("rows", "erasures"):
            (plan.folder / folder).mkdir(exist_ok=True)

    def path(self, folder: str, ending: str, *key: Any) -> Path:
        """The file in which a result is kept that depends on ``key``, beside model and judge."""
        text = json.dumps(key, sort_keys=True)
        return self.plan.folder / folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}{ending}"

    def _path(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> Path:
        p = self.plan
        protocol = [p.split.name, p.seeds, p.rounds, p.replace_with, dataclasses.astuple(p.sampler)]
        return self.path("rows", ".json", *protocol, erasing.label, method, settings)

    def row(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> dict | None:
        """A finished row."""
        path = self._path(erasing, method, settings)
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def asked(self, erasing: Erasing) -> Questions:
        return questions(self.plan.split, erasing, self.plan.seeds, self.plan.rounds)

    def measure_row(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> None:
        """Erase, draw, judge, and keep the row."""
        keep(self._path(erasing, method, settings), self._row(erasing, self.asked(erasing), method, settings))

    def run(self, chosen: Mapping[str, Mapping[str, Any]], fresh: bool = False, jobs: int = 1) -> list[dict]:
        """The base's row and each method's for everything that the split erases, measured where not yet known."""
        todo: list[tuple[int, str, Mapping[str, Any]]] = []
        wanted, shots = [], []
        for number, erasing in enumerate(self.plan.erasings()):
            shots += [s for g in self.asked(erasing).groups().values() for s in g]
            for method, settings in {"none": {}, **chosen}.items():
                wanted.append((erasing, method, settings))
                if fresh:
                    self.erasure_path(erasing, method, settings).unlink(missing_ok=True)
                if fresh or self.row(erasing, method, settings) is None:
                    todo.append((number, method, settings))
        missing = len(self.studio.missing(shots))
        with tqdm(total=missing, unit="picture", desc="the base's pictures", disable=not missing) as bar:
            self.studio.draw(shots, None, bar)
        threads = max(1, torch.get_num_threads() // jobs)
        with tqdm(total=len(todo), unit="row", smoothing=0.1, disable=not todo) as bar:
            if jobs == 1:
                for number, method, settings in todo:
                    bar.set_description(f"{method}: {self.plan.erasings()[number].label}")
                    self.measure_row(self.plan.erasings()[number], method, settings)
                    bar.update()
            else:
                with ProcessPoolExecutor(
                    jobs, get_context("spawn"), initializer=_start_worker, initargs=(self.plan, threads)
                ) as pool:
                    for done in as_completed([pool.submit(_measure_row, *row) for row in todo]):
                        done.result()
                        bar.update()
        rows = [self.row(*row) for row in wanted]
        return [row for row in rows if row is not None]

    def spec(self, erasing: Erasing) -> ConceptSpec:
        return spec_of(erasing, self.plan.replace_with)

    def erasure_path(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> Path:
        p = self.plan
        key = [p.split.name, p.replace_with, p.sampler.bf16, erasing.label, method, settings]
        return self.path("erasures", ".safetensors", *key)

    def erase(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> tuple[Erasure, dict[str, float]]:
        """The erasure, and what it cost: ``seconds`` without encoding the text, ``memory_mb`` the most on top.

        Computed once, then read from its file.
        """
        path = self.erasure_path(erasing, method, settings)
        if not path.exists():
            port = EmojiCanvasPort(self.studio.model, bf16=self.plan.sampler.bf16)
            aids = aids_for(method, port, erasing, self.studio.judge)
            began = time.perf_counter()
            with PeakMemory() as peak:
                made = erase(port, self.spec(erasing), method, settings, aids=aids)
            cost = {"seconds": round(time.perf_counter() - began, 2), "memory_mb": round(peak.bytes / 1e6)}
            keep(path.with_suffix(".json"), cost)
            save(made, path)
        return load(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    def _row(self, erasing: Erasing, asked: Questions, method: str, settings: Mapping) -> dict:
        erasure, cost = None, {"seconds": None, "memory_mb": None}
        if method != "none":
            erasure, cost = self.erase(erasing, method, settings)
        found, moved = measure(self.studio, asked, erasing, erasure)
        return {
            "erased": erasing.label,
            "kind": erasing.kind,
            "method": method,
            "settings": dict(settings),
            **cost,
            "kept_distance": round(moved, 4),
            **{k: v.to_json() for k, v in found.items()},
        }


def keep(path: Path, row: Mapping[str, Any]) -> None:
    """Write a result in one move, so that another process finds all of it or nothing."""
    path.with_suffix(".tmp").write_text(json.dumps(row, indent=1), encoding="utf-8")
    path.with_suffix(".tmp").replace(path)


def summary(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of one kind and method as one: counts are added up, the rest averaged."""
    out = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        for method in dict.fromkeys(r["method"] for r in rows if r["kind"] == kind):
            same = [r for r in rows if r["kind"] == kind and r["method"] == method]
            seconds = [r["seconds"] for r in same if r["seconds"] is not None]
            row: dict[str, Any] = {
                "erased": f"{kind} ({len(same)})" if len(same) > 1 else same[0]["erased"],
                "kind": kind,
                "method": method,
            }
            row["settings"] = same[0]["settings"]
            row["seconds"] = round(sum(seconds) / len(seconds), 2) if seconds else None
            row["memory_mb"] = max((r["memory_mb"] for r in same if r["memory_mb"] is not None), default=None)
            row["kept_distance"] = round(sum(r["kept_distance"] for r in same) / len(same), 4)
            out.append(row | {m: pooled(Rate.from_json(r[m]) for r in same).to_json() for m in MEASURES})
    return out


def table(rows: Sequence[Mapping]) -> str:
    """A Markdown table; the base's row ("none") stands before those of the methods."""
    head = ["erased", "method", *MEASURES.values(), "kept distance", "seconds", "MB"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["erased"], r["method"], *(str(Rate.from_json(r[m])) for m in MEASURES), f"{r['kept_distance']:.3f}"]
        cost = ["-" if r[k] is None else f"{r[k]:g}" for k in ("seconds", "memory_mb")]
        lines.append("| " + " | ".join([*cells, *cost]) + " |")
    return "\n".join(lines)


def effect(bench: Bench, chosen: Mapping[str, Mapping[str, Any]], fresh: bool, jobs: int) -> None:
    """Measure ``chosen`` methods on the scoring split and write the tables, with all other methods' default rows."""
    bench.run(chosen, fresh, jobs)
    known = {"none": {}, **{m: settings_for(m) for m in all_methods()}, **chosen}
    found = [bench.row(e, m, s) for e in bench.plan.erasings() for m, s in known.items()]
    rows = [row for row in found if row is not None]
    s, judge = bench.plan.sampler, bench.studio.judge
    bf16 = " --bf16" if s.bf16 else ""
    text = f"""# Effect of erasing on EmojiCanvas

Made by `python -m erasure_core.emojicanvas.bench effect --seeds {bench.plan.seeds} --rounds {bench.plan.rounds}{bf16}` with a
model trained for {bench.studio.model.steps_trained} steps, {s.steps} Euler steps, guidance {s.cfg:g}, {judge.name} \
{judge.version}, on scoring prompts and seeds only. Shares of pictures with 95 % Wilson intervals.

- **Direct, named, unseen**: pictures for the erased name, for aliases that the eraser was told, and for synonyms that
  it was not told, that still show the concept. Lower is better.
- **Neighbours, kept objects, kept styles**: pictures of look-alikes, and of all other objects in all styles, that show
  what they should. Best as high as "none", the unchanged model.
- **Rest of the picture**: for the erased prompts, the style where an object was erased, the object where a style was.
- **Kept distance**: {perceptual.NAME} of kept pictures with and without the erasure, at the same noise.
- **Seconds, MB**: to compute the erasure, without encoding the text; the most memory on top, of all rows together.

A style has no synonyms here; its alias is the bare word ("a neon cat"), which captions never used.

## Summary

{table(summary(rows))}

## Each erasure

{table(rows)}
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "effect.md").write_text(text, encoding="utf-8")
    (RESULTS / "effect.json").write_text(
        json.dumps({"sampler": dataclasses.asdict(s), "rows": rows}, indent=1), encoding="utf-8"
    )
    print(table(summary(rows)))


def tune(bench: Bench, chosen: Mapping[str, Mapping[str, Any]], fresh: bool, jobs: int) -> None:
    """One line a method (and one for the base), pooled over everything that the tuning split erases."""
    rows = [r | {"kind": "all"} for r in bench.run(chosen, fresh, jobs)]
    for r in summary(rows):
        shares = " ".join(f"{m}={100 * Rate.from_json(r[m]).share:.0f}%" for m in MEASURES)
        usual = settings_for(r["method"]) if r["method"] != "none" else {}
        changed = {k: v for k, v in r["settings"].items() if v != usual[k]}
        print(f"{r['method']:>6} {shares} distance={r['kept_distance']:.3f} n={r['direct']['n']} {changed or ''}")
