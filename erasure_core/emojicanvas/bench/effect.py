"""What erasing changes about the pictures, in figures: one row for each method and erased concept."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from tqdm import tqdm

from ...methods import all_methods
from ...metrics.judge_error import Corrected, JudgeError, true_share
from ...metrics.rates import Rate, pooled
from ...metrics.scores import Unlearning, combined_interval, mace_harmonic
from ..splits import erasings
from . import perceptual
from .engines import Task, processes
from .measures import DISTANCES, MEASURES, distances_of, mean_of, told
from .rows import (
    RESULTS,
    Bench,
    Keep,
    arithmetic,
    discard,
    errors_by_kind,
    is_measured,
    is_outdated,
    outdated_methods,
    timed,
)
from .settings import settings_for


def run(bench: Bench, chosen: Mapping[str, Mapping[str, Any]], fresh: bool = False, jobs: int = 1) -> list[dict]:
    """The base's row and each method's for everything that the split erases, measured where not yet known."""
    todo: list[Task] = []
    wanted, shots = [], []
    for number, erasing in enumerate(bench.plan.erasings()):
        shots += [s for g in bench.asked(erasing).groups().values() for s in g]
        for method, settings in {"none": {}, **chosen}.items():
            wanted.append((erasing, method, settings))
            if fresh:
                bench.erasure_path(erasing, method, settings).unlink(missing_ok=True)
                discard(bench.row_path(erasing, method, settings))
            if fresh or not is_measured(bench.row_path(erasing, method, settings)):
                todo.append(Task(number, method, settings))
    missing = len(bench.studio.missing(shots))
    with tqdm(total=missing, unit="picture", desc="the base's pictures", disable=not missing) as bar:
        bench.studio.draw(shots, None, bar)
    with tqdm(total=len(todo), unit="row", smoothing=0.1, disable=not todo) as bar:
        for done in processes(bench, todo, jobs):
            bar.set_description(f"{done.method}: {bench.plan.erasings()[done.number].label}")
            bar.update()
    rows = [bench.row(*row) for row in wanted]
    return [row for row in rows if row is not None]


def summary(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of one kind and method as one: counts are added up, the rest averaged, seconds over rows that were made alone on the
    machine, if any were."""
    out = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        for method in dict.fromkeys(r["method"] for r in rows if r["kind"] == kind):
            same = [r for r in rows if r["kind"] == kind and r["method"] == method]
            alone, seconds = timed(same)
            row: dict[str, Any] = {
                "erased": f"{kind} ({len(same)})" if len(same) > 1 else same[0]["erased"],
                "kind": kind,
                "method": method,
            }
            row["settings"] = same[0]["settings"]
            row["method_version"] = min(r.get("method_version", 1) for r in same)
            row["seconds"], row["busy"] = None if seconds is None else round(seconds, 2), not alone
            row |= {what: mean_of(same, what) for what in DISTANCES}
            out.append(row | {m: pooled(Rate.from_json(r[m]) for r in same).to_json() for m in MEASURES})
    return out


def true_shares(row: Mapping, errors: Mapping[str, JudgeError]) -> dict[str, Corrected]:
    """A row's :data:`MEASURES` after the judge's error in what each looks for: "object" or "style"."""
    erased, other = ("style", "object") if row["kind"] == "style" else ("object", "style")
    looked_for = {"neighbours": "object", "kept_objects": "object", "kept_styles": "style", "beside": other}
    return {m: errors[looked_for.get(m, erased)].behind(Rate.from_json(row[m])) for m in MEASURES}


def table(rows: Sequence[Mapping], errors: Mapping[str, JudgeError]) -> str:
    """A Markdown table; the base's row ("none") stands before those of the methods."""
    moved = distances_of(rows)
    head = ["erased", "method", *MEASURES.values(), *moved.values(), "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [
            r["erased"],
            r["method"] + " *" * is_outdated(r),
            *map(str, true_shares(r, errors).values()),
            *(told(r.get(what)) for what in moved),
        ]
        cells.append("-" if r["seconds"] is None else f"{'at most ' if r.get('busy') else ''}{figure(r['seconds'])}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(seconds: float) -> str:
    """Three significant digits, never an exponent: 1029 is 1030."""
    return f"{float(f'{seconds:.3g}'):.9f}".rstrip("0").rstrip(".")


def singles(rows: Sequence[Mapping]) -> list[Mapping]:
    """Without what was erased several at once: that is one erasure, so the summary has all of it."""
    return [r for r in rows if r["kind"] in ("object", "style")]


def in_terms_of_papers(rows: Sequence[Mapping], errors: Mapping[str, JudgeError]) -> str:
    """UA / IRA / CRA and their mean, and MACE's harmonic mean, of :func:`summary`'s rows."""
    head = ["erased", "method", "UA", "IRA", "CRA", "mean", "H"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        own, other = ("kept_styles", "kept_objects") if row["kind"] == "style" else ("kept_objects", "kept_styles")
        true = true_shares(row, errors)
        scores = Unlearning(true["direct"].complement, true[own], true[other])
        cells = [row["erased"], row["method"], *map(str, (scores.ua, scores.ira, scores.cra))]
        lines.append("| " + " | ".join([*cells, f"{100 * scores.average:.0f} %", _harmonic(row, own, errors)]) + " |")
    return "\n".join(lines)


def _harmonic(row: Mapping, own: str, errors: Mapping[str, JudgeError]) -> str:
    """MACE's H with an interval in which the judge's error counts too; a dash where there are no synonyms."""
    seen = [Rate.from_json(row[m]) for m in ("direct", own, "unseen")]
    if not seen[-1].n:
        return "-"
    error = errors["style" if row["kind"] == "style" else "object"]

    def mean(direct: Rate, kept: Rate, unseen: Rate, hits: Rate, alarms: Rate) -> float:
        return mace_harmonic(*(true_share(seen, hits, alarms) for seen in (direct, kept, unseen)))

    counts = [*seen, error.hits, error.alarms]
    low, high = combined_interval(mean, counts)
    return f"{100 * mean(*counts):.0f} % [{100 * low:.0f}, {100 * high:.0f}]"


_PAGES = {
    Keep.NAMED: (
        "effect",
        "Effect of erasing on EmojiCanvas",
        "All of these were named in *keep*, which is the best case; see also [everyday words](effect_keep_everyday.md) and "
        "[nothing](effect_keep_nothing.md).",
    ),
    Keep.EVERYDAY: (
        "effect_keep_everyday",
        "Effect of erasing when everyday words are kept",
        "None of these was named in *keep*; everyday words were held, as Erase Concept does by default. Of the objects here "
        "their list names all but the bomb and the cigarette, of the styles none as captions do.",
    ),
    Keep.NOTHING: (
        "effect_keep_nothing",
        "Effect of erasing when nothing is kept",
        "None of these was named in *keep*, which was left empty, and everyday words were not held either.",
    ),
}
"""Name and title of the page, and what erasers were told to keep."""


def page_of(keep: Keep) -> str:
    """The name of the page under docs/results."""
    return _PAGES[keep][0]


def effect(bench: Bench, chosen: Mapping[str, Mapping[str, Any]], fresh: bool, jobs: int) -> None:
    """Measure ``chosen`` methods on the scoring split and write the tables, with all other methods' default rows."""
    run(bench, chosen, fresh, jobs)
    known = {"none": {}, **{m: settings_for(m) for m in all_methods()}, **chosen}
    # With what was measured before.
    paths = [bench.row_path(e, m, s) for e in erasings(bench.plan.split) for m, s in known.items()]
    rows = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]
    s, judge = bench.plan.sampler, bench.studio.judge
    page, title, kept = _PAGES[bench.plan.keep]
    option = "" if bench.plan.keep is Keep.NAMED else f" --keep {bench.plan.keep}"
    errors = errors_by_kind(bench)
    old = ", ".join(outdated_methods(rows))
    outdated = f"\n\n\\*: with results of an earlier version of the method: {old}." if old else ""
    text = f"""# {title}

Made by `nox -s bench -- effect --seeds {bench.plan.seeds} --rounds {bench.plan.rounds}{option}` with a
model trained for {bench.studio.model.steps_trained} steps, {s.steps} Euler steps, guidance {s.cfg:g}, {judge.name} \
{judge.version}, on scoring prompts and seeds only. {arithmetic(rows)}

Shares of pictures after the judge's error, with 95 % intervals that count it too. It recognises {errors["object"].hits} of the
objects and {errors["style"].hits} of the styles in drawings that it never saw, and sees an object that isn't there in
{errors["object"].alarms} of pictures, a style in {errors["style"].alarms}.

- **Direct, named, unseen**: pictures for the erased name, for aliases that the eraser was told, and for synonyms that
  it was not told, that still show the concept. Lower is better.
- **Neighbours, kept objects, kept styles**: pictures of look-alikes, and of all other objects in all styles, that show
  what they should. Best as high as "none", the unchanged model. {kept}
  Kept pictures are the same for every erasure: in the summary their intervals are narrower than so few pictures allow.
- **Rest of the picture**: for the erased prompts, the style where an object was erased, the object where a style was.
- **Kept distance**: {perceptual.NAME} of kept pictures with and without the erasure, at the same noise.
- **Kernel distance**: how far they moved as a set: unbiased squared MMD of the pooled last features of EfficientNet-Lite0 (the
  form of KID, which takes another network). A small set: compare rows, not papers.
- **(n)** behind a kind says over how many erased concepts a method was measured.
- **Seconds**: of one CPU core, to compute the erasure, encoding the text included; "at most" where other work ran beside it.
  The summary's are of what was computed alone, where anything was. Memory: [peak](peak.md).

A style has no synonyms here; its alias is the bare word ("a neon cat"), which captions never used.

## Summary

{table(summary(rows), errors)}{outdated}

## In the terms of papers

UA: the erased thing doesn't appear. IRA: kept things of its kind do (objects beside an object, styles beside a style). CRA:
kept things of the other kind do. Their mean, as HiRM's tables have it, and MACE's harmonic mean H of efficacy (direct),
specificity (kept of its kind) and generality (unseen words).

{in_terms_of_papers(summary(rows), errors)}

## Each erasure

{table(singles(rows), errors)}
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{page}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{page}.json").write_text(
        json.dumps({"sampler": dataclasses.asdict(s), **bench.record(paths)}, indent=1), encoding="utf-8"
    )
    print(table(summary(rows), errors))


def tune(bench: Bench, chosen: Mapping[str, Mapping[str, Any]], fresh: bool, jobs: int) -> None:
    """One line a method (and one for the base), pooled over everything that the tuning split erases."""
    rows = [r | {"kind": "all"} for r in run(bench, chosen, fresh, jobs)]
    for r in summary(rows):
        shares = " ".join(f"{m}={100 * Rate.from_json(r[m]).share:.0f}%" for m in MEASURES)
        usual = settings_for(r["method"]) if r["method"] != "none" else {}
        changed = {k: v for k, v in r["settings"].items() if v != usual[k]}
        print(f"{r['method']:>6} {shares} distance={r['kept_distance']:.3f} n={r['direct']['n']} {changed or ''}")
