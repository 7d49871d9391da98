"""Erasures of the testbed under attack, cell by cell: one attack on one erasure, drawn and judged."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from itertools import permutations
from pathlib import Path
from typing import Any

from ...artifact import digest
from ...attacks import AttackTarget, Found, Knowledge, Sampler, Way, all_attacks, asking, attack, evaluate, shortlist
from ...methods import all_methods
from ...metrics.rates import Rate
from ..concepts import OBJECT, caption_words, prompt
from ..splits import STYLE_OBJECTS, Erasing
from .red_team import SAMPLER, canvas_target
from .rows import Bench, Plan, keep, method_version
from .settings import ATTACKS, plain

ASKING = "asking"
"""No attack: the prompt as it is. Every attack is read against this column."""
PICTURES, OF_OBJECTS = 18, 27
"""Of what an attack found, with noises that no attack has seen: of each concept, and of an attack that styles have not. Over
six concepts, or four objects, that is an interval of at most 10 points either way, the judge's error counted."""
EVERY_WORD = "captions"
"""Given as the words of *synonyms*: all that the text encoder knows, each in the place of the name."""
EVERY_PAIR = "pairs"
"""All pairs of these likewise, one word behind the other; too many to draw, so give *drawn*, too."""
LOOKS = 12
"""Pictures, at other noises again, by which an attacker chooses among several finds."""


def prompts_of(bench: Bench, erasing: Erasing) -> list[str]:
    """What an attacker wants to see: the concept's own prompt, for a style on two objects."""
    template = bench.plan.split.template
    if erasing.styles:
        return [prompt(o, erasing.styles[0], template=template) for o in STYLE_OBJECTS[:2]]
    return [prompt(OBJECT[erasing.objects[0]].name, template=template)]


def applies(name: str, erasing: Erasing) -> bool:
    """Whether there is anything to attack: several concepts at once are no single aim, styles have no other words."""
    if erasing.key == "together":
        return False
    return name != "synonyms" or bool(erasing.objects)


def budget_of(name: str, erasing: Erasing, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of an attack on the testbed that differ from its paper's."""
    default = {} if name == ASKING else plain(all_attacks()[name].settings())
    budget = {k: v for k, v in {**ATTACKS.get(name, {}), **changed}.items() if v != default[k]}
    if name == "synonyms" and budget.get("words") != EVERY_PAIR:
        every = budget.get("words") == EVERY_WORD
        budget["words"] = ", ".join(sorted(caption_words()) if every else OBJECT[erasing.objects[0]].unseen)
    return budget


def pictures_for(plan: Plan, name: str) -> int:
    """Pictures of each of an attack's cells."""
    return plan.pictures or (OF_OBJECTS if name == "synonyms" else PICTURES)


def cell_path(bench: Bench, erasing: Erasing, method: str, settings: Mapping[str, Any], name: str,
              changed: Mapping[str, Any]) -> Path:  # fmt: skip
    """The file of one cell."""
    plan, budget = bench.plan, budget_of(name, erasing, changed)
    key = [plan.split.name, erasing.label, method, settings, name, budget, pictures_for(plan, name)]
    key += [plan.replace_with] if plan.replace_with else []
    if (plan.sampler.steps, plan.sampler.cfg) != (SAMPLER.steps, SAMPLER.guidance):
        key += [[plan.sampler.steps, plan.sampler.cfg]]
    return bench.path("attacks", ".json", *key)


def measure_cell(bench: Bench, erasing: Erasing, method: str, settings: Mapping[str, Any], name: str,
                 changed: Mapping[str, Any]) -> dict[str, Any]:  # fmt: skip
    """One attack on one erasure ("none": on the base model), and keep it."""
    erasure = None if method == "none" else bench.erase(erasing, method, settings)[0]
    concept = (*erasing.objects, *erasing.styles)[0]
    how = Sampler(bench.plan.sampler.steps, bench.plan.sampler.cfg, SAMPLER.batch)
    target = canvas_target(bench.studio.model, erasure, bench.studio.judge, concept, prompts_of(bench, erasing), how,
                           bf16=bench.studio.bf16, drawn=bench.drawn[erasing.label])  # fmt: skip
    budget, began = budget_of(name, erasing, changed), time.perf_counter()
    seen, found = _attacked(bench, erasing, target, name, budget)
    row = {
        "erased": erasing.label,
        "method": method,
        "method_version": method_version(method),
        "attack": name,
        "budget": budget,
        "seconds": round(time.perf_counter() - began, 1),
        "bf16": bench.studio.bf16,
        "erasure": None if erasure is None else digest(erasure.deltas)[:16],
        "pace": bench.plan.pace,
        "version": 1 if name == ASKING else all_attacks()[name].version,
        "found": found,
        **seen.to_json(),
    }
    keep(cell_path(bench, erasing, method, settings, name, changed), row)
    return row


def _attacked(
    bench: Bench, erasing: Erasing, target: AttackTarget, name: str, budget: Mapping[str, Any]
) -> tuple[Rate, str]:
    assert target.look is not None
    pictures = pictures_for(bench.plan, name)
    if name == ASKING:
        found = asking(target)
        each = -(-pictures // len(found.ways))
    else:
        found, each = _found(bench, erasing, target, name, budget), pictures
        found = shortlist(target, found, target.look, looks=LOOKS)
    result = evaluate(target, found, target.look, pictures=each)
    return result.rate, _said(found)


def _found(bench: Bench, erasing: Erasing, target: AttackTarget, name: str, budget: Mapping[str, Any]) -> Found:
    """What the attack finds. One that looks at the text encoder alone finds the same whatever was erased, so it runs once."""
    spec = bench.spec(erasing)
    if all_attacks()[name].knowledge is not Knowledge.TEXT_ONLY:
        return attack(target, spec, name, _spelled_out(erasing, budget))
    path = finds_path(bench, erasing, name, budget)
    if not path.exists():
        ways = [
            {"label": w.label, "prompt": w.prompt, "attacks": w.attacks}
            for w in attack(target, spec, name, budget).ways
        ]
        keep(path, {"ways": ways})
    ways = json.loads(path.read_text(encoding="utf-8"))["ways"]
    return Found(tuple(Way(w["label"], w["prompt"], attacks=tuple(w["attacks"])) for w in ways))


def _spelled_out(erasing: Erasing, budget: Mapping[str, Any]) -> Mapping[str, Any]:
    """The budget with all pairs of words in place of their name: results needn't hold sixteen thousand."""
    if budget.get("words") != EVERY_PAIR:
        return budget
    told = {word for words in erasing.words() for word in words}
    pairs = permutations(sorted(caption_words() - told), 2)
    return {**budget, "words": ", ".join(map(" ".join, pairs)), "most": 100_000}


def finds_path(bench: Bench, erasing: Erasing, name: str, budget: Mapping[str, Any]) -> Path:
    """The file of what such an attack finds, whatever was erased."""
    plan, version = bench.plan, all_attacks()[name].version
    key = ["prompts found", plan.split.name, erasing.label, name, budget, *([version] if version > 1 else [])]
    return bench.path("attacks", ".json", *key, *([plan.replace_with] if plan.replace_with else []))


def is_another_training(row: Mapping[str, Any], cell: Mapping[str, Any]) -> bool:
    """Whether an attack was run on another training, of the same settings, than a row tells of: on another machine, or after
    one of the two was measured again. Closed forms come out the same but for their last bits. Of older results only the
    arithmetic is known."""
    if row["method"] == "none" or not all_methods()[row["method"]].trains:
        return False
    key = "erasure" if row.get("erasure") and cell.get("erasure") else "bf16"
    return row[key] != cell[key]


def _said(found: Found) -> str:
    return found.ways[0].label[:200] if found.ways else ""


def titles(names: list[str]) -> dict[str, str]:
    """What tables call attacks."""
    return {name: ASKING if name == ASKING else all_attacks()[name].title for name in names}
