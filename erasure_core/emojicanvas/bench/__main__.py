"""What EmojiCanvas draws, and what erasing changes about it, in figures.

    python -m erasure_core.emojicanvas.bench base         # is the model good? docs/results/base.{json,png}
    python -m erasure_core.emojicanvas.bench effect --method uce rece   # docs/results/effect.{json,md}
    python -m erasure_core.emojicanvas.bench leaderboard                  # methods under attack: docs/results/leaderboard.*
    python -m erasure_core.emojicanvas.bench combine      # several erasures on one model: docs/results/combine.{json,md}
    python -m erasure_core.emojicanvas.bench mining       # does a search bring it back? docs/results/mining.{json,md}
    python -m erasure_core.emojicanvas.bench never_learned   # the control of searches: docs/results/never_learned.{json,md,png}
    python -m erasure_core.emojicanvas.bench memory       # safe prompt memories: docs/results/memory.{json,md}
    python -m erasure_core.emojicanvas.bench pairs        # SDEdit pairs, judged both ways: docs/results/pairs.{json,md,png}
    python -m erasure_core.emojicanvas.bench passes       # training steps beside their passes: docs/results/passes.{json,md}
    python -m erasure_core.emojicanvas.bench peak         # memory that erasing takes: docs/results/peak.{json,md}
    python -m erasure_core.emojicanvas.bench tune --method uce --set ridge=0.01     # one line, on the tuning split
    python -m erasure_core.emojicanvas.bench tune --method uce --attack free_embedding --budget free_embedding.steps=50

``effect`` and ``tune`` take every registered method. Pictures of the unchanged model are drawn once and kept in the
cache, and so is each finished row: stop and start again as you like. What the pages in docs/results were made from lies beside
them and counts as measured, so one new method joins the others without measuring those again. ``--fresh`` measures rows again
after a method's code has changed. ``--jobs 2`` uses two cores well; one process on two cores is hardly faster than on one.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ...attacks import all_attacks
from ...methods import all_methods
from ...metrics.rates import Rate, pooled, rate
from ..concepts import OBJECTS, STYLES, prompt
from ..judge import Judge
from ..splits import SCORING, STYLE_OBJECTS, TUNING, Shot, erasings
from ..studio import Sampler, Studio, grid, to_bytes
from ..weights import BUNDLE, JUDGE
from .combine import METHODS as COMBINED
from .combine import combine
from .effect import effect, page_of, tune
from .leaderboard import CONCEPTS, QUICK_ATTACKS, QUICK_CONCEPTS, QUICK_METHODS, Contest, leaderboard
from .leaderboard_page import PAGE, QUICK_PAGE
from .measures import flags
from .memory_effect import memory_effect
from .mining_effect import METHODS, mining_effect
from .never_learned import METHODS as STRANGE
from .never_learned import never_learned
from .pair_page import pairs_page
from .pair_quality import EACH
from .passes_page import passes_page
from .peak_page import peak_page
from .rows import RESULTS, Bench, Keep, Plan
from .settings import parse_budgets, parse_settings, settings_for
from .siege import OF_OBJECTS, PICTURES

CACHE = Path(".cache/emojicanvas/bench")


def base(studio: Studio, seeds: int) -> None:
    """How well the unchanged model draws what it is asked for: every object, every style, every synonym."""
    numbers = SCORING.seeds(seeds)
    plain = {o.name: [Shot(prompt(o.name), s, o.name) for s in numbers] for o in OBJECTS}
    styled = {
        s.name: [
            Shot(prompt(o, s.name), seed, o, s.name) for seed in numbers[: max(1, seeds // 4)] for o in STYLE_OBJECTS
        ]
        for s in STYLES
    }
    words = {
        kind: {
            w: [Shot(prompt(w), s, o.name) for s in numbers[: max(1, seeds // 2)]]
            for o in OBJECTS
            for w in getattr(o, kind)
        }
        for kind in ("named", "unseen")
    }
    every = [s for part in (plain, styled, *words.values()) for shots in part.values() for s in shots]
    print(f"{len(studio.missing(every))} of {len(every)} pictures to draw", flush=True)
    with tqdm(total=len(studio.missing(every)), unit="picture") as bar:
        studio.draw(every, None, bar)

        def rates(part: Mapping[str, list[Shot]], style: bool = False) -> dict[str, Rate]:
            asked = {k: [s.style if style else s.object for s in v] for k, v in part.items()}
            return {k: rate(flags(studio.judge.judge(studio.draw(v, None, bar)), asked[k])) for k, v in part.items()}

        found = {
            "objects": rates(plain),
            "styles": rates(styled, style=True),
            "objects_in_styles": rates(styled),
            "named_words": rates(words["named"]),
            "unseen_words": rates(words["unseen"]),
        }
        rows = [[v[k] for v in plain.values()][i : i + 12] for k in (0, -1) for i in (0, 12)]
        rows += [v[:12] for k, v in styled.items() if k != "plain"] + [
            list(s[0] for s in words["unseen"].values())[::2][:12]
        ]
        sheet = grid(to_bytes(torch.cat([studio.draw(r, None, bar) for r in rows])), rows=len(rows))
    totals = {k: pooled(v.values()) for k, v in found.items()}
    report = {
        "model": {"steps_trained": studio.model.steps_trained, "sampler": dataclasses.asdict(studio.sampler)},
        "judge": {"name": studio.judge.name, "version": studio.judge.version, "threshold": studio.judge.threshold},
        "totals": {k: v.to_json() for k, v in totals.items()},
        **{k: {name: r.to_json() for name, r in v.items()} for k, v in found.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "base.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    sheet.save(RESULTS / "base.png")
    for k, v in totals.items():
        weakest = sorted(found[k].items(), key=lambda kv: kv[1].share)[:6]
        print(f"{k}: {v}; weakest: " + ", ".join(f"{name} {100 * r.share:.0f} %" for name, r in weakest))


Chosen = Mapping[str, Mapping[str, Any]]
"""Methods with their settings."""
PAGES: dict[str, Callable[[Bench, argparse.Namespace, Chosen], object]] = {
    "combine": lambda bench, a, chosen: combine(bench, chosen),
    "effect": lambda bench, a, chosen: effect(bench, chosen, a.fresh, a.jobs),
    "memory": lambda bench, a, chosen: memory_effect(bench),
    "mining": lambda bench, a, chosen: mining_effect(bench, chosen),
    "never_learned": lambda bench, a, chosen: never_learned(bench, chosen),
    "pairs": lambda bench, a, chosen: pairs_page(bench, a.seeds or EACH),
    "passes": lambda bench, a, chosen: passes_page(bench, list(chosen)),
    "peak": lambda bench, a, chosen: peak_page(bench, list(chosen)),
    "tune": lambda bench, a, chosen: tune(bench, chosen, a.fresh, a.jobs),
}
"""What there is beside ``base`` and ``leaderboard``."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=sorted(("base", "leaderboard", *PAGES)))
    parser.add_argument(
        "--method",
        nargs="+",
        choices=list(all_methods()),
        help=f"default: all; mining: {' '.join(METHODS)}; combine: {' '.join(COMBINED)}; "
        f"never_learned: {' '.join(STRANGE)}; see --quick",
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="a setting, or METHOD.NAME=VALUE"
    )
    parser.add_argument("--attack", nargs="+", choices=list(all_attacks()), help="leaderboard (default: all), tune")
    parser.add_argument(
        "--budget", nargs="+", action="extend", default=[], metavar="ATTACK.SETTING=VALUE", help="of an attack"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help=f"leaderboard: two concepts, the three cheapest attacks, {' '.join(QUICK_METHODS)}; a page of its own",
    )
    parser.add_argument(
        "--pictures",
        type=int,
        default=0,
        help=f"leaderboard, tune: of each cell ({PICTURES}; {OF_OBJECTS} of synonyms)",
    )
    parser.add_argument("--page", help="leaderboard: name of its page under docs/results")
    parser.add_argument("--plan", action="store_true", help="leaderboard: only say what it will cost")
    parser.add_argument("--report", action="store_true", help="leaderboard: only write the page of what is measured")
    parser.add_argument(
        "--ray", default="", metavar="ADDRESS", help='leaderboard: on a Ray cluster; "local" starts one'
    )
    parser.add_argument("--only", nargs="+", default=[], help="some of what is erased: cat, neon, together, ...")
    parser.add_argument("--seeds", type=int, help="pictures a word (base 8, effect 10, tune 6), or pairs a scene (4)")
    parser.add_argument("--rounds", type=int, help="pictures a kept object (effect 2, tune 1)")
    parser.add_argument("--replace-with", default="", help="what erased things become; nothing by default")
    parser.add_argument(
        "--keep",
        type=Keep,
        choices=list(Keep),
        default=Keep.NAMED,
        help="effect: what erasers are told to keep; a page for each",
    )
    parser.add_argument("--steps", type=int, default=Sampler.steps)
    parser.add_argument("--cfg", type=float, default=Sampler.cfg)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--jobs", type=int, default=1, help="processes that measure rows side by side, and share threads"
    )
    parser.add_argument("--model", type=Path, default=BUNDLE)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are cached")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    judge = Judge.load(a.judge)
    # other weights, of the model or the judge, are another cache
    fingerprint = hashlib.sha256(
        a.model.read_bytes() + str(sum(p.double().sum() for p in judge.parameters())).encode()
    ).hexdigest()[:12]
    split, seeds, rounds = (TUNING, 6, 1) if a.what == "tune" else (SCORING, 10, 2)
    sampler = Sampler(a.steps, a.cfg)
    plan = Plan(
        a.model,
        a.judge,
        sampler,
        split,
        a.seeds or seeds,
        a.rounds or rounds,
        a.replace_with,
        CACHE / fingerprint,
        a.batch,
        tuple(a.only or (QUICK_CONCEPTS if a.quick else CONCEPTS if a.what == "leaderboard" else ())),
        keep=a.keep,
        pictures=a.pictures,
    )
    if unknown := set(a.only) - {e.key for e in erasings(split)}:
        parser.error(
            f"--only: {', '.join(unknown)}: the {split.name} split erases {', '.join(e.key for e in erasings(split))}"
        )
    if a.what == "base":
        base(plan.studio(), a.seeds or 8)
        return
    few = {
        "mining": METHODS,
        "combine": COMBINED,
        "never_learned": STRANGE,
        "leaderboard": QUICK_METHODS if a.quick else (),
    }.get(a.what)
    methods = a.method or few or list(all_methods())
    chosen = {m: settings_for(m, parse_settings(m, a.set)) for m in methods}
    bench = Bench(plan)
    page = a.page or (QUICK_PAGE if a.quick else PAGE)
    bench.recall({"leaderboard": page, "effect": page_of(plan.keep)}.get(a.what, a.what))
    if a.what == "leaderboard" or (a.what == "tune" and a.attack):
        attacks = a.attack or (QUICK_ATTACKS if a.quick else all_attacks())
        contest = Contest(chosen, list(attacks), parse_budgets(a.budget), page)
        leaderboard(bench, contest, jobs=a.jobs, ray=a.ray, fresh=a.fresh, plan=a.plan, report=a.report)
        return
    PAGES[a.what](bench, a, chosen)


if __name__ == "__main__":
    main()
