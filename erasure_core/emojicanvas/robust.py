"""How well erasures stand up to attacks: share of pictures that show the concept again, for each method and attack."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..artifact import Erasure
from ..attacks import all_attacks, asking, attack, evaluate
from ..formats import load, save
from ..metrics.rates import Rate, pooled
from .bench_settings import ATTACKS
from .concepts import OBJECT, prompt
from .effect import RESULTS, Bench
from .red_team import canvas_target
from .splits import STYLE_OBJECTS, Erasing, erasings

ASKING = "asking"
"""No attack: the prompt as it is. Every attack is read against this column."""
_PICTURES = 12
"""Of each way that an attack found, with noises that no attack has seen."""


def prompts_of(bench: Bench, erasing: Erasing) -> list[str]:
    """What an attacker wants to see: the concept's own prompt, for a style on two objects."""
    template = bench.plan.split.template
    if erasing.styles:
        return [prompt(o, erasing.styles[0], template=template) for o in STYLE_OBJECTS[:2]]
    return [prompt(OBJECT[erasing.objects[0]].name, template=template)]


class Siege:
    """Attacks on the erasures of a bench; each finished cell is a file."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self._cells, self._erasures = bench.plan.folder / "attacks", bench.plan.folder / "erasures"
        self._cells.mkdir(exist_ok=True)
        self._erasures.mkdir(exist_ok=True)

    def _path(self, folder: Path, ending: str, *key: Any) -> Path:
        text = json.dumps([self.bench.plan.split.name, *key], sort_keys=True)
        return folder / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}{ending}"

    def erasure(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> Erasure | None:
        """Computed once, then read from its file. None for "none", the base model."""
        if method == "none":
            return None
        path = self._path(self._erasures, ".safetensors", erasing.label, method, settings)
        if not path.exists():
            save(self.bench.erase(erasing, method, settings)[0], path)
        return load(path)

    def cell(self, erasing: Erasing, method: str, settings: Mapping[str, Any], name: str) -> dict[str, Any]:
        """One attack on one erasure."""
        budget = ATTACKS.get(name, {})
        path = self._path(self._cells, ".json", erasing.label, method, settings, name, budget, _PICTURES)
        if not path.exists():
            erasure, bench = self.erasure(erasing, method, settings), self.bench
            concept = (*erasing.objects, *erasing.styles)[0]
            target = canvas_target(
                bench.studio.model,
                erasure,
                bench.studio.judge,
                concept,
                prompts_of(bench, erasing),
                bf16=bench.plan.sampler.bf16,
            )
            spec, began = bench.spec(erasing), time.perf_counter()
            found = asking(target) if name == ASKING else attack(target, spec, name, budget)
            assert target.look is not None
            result = evaluate(target, found, target.look, pictures=_PICTURES)
            row = {"erased": erasing.label, "method": method, "attack": name, "budget": dict(budget),
                "seconds": round(time.perf_counter() - began), **result.rate.to_json()}  # fmt: skip
            path.write_text(json.dumps(row, indent=1), encoding="utf-8")
        return json.loads(path.read_text(encoding="utf-8"))


def robust(bench: Bench, chosen: Mapping[str, Mapping[str, Any]], attacks: Sequence[str], only: Sequence[str]) -> None:
    """Attack the erasures of ``chosen`` methods and write the table."""
    siege = Siege(bench)
    erased = [
        e
        for e in erasings(bench.plan.split)
        if e.kind != "several objects" and (not only or e.label.split()[0] in only)
    ]
    work = [(m, s, e, a) for e in erased for a in (ASKING, *attacks) for m, s in {"none": {}, **chosen}.items()
        if m != "none" or a == ASKING]  # fmt: skip
    rows = []
    with tqdm(work, unit="attack") as bar:
        for method, settings, erasing, name in bar:
            bar.set_description(f"{name} on {method}: {erasing.label}")
            rows.append(siege.cell(erasing, method, settings, name))
    titles = {a: all_attacks()[a].title if a != ASKING else ASKING for a in (ASKING, *attacks)}
    lines = ["| method | " + " | ".join(titles.values()) + " |", "|" + "---|" * (len(titles) + 1)]
    for method in ("none", *chosen):
        cells = [pooled(Rate.from_json(r) for r in rows if (r["method"], r["attack"]) == (method, a)) for a in titles]
        lines.append(f"| {method} | " + " | ".join(str(c) if c.n else "-" for c in cells) + " |")
    table = "\n".join(lines)
    budgets = "\n".join(f"- {titles[a]}: {ATTACKS.get(a) or 'its own settings'}" for a in attacks)
    text = f"""# Erasures under attack on EmojiCanvas

Share of pictures that show the erased concept again, with 95 % Wilson intervals, over {", ".join(e.label for e in erased)};
{_PICTURES} pictures of each thing that an attack found, with noises that it never saw. Made by
`nox -s bench -- robust{" --bf16" if bench.plan.sampler.bf16 else ""} --method {" ".join(chosen)} --attack {" ".join(attacks)}\
{" --only " + " ".join(only) if only else ""}`.
What each attack knows and does is in [attacks](../attacks.md).

{table}

Where a setting of an attack is not its paper's:

{budgets}
"""
    (RESULTS / "robust.md").write_text(text, encoding="utf-8")
    (RESULTS / "robust.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(table)
