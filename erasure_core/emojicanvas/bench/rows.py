"""Measuring erasures on the testbed: pictures with and without one, judged; each finished result is a file."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...api import erase
from ...artifact import Erasure, digest
from ...attacks import all_attacks
from ...concept import Concept, ConceptSpec
from ...formats import load, save
from ...methods import all_methods
from ...metrics.judge_error import JudgeError
from ...metrics.rates import Rate, pooled, rate
from ..judge import Judge
from ..model import EmojiCanvas, EmojiCanvasPort
from ..splits import Erasing, Questions, Split, erasings, questions
from ..studio import Sampler, Studio
from .measures import flags, measure
from .settings import aids_for


class Keep(StrEnum):
    """What erasers are told to keep."""

    NAMED = "named"
    """Every other object and style."""
    EVERYDAY = "everyday"
    """Everyday words, as Erase Concept does by default, and nothing else."""
    NOTHING = "nothing"


def spec_of(erasing: Erasing, replace_with: str = "", told: Keep = Keep.NAMED) -> ConceptSpec:
    """The request: its names and named aliases, and what is to be kept."""
    keep = tuple(k for k in erasing.keep() if k != replace_with) if told is Keep.NAMED else ()
    erase = tuple(Concept(words, replace_with) for words in erasing.words())
    return ConceptSpec(erase, keep, told is Keep.EVERYDAY)


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
    """Pictures of the base, erasures and finished rows are kept here; named after the contents of model and judge."""
    batch: int = 32
    only: tuple[str, ...] = ()
    """Erase these alone, of what the split erases, by :attr:`Erasing.key`."""
    keep: Keep = Keep.NAMED
    pictures: int = 0
    """Of each cell of a leaderboard; 0: what makes its intervals narrow enough (siege.py)."""
    pace: float | None = None
    """Seconds that a picture takes where this is measured, if known. Kept with results, for costs elsewhere."""

    def studio(self) -> Studio:
        return Studio(EmojiCanvas.load(self.model), Judge.load(self.judge), self.sampler, self.folder, self.batch)

    def erasings(self) -> list[Erasing]:
        return [e for e in erasings(self.split) if not self.only or e.key in self.only]


RESULTS = Path("docs/results")
"""Pages, and beside each a JSON with what it was made from (:meth:`Bench.record`)."""


class Bench:
    """One model, judge, split and size. Each finished row is a file, so processes share them and nothing is lost."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.studio = plan, plan.studio()
        self.drawn: dict[str, dict[Hashable, Tensor]] = defaultdict(dict)
        """By what is erased: base pictures that attacks on it have drawn already."""
        for folder in ("rows", "erasures", "attacks"):
            (plan.folder / folder).mkdir(exist_ok=True)

    def recall(self, own: str = "") -> None:
        """Take what the pages of the same model and judge were made from as measured. Where they differ, by another training or
        an earlier version of a method or an attack, the later version counts, then what is measured here, then the page
        ``own``."""
        for path in sorted(RESULTS.glob("*.json"), key=lambda path: (path.stem != own, path.stem)):
            page = json.loads(path.read_text(encoding="utf-8"))
            if page.get("model_and_judge") != self.plan.folder.name:
                continue
            for folder, results in page["measured"].items():
                for name, row in results.items():
                    known = self.plan.folder / folder / f"{name}.json"
                    if _discarded(known).exists():
                        continue
                    if not known.exists() or _versions(row) > _versions(_read(known)):
                        keep(known, row)

    def record(self, paths: Iterable[Path]) -> dict[str, Any]:
        """Results for the JSON of a page, from where :meth:`recall` takes them on another machine."""
        found: dict[str, dict[str, Any]] = {}
        for path in sorted(p for p in set(paths) if p.exists()):
            found.setdefault(path.parent.name, {})[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        return {"model_and_judge": self.plan.folder.name, "measured": found}

    def path(self, folder: str, ending: str, *key: Any) -> Path:
        """The file in which a result is kept that depends on ``key``, beside model and judge."""
        told = [] if self.plan.keep is Keep.NAMED else [f"{self.plan.keep} kept"]
        text = json.dumps([*key, *told], sort_keys=True)
        return self.plan.folder / folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}{ending}"

    def row_path(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> Path:
        p = self.plan
        protocol = [p.split.name, p.seeds, p.rounds, p.replace_with, dataclasses.astuple(p.sampler)]
        return self.path("rows", ".json", *protocol, erasing.label, method, settings)

    def row(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> dict | None:
        """A finished row; it may be outdated."""
        path = self.row_path(erasing, method, settings)
        return _read(path) if path.exists() else None

    def asked(self, erasing: Erasing) -> Questions:
        return questions(self.plan.split, erasing, self.plan.seeds, self.plan.rounds)

    def measure_row(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> None:
        """Erase, draw, judge, and keep the row."""
        keep(self.row_path(erasing, method, settings), self._row(erasing, self.asked(erasing), method, settings))

    def spec(self, erasing: Erasing) -> ConceptSpec:
        return spec_of(erasing, self.plan.replace_with, self.plan.keep)

    def erasure_path(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> Path:
        p = self.plan
        key: list[Any] = [p.split.name, p.replace_with, erasing.label, method, settings]
        version = method_version(method)
        key += [version] if version > 1 else []
        return self.path("erasures", ".safetensors", *key)

    def erase(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> tuple[Erasure, dict[str, float]]:
        """The erasure, and what it cost: ``seconds``, encoding the text included, and whether the machine was ``busy`` with
        other work meanwhile.

        Computed once, then read from its file.
        """
        path = self.erasure_path(erasing, method, settings)
        if not path.exists():
            port = EmojiCanvasPort(self.studio.model, bf16=self.studio.bf16)
            aids = aids_for(method, port, erasing, self.studio.judge)
            began = time.perf_counter()
            made = erase(port, self.spec(erasing), method, settings, aids=aids)
            seconds = time.perf_counter() - began
            cost = {"seconds": round(seconds, 2), "busy": _busy(seconds)}
            keep(path.with_suffix(".json"), cost)
            save(made, path)
        return load(path), json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))

    def _row(self, erasing: Erasing, asked: Questions, method: str, settings: Mapping) -> dict:
        erasure: Erasure | None = None
        cost: Mapping[str, float | None] = {"seconds": None}
        if method != "none":
            erasure, cost = self.erase(erasing, method, settings)
        began = time.perf_counter()
        found, moved = measure(self.studio, asked, erasing, lambda shots: self.studio.draw(shots, erasure))
        return {
            "erased": erasing.label,
            "kind": erasing.kind,
            "method": method,
            "method_version": method_version(method),
            "settings": dict(settings),
            **cost,
            "bf16": self.studio.bf16,
            "pace": self.plan.pace,
            "drawing_seconds": round(time.perf_counter() - began, 1),
            **moved,
            "erasure": None if erasure is None else digest(erasure.deltas)[:16],
            **{k: v.to_json() for k, v in found.items()},
        }


def method_version(method: str) -> int:
    """Of a method as it is now; of "none", the unchanged model, 1."""
    return all_methods()[method].version if method in all_methods() else 1


def _versions(row: Mapping[str, Any]) -> tuple[int, int]:
    """Of the method and of the attack that a result is of."""
    return row.get("method_version", 1), row.get("version", 1)


def is_outdated(row: Mapping[str, Any]) -> bool:
    """Whether a result is of an earlier version of its method or of its attack, with which today's don't compare."""
    method, attack = row.get("method", "none"), row.get("attack", "")
    now = method_version(method), all_attacks()[attack].version if attack in all_attacks() else 1
    return any(was < is_now for was, is_now in zip(_versions(row), now, strict=True))


def outdated_methods(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Of which methods there are results of an earlier version."""
    old = (r["method"] for r in rows if r.get("method_version", 1) < method_version(r.get("method", "none")))
    return sorted(set(old))


def is_measured(path: Path) -> bool:
    """Whether a result is there, of the method and the attack as they are now."""
    return path.exists() and not is_outdated(_read(path))


def _busy(seconds: float) -> bool:
    """Whether more threads ran than this process has: in the last minute, after a long run in the last five or fifteen too.
    Never where the system can't tell."""
    if not hasattr(os, "getloadavg"):
        return False
    windows = zip((0, 300, 900), os.getloadavg(), strict=True)
    return any(load > torch.get_num_threads() + 0.5 for window, load in windows if seconds >= window)


def arithmetic(rows: Iterable[Mapping[str, Any]]) -> str:
    """What results were computed in, for a page."""
    kinds = [row["bf16"] for row in rows]
    if all(kinds):
        return "Computed in bfloat16."
    if not any(kinds):
        return "Computed in float32."
    return f"Computed in bfloat16, {kinds.count(False)} of {len(kinds)} results in float32 (docs/emojicanvas.md)."


def timed(rows: Iterable[Mapping[str, Any]], pace: float | None = None) -> tuple[bool, float | None]:
    """(whether any row was made alone on the machine, the mean seconds of those that were; of all where none was).

    With ``pace`` they are as on a machine where a picture takes so long, of rows that say how long it took on theirs.
    """
    known = [r for r in rows if r["seconds"] is not None]
    scaled = [r["seconds"] * (pace / r["pace"] if pace and r.get("pace") else 1.0) for r in known]
    alone = [s for s, r in zip(scaled, known, strict=True) if not r.get("busy")]
    seconds = alone or scaled
    return bool(alone) or not known, statistics.fmean(seconds) if seconds else None


def least_pace(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """That of the fastest machine among those of ``rows``."""
    return min((r["pace"] for r in rows if r.get("pace")), default=None)


def judge_error(bench: Bench, erased: Sequence[Erasing]) -> JudgeError:
    """How the judge errs on what is erased, one at a time: hits on drawings that it never saw, of objects and styles as often
    as these are erased, alarms on the base model's pictures of everything but the concept in question."""
    judge, hits, alarms = bench.studio.judge, [], []
    for erasing in erased:
        kept = bench.asked(erasing).groups()["kept"]
        hits.append(judge.held_out[erasing.kind])
        alarms.append(rate(flags(judge.judge(bench.studio.draw(kept, None)), [erasing.key] * len(kept))))
    seen, n = statistics.fmean(r.share for r in hits), hits[0].n  # of one set of drawings
    return JudgeError(Rate(round(n * seen), n), pooled(alarms))


def kept_pictures(bench: Bench) -> int:
    """How many pictures of what is kept there are: each erasure is looked at by the same prompts and seeds."""
    return len({s for e in bench.plan.erasings() if e.key != "together" for s in bench.asked(e).groups()["kept"]})


def errors_by_kind(bench: Bench) -> dict[str, JudgeError]:
    """:func:`judge_error` for "object" and "style", over all that the split erases."""
    single = [e for e in erasings(bench.plan.split) if e.key != "together"]
    return {kind: judge_error(bench, [e for e in single if e.kind == kind]) for kind in ("object", "style")}


def keep(path: Path, row: Mapping[str, Any]) -> None:
    """Write a result in one move, so that another process finds all of it or nothing."""
    write(path, json.dumps(row, indent=1).encode())


def write(path: Path, content: bytes) -> None:
    """A file of results in one move; it is no longer to be measured again."""
    half = path.with_suffix(f".{os.getpid()}.tmp")  # others may be writing the same
    half.write_bytes(content)
    half.replace(path)
    _discarded(path).unlink(missing_ok=True)


def _read(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def discard(path: Path) -> None:
    """Have a result measured again, also where that is stopped first and :meth:`Bench.recall` would bring the old one back."""
    if path.exists():
        _discarded(path).touch()
        path.unlink()


def _discarded(path: Path) -> Path:
    return path.with_suffix(".discarded")
