"""The leaderboard as a page: a table, what it says in words, and two plots."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...metrics.judge_error import Corrected
from . import perceptual
from .leaderboard_words import aside, elsewhere, outdated, powerless, seconds_of, teaching, verdict
from .measures import distances_of, told
from .never_learned import control
from .rows import (
    RESULTS,
    Bench,
    arithmetic,
    kept_pictures,
    least_pace,
)
from .settings import ATTACKS, settings_for
from .siege import ASKING, OF_OBJECTS, PICTURES, titles

if TYPE_CHECKING:
    from .leaderboard import Contest, Standing

KEPT = "what is kept"
"""Beside the names of attacks: the pictures of what is kept."""
PAGE = "leaderboard"
"""The page of all methods; others have names of their own."""
QUICK_PAGE = "leaderboard_quick"
_SEEN = {
    "adversarial": "An earlier version of adversarial had been tried on the rose, before its noise window and relative losses "
    "were added; their values were chosen on a tulip.",
    "kpop": "Of two ways to draw the latents that kpop trains on, the one that did better on these prompts and seeds was kept.",
}
"""Where a method has met what it is scored on."""


def write_page(bench: Bench, contest: Contest, found: Sequence[Standing]) -> None:
    """docs/results/{page}.{md,json,png}."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    page, attacks = contest.page, contest.attacks
    columns = [ASKING, *attacks]
    plan = bench.plan
    only = [e.key for e in plan.erasings() if e.key != "together"]
    options = f" --only {' '.join(only)} --attack {' '.join(attacks)}"
    options += "" if page == PAGE else f" --page {page}"
    budgets = [f"{a}.{k}={v}" for a, settings in contest.budgets.items() for k, v in settings.items()]
    options += f" --budget {' '.join(budgets)}" if budgets else ""
    changed = [f"{m}.{k}={v}" for m, s in contest.chosen.items() for k, v in s.items() if v != settings_for(m).get(k)]
    options += f" --set {' '.join(changed)}" if changed else ""
    options += f" --pictures {plan.pictures}" if plan.pictures else ""
    pictures = str(plan.pictures or PICTURES)
    if "synonyms" in attacks and not plan.pictures:
        pictures += f" ({OF_OBJECTS} of synonyms, which styles have not)"
    judge = bench.studio.judge
    settings = "\n".join(f"- {titles([a])[a]}: {_budget(a, contest.budgets.get(a, {}))}" for a in attacks)
    record = bench.record(task.results(bench)[0] for task in contest.tasks(bench))
    measured = [row for rows in record["measured"].values() for row in rows.values()]
    pace = least_pace(record["measured"].get("rows", {}).values())
    seconds = (
        f" Seconds are to erase, of one core that draws a picture in {pace:.2f} s; those of other machines are scaled by that."
        if pace
        else ""
    )
    moved = f" How far they moved from the unchanged model's is told one by one ({perceptual.NAME})"
    if "kept_kernel_distance" in distances_of(s.distances for s in found):
        moved += " and as a set (squared MMD of its pooled features, the form of KID)"
    moved += "."
    taught = control(bench, {ASKING: {}, **{a: {**ATTACKS.get(a, {}), **contest.budgets.get(a, {})} for a in attacks}})
    text = f"""# {page.replace("_", " ").capitalize()}

Methods under attack on EmojiCanvas. Made by `nox -s bench -- leaderboard{options} --method \
{" ".join(s.method for s in found if s.method != "none")}`,
on prompts and seeds that no setting was chosen on; {", ".join(only)} erased one at a time; {pictures} pictures a cell and
concept, with noises that no attack has seen (but attacks on the tuning split are counted at the same ones). Where an attack
finds several things, it picks one by pictures at other noises.
{" ".join((arithmetic(measured), *(_SEEN[s.method] for s in found if s.method in _SEEN)))}

Shares of pictures that show the erased concept, or what is kept, after the error of the judge ({judge.name} \
{judge.version}: it recognises
{judge.held_out["object"]} of the objects and {judge.held_out["style"]} of the styles in drawings that it never saw), with 95 %
intervals that count the judge's error too. "none" is the unchanged model: the ceiling of every attack. Lower is
better, but for what is kept: {kept_pictures(bench)} pictures, the same for every erasure, which count once in
the intervals.{moved}{seconds}

{table(found, columns, taught)}

![Shares under each attack, and what is kept]({page}.png)

{verdict(found, columns)}{teaching(taught)}{powerless(found)}{aside(columns)}{outdated(measured)}{elsewhere(found)}

## What was erased, one by one

Each method's worst attack, after the judge's error in that concept. Intervals, here and above, are of pictures and judge: how
much one training or search differs from the next comes on top, and how much one concept differs from another is seen here.

{by_concept(found)}

## How hard the attacks tried

{settings}

What each attack has and does: [attacks](../attacks.md). A cell that stays low says that this search, at this budget, found
nothing; "-": not run on every concept.
"""
    (RESULTS / f"{page}.md").write_text(text, encoding="utf-8")
    rows = [
        {
            "method": s.method,
            "seconds": s.seconds,
            "kept_objects": _numbers(s.kept_objects),
            "kept_styles": _numbers(s.kept_styles),
            **s.distances,
            "attacks": {a: r.to_json() for a, r in s.attacks.items()},
            "after_judge_error": {a: _numbers(c) for a, c in s.true.items()},
            "worst": s.worst,
        }
        for s in found
    ]
    (RESULTS / f"{page}.json").write_text(
        json.dumps({"rows": rows, **record}, indent=1),
        encoding="utf-8",
    )
    draw(found, columns, RESULTS / f"{page}.png")
    print(table(found, columns))
    print(verdict(found, columns))


def _budget(attack: str, further: Mapping[str, Any]) -> str:
    changed = ", ".join(f"{k} {v}" for k, v in {**ATTACKS.get(attack, {}), **further}.items())
    return changed or "its default settings"


def table(found: Sequence[Standing], columns: Sequence[str], taught: Mapping[str, Corrected] | None = None) -> str:
    """Methods by their worst attack, and what attacks draw that was never learned, as far as it is known."""
    moved = distances_of(s.distances for s in found)
    kinds = ["kept objects", "kept styles", *moved.values()]
    head = ["method", *kinds, "seconds", *titles(list(columns)).values(), "worst"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for s in found:
        seconds = "-" if s.seconds is None else seconds_of(s)
        marks = {a: " *" * (a in s.outdated) + " †" * (a in s.elsewhere) for a in columns}
        cells = [_cell(s.true[a]) + marks[a] if a in s.true else "-" for a in columns]
        kept = [str(share) for share in (s.kept_objects, s.kept_styles)] + [told(s.distances[what]) for what in moved]
        kept = [cell + " *" * (KEPT in s.outdated) for cell in kept]
        lines.append("| " + " | ".join([s.method, *kept, seconds, *cells, titles([s.worst])[s.worst]]) + " |")
    if taught:
        cells = [_cell(taught[a]) if a in taught else "-" for a in columns]
        lines.append("| " + " | ".join(["*never learned*", *["-"] * (3 + len(moved)), *cells, "-"]) + " |")
    return "\n".join(lines)


def by_concept(found: Sequence[Standing]) -> str:
    """Each method's worst attack on each concept."""
    labels = list(dict.fromkeys(label for s in found for label in s.true_each[s.worst]))
    lines = [f"| method | worst attack | {' | '.join(labels)} |", "|" + "---|" * (2 + len(labels))]
    for s in found:
        shares = s.true_each[s.worst]
        cells = [str(shares[label]) if label in shares else "-" for label in labels]
        lines.append(f"| {s.method} | {titles([s.worst])[s.worst]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _numbers(share: Corrected) -> list[float]:
    return [round(x, 4) for x in (share.share, share.low, share.high)]


def _cell(share: Corrected) -> str:
    return f"{100 * share.share:.0f} [{100 * share.low:.0f}, {100 * share.high:.0f}]"


def draw(found: Sequence[Standing], columns: Sequence[str], path: Path) -> None:
    """A heat map of the shares, and the worst attack over what is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from adjustText import adjust_text
    from matplotlib import pyplot as plt

    names = [s.method for s in found]
    figure, (left, right) = plt.subplots(
        1,
        2,
        figsize=(max(9, 6 + 0.7 * len(columns)), max(4, 1.6 + 0.42 * len(found))),
        width_ratios=(1.2, 1),
        layout="constrained",
    )
    shares = [[100 * s.true[a].share if a in s.true else float("nan") for a in columns] for s in found]
    left.imshow(shares, vmin=0, vmax=100, cmap="magma_r", aspect="auto")
    left.set_xticks(range(len(columns)), list(titles(list(columns)).values()), rotation=40, ha="right")
    left.set_yticks(range(len(names)), names)
    for i, row in enumerate(shares):
        for k, share in enumerate(row):
            if share == share:  # not NaN
                left.text(k, i, f"{share:.0f}", ha="center", va="center", color="white" if share > 55 else "black")
    left.set_title("% of pictures that show the concept")
    labels = []
    for s in found:
        x, y = 100 * s.rank[1], 100 * min(s.kept_objects.share, s.kept_styles.share)
        right.scatter(x, y, s=30, color="tab:red" if s.method == "none" else "tab:blue")
        labels.append(right.text(x, y, s.method, fontsize=8))
    right.set_xlabel("mean of asking and attacks, % of pictures")
    right.set_ylabel("kept objects or styles,\nthe lower, %")
    right.set_xlim(-5, 112)
    low, high = right.get_ylim()
    right.set_ylim(min(low, 85), max(high, 101))  # a point is no difference, and must not look like one
    right.grid(alpha=0.3)
    figure.canvas.draw()  # labels are moved in the final layout
    adjust_text(
        labels,
        ax=right,
        expand=(1.2, 2.4),
        force_text=(0.6, 1.2),
        iter_lim=2000,
        arrowprops={"arrowstyle": "-", "color": "grey", "lw": 0.5},
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)
