"""What a leaderboard will cost on this machine, from what earlier results took on theirs.

A result says how long a picture takes where it was made (``pace``), so its seconds count as so many pictures, and results of
several machines stand beside each other.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from ...attacks import all_attacks
from .engines import Task
from .rows import Bench
from .siege import budget_of

UNKNOWN = 60.0
"""Seconds for what nobody has timed yet."""
_DRAWING = "drawing what is kept and what is erased"


class Costs:
    """Seconds of one core that tasks take where a picture takes ``pace`` seconds, from what ``bench`` has results of: of an
    attack those with its budget and version, where there are any."""

    def __init__(self, bench: Bench, pace: float) -> None:
        self.bench, pictures = bench, defaultdict[str, list[float]](list)
        for path in (p for folder in ("rows", "attacks") for p in (bench.plan.folder / folder).glob("*.json")):
            row = json.loads(path.read_text(encoding="utf-8"))
            if not row.get("pace"):
                continue
            if row["seconds"] is not None:
                took, attack = row["seconds"] / row["pace"], row.get("attack")
                pictures[attack or f"erase with {row['method']}"].append(took)
                if attack:
                    pictures[_exactly(attack, row.get("budget", {}), row.get("version", 1))].append(took)
            if "drawing_seconds" in row:
                pictures[_DRAWING].append(row["drawing_seconds"] / row["pace"])
        self.seconds = {kind: pace * statistics.median(times) for kind, times in pictures.items()}
        """By kind of work."""

    def of(self, task: Task) -> float:
        if task.attack in all_attacks():
            budget = budget_of(task.attack, self.bench.plan.erasings()[task.number], task.budget)
            exactly = _exactly(task.attack, budget, all_attacks()[task.attack].version)
            if exactly in self.seconds:
                return self.seconds[exactly]
        return sum(self.seconds.get(kind, UNKNOWN) for kind in _kinds(task))

    def unknown(self, tasks: Sequence[Task]) -> list[str]:
        return sorted({kind for task in tasks for kind in _kinds(task)} - set(self.seconds))


def _exactly(attack: str, budget: Mapping[str, Any], version: int) -> str:
    return json.dumps([attack, budget, version], sort_keys=True)


def _kinds(task: Task) -> list[str]:
    if task.attack:
        return [task.attack]
    return [_DRAWING] if task.method == "none" else [f"erase with {task.method}", _DRAWING]


def pace_of(bench: Bench, jobs: int) -> float:
    """Seconds that one of the testbed's pictures takes here, eight at once, while ``jobs`` draw side by side: cores that are
    all busy are slower than one alone."""
    model, sampler = bench.studio.model, bench.plan.sampler

    def draw(_: int) -> float:
        began = time.perf_counter()
        model.generate(["a house"] * 8, list(range(8)), steps=sampler.steps, cfg=sampler.cfg, bf16=bench.studio.bf16)
        return (time.perf_counter() - began) / 8

    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // jobs))
    try:
        with ThreadPoolExecutor(jobs) as pool:  # PyTorch lets go of the interpreter while it computes
            return min(statistics.median(pool.map(draw, range(jobs))) for _ in range(2))
    finally:
        torch.set_num_threads(threads)


def clock(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"
