"""Every method under every attack, in one table: what is still drawn, what is kept, what it cost.

The work is a list of tasks (engines.py); what they should take (costs.py) is said before they start.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ...attacks import all_attacks
from ...methods import all_methods
from ...metrics.judge_error import Corrected
from ...metrics.rates import Rate, pooled
from ..splits import TUNING
from .costs import UNKNOWN, Costs, clock, pace_of
from .engines import Task, cluster, processes
from .leaderboard_page import KEPT, PAGE, QUICK_PAGE, table, write_page
from .measures import DISTANCES, mean_of
from .rows import (
    Bench,
    discard,
    errors_by_kind,
    is_outdated,
    judge_error,
    kept_pictures,
    least_pace,
    timed,
)
from .settings import settings_for
from .siege import ASKING, applies, is_another_training

CONCEPTS = ("cat", "rose", "cigarette", "beer", "brindlewash", "neon")
"""Four objects and two styles."""
QUICK_CONCEPTS = ("rose", "neon")
QUICK_ATTACKS = ("rece_residual", "free_embedding", "synonyms")
"""The cheapest strong ones: in closed form, by gradient, by other words."""
QUICK_METHODS = ("esd", "leco", "rece", "speed", "uce")
"""Three in closed form and two that train soon; what else was measured stands beside them."""


@dataclasses.dataclass(frozen=True)
class Contest:
    """What is compared."""

    chosen: Mapping[str, Mapping[str, Any]]
    """Methods with their settings."""
    attacks: Sequence[str]
    budgets: Mapping[str, Mapping[str, Any]]
    """Settings of attacks that differ from the testbed's."""
    page: str = PAGE
    """Name of the page under docs/results."""

    def tasks(self, bench: Bench) -> list[Task]:
        """Erasures first, then the attacks on them, attack by attack, so that a run that is stopped has whole columns."""
        wanted = list(enumerate(bench.plan.erasings()))
        methods = {"none": {}, **self.chosen}
        first = [Task(n, m, s) for m, s in methods.items() for n, e in wanted if e.key != "together"]
        return first + [
            Task(n, m, s, a, self.budgets.get(a, {}))
            for a in (ASKING, *self.attacks)
            for m, s in methods.items()
            for n, e in wanted
            if applies(a, e)
        ]


def leaderboard(
    bench: Bench,
    contest: Contest,
    *,
    jobs: int,
    ray: str = "",
    fresh: bool = False,
    plan: bool = False,
    report: bool = False,
) -> None:
    """Measure what isn't known yet and write the page; on the tuning split only print the table.

    Args:
        jobs: processes of this machine.
        ray: the address of a Ray cluster to use instead, or "local".
        plan: only say what it will cost.
        report: only write the page, from what is measured.

    Raises:
        SystemExit: there is nothing to write a page of.
    """
    if not report:
        measure_missing(bench, contest.tasks(bench), jobs=jobs, ray=ray, fresh=fresh, plan=plan)
    if plan:
        return
    tuning = bench.plan.split is TUNING
    if contest.page in (PAGE, QUICK_PAGE) and not tuning:  # methods that were measured before stand beside these
        others = {m: settings_for(m) for m in all_methods()}
        contest = dataclasses.replace(contest, chosen=others | dict(contest.chosen))
    found = standings(bench, contest)
    if not found:
        wanted = ", ".join(e.key for e in bench.plan.erasings() if e.key != "together")
        raise SystemExit(
            f"no method was measured on all of {wanted} yet, so there is no page. --only takes fewer of them"
        )
    if tuning:
        print(table(found, [ASKING, *contest.attacks]))
    else:
        write_page(bench, contest, found)


def measure_missing(bench: Bench, tasks: Sequence[Task], *, jobs: int, ray: str, fresh: bool, plan: bool) -> None:
    """Say what the missing results will cost, and measure them."""
    todo = unfinished(bench, tasks, fresh)
    pace = pace_of(bench, 1 if ray else jobs)
    bench.plan = dataclasses.replace(bench.plan, pace=round(pace, 4))
    costs = Costs(bench, pace)
    total = sum(map(costs.of, todo))
    side = "a cluster" if ray else f"{jobs} processes"
    print(
        f"{len(tasks)} tasks, {len(tasks) - len(todo)} of them done; the others should take {clock(total)} of one core, "
        f"{clock(total / max(1, jobs))} with {side}"
    )
    if unknown := costs.unknown(todo):
        print(f"not timed before, counted as {UNKNOWN:.0f} s each: {', '.join(unknown)}")
    if plan:
        return
    for path in {path for task in todo for path in task.all_it_writes(bench)} if fresh else ():
        discard(path)
    # Attacks need erasures, and what the unchanged model shows under attack says which attacks are pointless. The bar counts
    # seconds of one core, and learns what they take here.
    began = time.monotonic()
    with tqdm(total=round(total), unit="s", smoothing=0.05, disable=not todo) as bar:
        stages: list[Callable[[Task], bool]] = [
            lambda t: not t.attack or t.method == "none",
            lambda t: bool(t.attack) and t.method != "none" and not pointless(bench, t),
        ]
        for belongs in stages:
            for task in _run(bench, [t for t in todo if belongs(t)], jobs, ray):
                bar.set_description(
                    f"{task.attack or f'erase with {task.method}'}: {bench.plan.erasings()[task.number].label}"
                )
                bar.update(round(costs.of(task)))
    if todo:
        print(f"{len(todo)} tasks in {clock(time.monotonic() - began)}")


def pointless(bench: Bench, task: Task) -> bool:
    """Whether this attack finds nothing on the unchanged model either, so that nothing would follow from what it does to an
    erased one."""
    if not task.attack or task.method == "none":
        return False
    base = dataclasses.replace(task, method="none", settings={})
    return base.done(bench) and not Rate.from_json(json.loads(base.results(bench)[0].read_text(encoding="utf-8"))).hits


def unfinished(bench: Bench, tasks: Sequence[Task], fresh: bool = False) -> list[Task]:
    """What is left to do, results of earlier versions of a method or an attack included; an erasure that is known by its
    figures alone is made again where an attack still needs it."""
    left = [fresh or not (t.done(bench) or pointless(bench, t)) for t in tasks]
    needed = {
        (t.number, t.method)
        for t, missing in zip(tasks, left, strict=True)
        if missing and t.attack and not all(path.exists() for path in t.needs(bench))
    }
    return [
        t
        for t, missing in zip(tasks, left, strict=True)
        if missing or (not t.attack and (t.number, t.method) in needed)
    ]


def _run(bench: Bench, tasks: Sequence[Task], jobs: int, ray: str) -> Iterator[Task]:
    if not tasks:
        return iter(())
    return cluster(bench, tasks, ray) if ray else processes(bench, tasks, jobs)


@dataclasses.dataclass(frozen=True)
class Standing:
    """One method in the table."""

    method: str
    seconds: float | None
    """Of one core of the fastest machine among those of the page."""
    alone: bool
    """Nothing else ran beside; otherwise ``seconds`` are an upper bound."""
    kept_objects: Corrected
    kept_styles: Corrected
    distances: Mapping[str, float | None]
    """Of kept pictures from the unchanged model's: :data:`~.rows.DISTANCES`."""
    attacks: Mapping[str, Rate]
    """Pictures that show the concept: as the judge sees them."""
    true: Mapping[str, Corrected]
    """The same after the judge's error."""
    each: Mapping[str, Mapping[str, Rate]]
    """Of every attack, by what was erased."""
    true_each: Mapping[str, Mapping[str, Corrected]]
    """The same after the judge's error in that concept."""
    outdated: frozenset[str] = frozenset()
    """Attacks with results of an earlier version of themselves or of the method, and :data:`KEPT` likewise."""
    elsewhere: frozenset[str] = frozenset()
    """Attacks with results of another training than ``seconds`` and what is kept are of."""

    @property
    def ranked(self) -> Mapping[str, Rate]:
        """What methods are compared by: of an attack that begins with a picture of the concept, nothing follows."""
        return {name: r for name, r in self.attacks.items() if name == ASKING or not all_attacks()[name].given}

    @property
    def worst(self) -> str:
        """The attack that brings most back; asking counts too."""
        return max(self.ranked, key=lambda a: self.ranked[a].share)

    @property
    def rank(self) -> tuple[float, float]:
        """What methods are ordered by: the worst attack, then the mean of all; low is good."""
        shares = [r.share for r in self.ranked.values()]
        return max(shares), sum(shares) / len(shares)


def standings(bench: Bench, contest: Contest) -> list[Standing]:
    """What is measured, :func:`in_order`. An attack counts where it was run on every concept that it finds on the unchanged
    model, a method where asking was."""
    out = []
    singles = [e for e in bench.plan.erasings() if e.key != "together"]
    error, kept = judge_error(bench, singles), kept_pictures(bench)
    of_kind, of_one = errors_by_kind(bench), {e.label: judge_error(bench, [e]) for e in singles}
    methods = {"none": {}, **contest.chosen}
    made = {m: [row for e in singles if (row := bench.row(e, m, s)) is not None] for m, s in methods.items()}
    pace = least_pace(row for rows in made.values() for row in rows)
    for method, settings in methods.items():
        rows = made[method]
        each: dict[str, dict[str, Rate]] = {}
        old, other = {KEPT} if any(map(is_outdated, rows)) else set(), set()
        for name in (ASKING, *contest.attacks):
            changed = contest.budgets.get(name, {})
            told = [
                (e, Task(bench.plan.erasings().index(e), method, settings, name, changed))
                for e in singles
                if applies(name, e)
            ]
            paths = {e.label: task.results(bench)[0] for e, task in told if not pointless(bench, task)}
            if paths and all(path.exists() for path in paths.values()):
                cells = {k: json.loads(p.read_text(encoding="utf-8")) for k, p in paths.items()}
                each[name] = {k: Rate.from_json(cell) for k, cell in cells.items()}
                old |= {name} if any(map(is_outdated, cells.values())) else set()
                if any(is_another_training(row, cells[row["erased"]]) for row in rows if row["erased"] in cells):
                    other.add(name)
        seen = {name: pooled(rates.values()) for name, rates in each.items()}
        if ASKING not in seen or len(rows) < len(singles):
            continue
        alone, seconds = timed(rows, pace)
        out.append(
            Standing(
                method,
                seconds,
                alone,
                of_kind["object"].behind(_once([Rate.from_json(r["kept_objects"]) for r in rows], kept)),
                of_kind["style"].behind(_once([Rate.from_json(r["kept_styles"]) for r in rows], kept)),
                {what: mean_of(rows, what) for what in DISTANCES},
                seen,
                {name: error.behind(r) for name, r in seen.items()},
                each,
                {name: {k: of_one[k].behind(r) for k, r in rates.items()} for name, rates in each.items()},
                frozenset(old),
                frozenset(other),
            )
        )
    return in_order(out, contest.attacks)


def in_order(found: Sequence[Standing], attacks: Sequence[str]) -> list[Standing]:
    """The unchanged model, then methods by rank: those that met all ``attacks`` before those that were spared one."""
    return sorted(found, key=lambda s: (s.method != "none", not set(attacks) <= set(s.attacks), s.rank))


def _once(rates: Sequence[Rate], pictures: int) -> Rate:
    """The share over several erasures, which their common pictures tell no more surely than one erasure's would."""
    whole = pooled(rates)
    n = min(pictures, whole.n)
    return Rate(round(n * whole.share), n) if n else whole
