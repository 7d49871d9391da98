"""Where the cells of a leaderboard are measured: processes of this machine, or a Ray cluster.

A task says what to measure; the files that it makes come back as bytes, so machines need not share a disk. What is finished
is a file in the bench's folder, whoever measured it: stop and start again, on other machines if you like.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from ...attacks import all_attacks
from .rows import Bench, Plan, is_measured, write
from .siege import budget_of, cell_path, finds_path, measure_cell

Files = Mapping[str, bytes]
"""By name within the bench's folder."""


@dataclasses.dataclass(frozen=True)
class Task:
    """Erase and look at the effect (``attack`` empty), or attack what was erased."""

    number: int
    """Of what the plan erases."""
    method: str
    settings: Mapping[str, Any]
    attack: str = ""
    budget: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def results(self, bench: Bench) -> list[Path]:
        """The files that it makes; finished when the first is there."""
        erasing = bench.plan.erasings()[self.number]
        if self.attack:
            return [cell_path(bench, erasing, self.method, self.settings, self.attack, self.budget)]
        made = [bench.row_path(erasing, self.method, self.settings)]
        return made + ([] if self.method == "none" else self.needs(bench))

    def all_it_writes(self, bench: Bench) -> list[Path]:
        """Its results, and what they share with those of other tasks."""
        erasing = bench.plan.erasings()[self.number]
        made = self.results(bench)
        if self.attack in all_attacks():
            made.append(finds_path(bench, erasing, self.attack, budget_of(self.attack, erasing, self.budget)))
        return made

    def done(self, bench: Bench) -> bool:
        """Whether its result is there, by the method and the attack as they are now."""
        return is_measured(self.results(bench)[0])

    def needs(self, bench: Bench) -> list[Path]:
        """The files that an attack starts from: the erasure and its cost."""
        if self.method == "none":
            return []
        path = bench.erasure_path(bench.plan.erasings()[self.number], self.method, self.settings)
        return [path, path.with_suffix(".json")]

    def run(self, bench: Bench) -> None:
        erasing = bench.plan.erasings()[self.number]
        if self.attack:
            measure_cell(bench, erasing, self.method, self.settings, self.attack, self.budget)
        else:
            bench.measure_row(erasing, self.method, self.settings)


class Worker:
    """A bench in a process of its own, here or elsewhere."""

    def __init__(self, plan: Plan, threads: int) -> None:
        torch.set_num_threads(threads)
        torch.set_flush_denormal(True)
        self.bench = Bench(plan)

    @classmethod
    def remote(cls, plan: Plan, threads: int, files: Files) -> Worker:
        """On a machine that has neither the model nor the folder of ``plan``: both are brought along."""
        folder = Path(tempfile.mkdtemp(prefix="emojicanvas-"))
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return cls(dataclasses.replace(plan, model=folder / "model", judge=folder / "judge", folder=folder), threads)

    def do(self, task: Task, given: Files) -> dict[str, bytes]:
        """Do one task with the files that it needs; the files that it made."""
        folder = self.bench.plan.folder
        for name, content in given.items():
            if not (folder / name).exists():
                (folder / name).write_bytes(content)
        if not (task.done(self.bench) and all(path.exists() for path in task.results(self.bench))):
            task.run(self.bench)
        return {p.relative_to(folder).as_posix(): p.read_bytes() for p in task.results(self.bench) if p.exists()}


_worker: Worker | None = None


def _start(plan: Plan, threads: int) -> None:
    global _worker
    _worker = Worker(plan, threads)


def _do(task: Task) -> Task:
    assert _worker is not None
    _worker.do(task, {})
    return task


def processes(bench: Bench, tasks: Sequence[Task], jobs: int) -> Iterator[Task]:
    """Finished tasks as they come, from ``jobs`` processes that share this machine's folder and threads."""
    if jobs == 1:
        for task in tasks:
            task.run(bench)
            yield task
        return
    threads = max(1, torch.get_num_threads() // jobs)
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=_start, initargs=(bench.plan, threads)) as pool:
        try:
            for done in as_completed([pool.submit(_do, task) for task in tasks]):
                yield done.result()
        except BaseException:  # or hours of others would run before anybody saw the error
            pool.shutdown(cancel_futures=True)
            raise


def cluster(bench: Bench, tasks: Sequence[Task], address: str) -> Iterator[Task]:
    """The same on a Ray cluster ("local": one that is started here). Each of its CPUs is one worker.

    Raises:
        SystemExit: Ray isn't installed.
    """
    try:
        import ray
    except ImportError:
        raise SystemExit("--ray: Ray isn't installed. pip install 'ray' (the extra 'cluster')") from None
    package = Path(__file__).resolve().parents[2]
    ray.init(
        address=None if address == "local" else address,
        runtime_env={"py_modules": [str(package)]},
        log_to_driver=False,
    )
    try:
        plan, folder = bench.plan, bench.plan.folder
        brought = {"model": plan.model.read_bytes(), "judge": plan.judge.read_bytes()}
        if (drawn := folder / "base.safetensors").exists():
            brought["base.safetensors"] = drawn.read_bytes()
        actor = ray.remote(num_cpus=1)(_Actor)
        count = max(1, min(len(tasks), int(ray.cluster_resources().get("CPU", 1))))
        shared = ray.put(brought)
        pool = ray.util.ActorPool([actor.remote(plan, shared) for _ in range(count)])

        def send(one: Any, task: Task) -> Any:
            needed = task.needs(bench) if task.attack else []
            return one.do.remote(task, {p.relative_to(folder).as_posix(): p.read_bytes() for p in needed if p.exists()})

        for task, files in pool.map_unordered(send, list(tasks)):
            for name, content in files.items():
                write(folder / name, content)
            yield task
    finally:
        ray.shutdown()


class _Actor:
    """A Worker as Ray holds it."""

    def __init__(self, plan: Plan, files: Files) -> None:
        self.worker = Worker.remote(plan, 1, files)

    def do(self, task: Task, given: Files) -> tuple[Task, dict[str, bytes]]:
        return task, self.worker.do(task, given)
