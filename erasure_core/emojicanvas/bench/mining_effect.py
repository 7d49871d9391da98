"""Does Mine Dark Embeddings bring back what was erased? With starts and noises that no training has seen."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ...attacks import Found, Way, asking, evaluate
from ...metrics.judge_error import JudgeError
from ...metrics.rates import Rate, pooled
from ...mining import Settings, mine
from ..model import EmojiCanvasPort
from ..splits import Erasing
from .red_team import canvas_target
from .rows import RESULTS, Bench, arithmetic, is_measured, judge_error, keep, method_version
from .settings import plain
from .siege import prompts_of

SETTINGS = Settings(seed=1234)
"""The node's defaults, with a seed that no method trains with."""
METHODS = ("uce", "esd", "dark_miner", "adversarial")
PICTURES = 16


def cell_path(bench: Bench, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> Path:
    plan = bench.plan
    key = [plan.split.name, erasing.label, method, settings, plain(SETTINGS), PICTURES]
    return bench.path("attacks", ".json", "mine", *key)


def measured(bench: Bench, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """``asking`` and ``mined``: how many pictures show the concept; mined and drawn once, then read from the file."""
    path = cell_path(bench, erasing, method, settings)
    if not is_measured(path):
        erasure = None if method == "none" else bench.erase(erasing, method, settings)[0]
        name, bf16 = (*erasing.objects, *erasing.styles)[0], bench.studio.bf16
        target = canvas_target(
            bench.studio.model, erasure, bench.studio.judge, name, prompts_of(bench, erasing), bf16=bf16
        )
        assert target.look is not None
        began = time.perf_counter()
        finds = mine(
            target.erased, bench.spec(erasing), SETTINGS, base=EmojiCanvasPort(bench.studio.model, bf16=bf16),
            look=target.look, threshold=target.threshold,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        best = Found((Way("the best find", states=finds.dark.states[0], attacks=target.prompts[:1]),))
        asked = evaluate(target, asking(target), target.look, pictures=-(-PICTURES // len(target.prompts)))
        mined = evaluate(target, best, target.look, pictures=PICTURES)
        keep(path, {"asking": asked.rate.to_json(), "mined": mined.rate.to_json(), "seconds": round(seconds, 1),
                    "method": method, "method_version": method_version(method), "bf16": bench.studio.bf16})  # fmt: skip
    return json.loads(path.read_text(encoding="utf-8"))


def mining_effect(bench: Bench, chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """docs/results/mining.{md,json}: each method on everything that the plan erases one at a time."""
    singles = [e for e in bench.plan.erasings() if e.key != "together"]
    methods = {"none": {}, **chosen}
    rows: dict[str, list[dict]] = {}
    with tqdm([(m, s, e) for m, s in methods.items() for e in singles], unit="search") as bar:
        for method, settings, erasing in bar:
            bar.set_description(f"{method}: {erasing.label}")
            rows.setdefault(method, []).append(measured(bench, erasing, method, settings))
    error = judge_error(bench, singles)
    judge, only = bench.studio.judge, " ".join(e.key for e in singles)
    text = f"""# Mine Dark Embeddings on erased models

Made by `nox -s bench -- mining --only {only} --method {" ".join(chosen)}`: the
node's search at its defaults ({SETTINGS.count} starts, {SETTINGS.steps} steps each, the model before the erasure connected),
seed {SETTINGS.seed}, on {only} erased one at a time. {PICTURES} pictures a concept of the best find, with noises that neither
the search nor any training has seen; shares after the error of the judge ({judge.name} {judge.version}), with 95 % intervals
that count it too. {arithmetic(row for found in rows.values() for row in found)}

| erased with | asking shows it | the best find shows it | seconds of a search |
|---|---|---|---|
{chr(10).join(_line(method, found, error) for method, found in rows.items())}
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "mining.md").write_text(text, encoding="utf-8")
    paths = [cell_path(bench, e, m, s) for m, s in methods.items() for e in singles]
    (RESULTS / "mining.json").write_text(json.dumps({"rows": rows, **bench.record(paths)}, indent=1), encoding="utf-8")
    print(text)


def _line(method: str, found: Sequence[Mapping[str, Any]], error: JudgeError) -> str:
    asked, mined = (error.behind(pooled(Rate.from_json(f[k]) for f in found)) for k in ("asking", "mined"))
    return f"| {method} | {asked} | {mined} | {sum(f['seconds'] for f in found) / len(found):.0f} |"
