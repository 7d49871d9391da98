"""All settings of a method and of an attack on the testbed, and what methods are given beside the words."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from enum import Enum
from itertools import cycle
from typing import Any

from torch import Tensor

from ...attacks import all_attacks
from ...methods import Aids, all_methods, settings_from
from ...methods.registry import Look, typed
from ...operators.cond import Cond
from ...pairs import ConceptPairs, make_pairs
from ..concepts import OBJECTS, STYLES, prompt
from ..judge import Judge
from ..model import EmojiCanvasPort
from ..splits import STYLE_OBJECTS, Erasing
from ..testbed import TESTBED

ATTACKS: dict[str, Mapping[str, Any]] = {
    # On the tuning split 600 steps found more than 3000 without a teacher do; after UCE and SDD they found a dog or a key in 9
    # of 64 pictures, 150 steps in 6.
    "concept_inversion": {"steps": 300, "teacher": True},
    # More teach what a model never learned as well as they bring back (docs/results/never_learned.md).
    "free_embedding": {"steps": 50},
    "unlearn_diff_atk": {"times": 10, "steps": 20},
    # On the tuning split's dog and key 150 steps draw all 32 pictures of the unchanged model, as 400 do, and after UCE one.
    "p4d": {"steps": 150},
    "ring_a_bell": {"generations": 300, "population": 100},
    "mma_diffusion": {"rounds": 60, "tries": 64},
    "relearning": {"learning_rate": 1e-3},
}
"""Budgets of attacks on the testbed, where they are not the papers'."""


_PAIRS, _EVERY = 3, 2
"""Of DUO: pairs of a scene, and every which other object an erased one gives way to."""


def plain(settings: Any) -> dict[str, Any]:
    """A settings object as JSON holds it."""
    return {k: v.value if isinstance(v, Enum) else v for k, v in dataclasses.asdict(settings).items()}


def settings_for(method: str, changed: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """All settings of a method on the testbed, some of them changed."""
    spec = all_methods()[method]
    return plain(settings_from(spec, {**TESTBED.get(method, {}), **(changed or {})}))


def parse_settings(method: str, pairs: Sequence[str]) -> dict[str, Any]:
    """``name=value`` or ``method.name=value`` as typed settings of ``method``; those of other methods are skipped."""
    fields = {f.name: f.default for f in dataclasses.fields(all_methods()[method].settings)}
    out: dict[str, Any] = {}
    for pair in pairs:
        left, _, text = pair.partition("=")
        owner, _, name = left.rpartition(".")
        if owner not in ("", method):
            continue
        if name not in fields:
            raise SystemExit(f"--set {pair}: {method} has no setting {name!r}; there are {', '.join(fields)}")
        out[name] = typed(text, fields[name])
    return out


def parse_budgets(pairs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``attack.setting=value`` of the command line, typed as the attack's settings are.

    Raises:
        SystemExit: an unknown attack or setting.
    """
    out: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        left, _, text = pair.partition("=")
        attack, _, name = left.partition(".")
        known = all_attacks()
        fields = {f.name: f.default for f in dataclasses.fields(known[attack].settings)} if attack in known else {}
        if name not in fields:
            raise SystemExit(f"--budget {pair}: write ATTACK.SETTING=VALUE; attacks are {', '.join(known)}")
        out.setdefault(attack, {})[name] = typed(text, fields[name])
    return out


def look_for(port: EmojiCanvasPort, name: str, judge: Judge) -> Look:
    """The judge behind the decoder: the probability that latents show an object or a style."""

    def look(latents: Tensor) -> Tensor:
        return judge.judge(port.decode(latents)).probability(name)

    return look


def aids_for(method: str, port: EmojiCanvasPort, erasing: Erasing, judge: Judge) -> Aids:
    """Pairs for a method that needs them, and the judge behind the decoder for each concept."""
    pairs = _pairs(port, erasing, judge) if all_methods()[method].needs_pairs else None
    return Aids(pairs=pairs, looks=tuple(look_for(port, name, judge) for name in (*erasing.objects, *erasing.styles)))


def _pairs(port: EmojiCanvasPort, erasing: Erasing, judge: Judge) -> ConceptPairs:
    """SDEdit pairs of every concept: an object gives way to several others, in all styles in turn; a style to the plain one."""
    others = [o.name for o in OBJECTS if o.name not in erasing.objects][::_EVERY]
    styled = list(zip(others, cycle(s.name for s in STYLES), strict=False))
    scenes = [(prompt(name, style), prompt(other, style)) for other, style in styled for name in erasing.objects]
    looks = [look_for(port, name, judge) for _ in styled for name in erasing.objects]
    scenes += [(prompt(o, style), prompt(o)) for o in STYLE_OBJECTS for style in erasing.styles]
    looks += [look_for(port, style, judge) for _ in STYLE_OBJECTS for style in erasing.styles]
    unsafe, safe = (Cond.cat(port.conditions(list(side))) for side in zip(*scenes, strict=True))
    with port.trainable() as model:
        return make_pairs(
            model, unsafe, safe, port.conditions([""])[0], count=_PAIRS * len(scenes), scenes=scenes, family=port.family,
            strength=0.5, strongest=0.85, guidance=4.0, steps=20, look=looks,
        )  # fmt: skip
