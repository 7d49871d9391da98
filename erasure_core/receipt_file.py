"""A receipt as JSON and back. Reading trusts nothing: what is off by a field's type, size or range is not read at all."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from .attack_record import AttackRecord
from .checked import OR_NEWER, Checked
from .header import read_spec, spec_json
from .metrics.judge_error import Corrected, JudgeError
from .metrics.judged import MOST_LABELS, JudgedBy
from .metrics.rates import Rate
from .metrics.rounding import ROUNDINGS, RoundingLoss
from .metrics.weights import TextMeasures
from .receipt import Counted, Drawn, Receipt, Survival

_FORMAT = 1
_MOST = 1e12
"""No figure here is larger."""
_SEED = (1 << 64) - 1
_READ = Checked("receipt")


def receipt_json(receipt: Receipt, indent: int | None = None) -> str:
    """All of it but the sheet; rates with their shares and intervals, so that nobody has to compute them."""
    judge = receipt.judge
    raw = {
        "format": _FORMAT,
        **spec_json(receipt.spec),
        "method": receipt.method,
        "settings": dict(receipt.settings),
        "base": receipt.base,
        "version": receipt.version,
        "digest": receipt.digest,
        "strength": receipt.strength,
        "carried": list(receipt.carried),
        "weights": receipt.weights,
        "rounded": receipt.rounded,
        "text": asdict(receipt.text),
        "drift": receipt.drift,
        "drawn": asdict(receipt.drawn),
        "judge": None if judge is None else _judge_json(judge),
        "words": [_counted_json(c, judge) for c in receipt.words],
        "kept": [_counted_json(c, judge) for c in receipt.kept],
        "attacks": [_attack_json(a) for a in receipt.attacks],
        "survival": [
            {"stored": s.stored, **asdict(s.loss), "after": _rate_json(s.after, judge)} for s in receipt.survival
        ],
    }
    best = receipt.after_corrected
    raw["pooled"] = {
        "before": _rate_json(receipt.before, judge),
        "after": _rate_json(receipt.after, judge),
        "kept_before": _rate_json(receipt.kept_before, judge),
        "kept_after": _rate_json(receipt.kept_after, judge),
        "after_corrected": None if best is None else _corrected_json(best),
    }
    return json.dumps(raw, ensure_ascii=True, allow_nan=False, indent=indent)


def parse_receipt(text: str) -> Receipt:
    """Read what :func:`receipt_json` wrote; intervals and pooled figures are computed anew.

    Raises:
        FileError: the first thing that is wrong with it, with the field's name.
    """
    raw = _READ.parse(text)
    number = _READ.whole(raw.get("format"), "format", 0, 1 << 30)
    if number != _FORMAT:
        raise _READ.wrong(f"format {number} is not {_FORMAT}. Update Concept Erasure to read newer files")
    judge = raw.get("judge")
    return Receipt(
        spec=read_spec(_READ, raw),
        method=_text(raw, "method", 100),
        settings=_READ.plain(raw.get("settings"), "settings"),
        base=_text(raw, "base", 128),
        version=_text(raw, "version", 40),
        digest=_text(raw, "digest", 64),
        strength=_number(raw, "strength", -1e6),
        carried=tuple(_READ.text(c, "carried") for c in _READ.entries(raw.get("carried", []), "carried", 100)),
        weights=_READ.text(raw.get("weights", ""), "weights", 64),
        rounded=_text(raw, "rounded", 20),
        text=_measures(_READ.fields(raw.get("text"), "text")),
        drift=_number(raw, "drift"),
        drawn=_drawn(_READ.fields(raw.get("drawn"), "drawn")),
        judge=None if judge is None else _judge(judge),
        words=tuple(_counted(c, "words") for c in _READ.entries(raw.get("words"), "words", 1000)),
        kept=tuple(_counted(c, "kept") for c in _READ.entries(raw.get("kept"), "kept", 1000)),
        attacks=tuple(_attack(a) for a in _READ.entries(raw.get("attacks"), "attacks", 200)),
        survival=tuple(_survival(s) for s in _READ.entries(raw.get("survival"), "survival", 20)),
    )


def _rate_json(rate: Rate | None, judge: JudgedBy | None) -> dict[str, Any] | None:
    """What was counted, and what it comes to after the judge's own error, where that is known."""
    if rate is None:
        return None
    true = rate if judge is None or not rate.n else judge.counted(rate)
    return rate.to_json() | ({"corrected": _corrected_json(true)} if isinstance(true, Corrected) else {})


def _corrected_json(x: Corrected) -> dict[str, float]:
    return {k: round(v, 4) for k, v in asdict(x).items()}


def _counted_json(c: Counted, judge: JudgedBy | None) -> dict[str, Any]:
    rates = {name: _rate_json(getattr(c, name), judge) for name in ("before", "after")} | {
        "alarms": _rate_json(c.alarms, None)
    }
    return {
        "word": c.word, "asked": c.asked, "moved": c.moved, **rates,
        "clip_score_before": c.clip_score_before, "clip_score_after": c.clip_score_after, "curve": _curve_json(c.curve),
    }  # fmt: skip


def _attack_json(a: AttackRecord) -> dict[str, Any]:
    rates = {name: _rate_json(getattr(a, name), a.judge) for name in ("asking", "attacked", "ceiling", "found_on_base")}
    lists = {"budget": dict(a.budget), "prompts": list(a.prompts), "curve": _curve_json(a.curve)}
    return asdict(a) | rates | lists | {"judge": _judge_json(a.judge)}


def _judge_json(judge: JudgedBy) -> dict[str, Any]:
    """With what its error does to the intervals, in words: for people, computed anew when read."""
    return asdict(judge) | {"note": judge.note}


def _curve_json(curve: tuple[tuple[float, int], ...]) -> list[list[float]]:
    return [[threshold, hits] for threshold, hits in curve]


def _text(raw: dict[str, Any], name: str, limit: int = 2000) -> str:
    return _READ.text(raw.get(name), name, limit)


def _number(raw: dict[str, Any], name: str, low: float = 0.0) -> float:
    return _READ.number(raw.get(name), name, low, _MOST)


def _rate(raw: dict[str, Any], name: str) -> Rate:
    values = _READ.fields(raw.get(name), name)
    n = _READ.whole(values.get("n"), f"{name}.n", 0, 1_000_000)
    return Rate(_READ.whole(values.get("hits"), f"{name}.hits", 0, n), n)


def _number_or_none(raw: dict[str, Any], name: str) -> float | None:
    return None if raw.get(name) is None else _number(raw, name)


def _rate_or_none(raw: dict[str, Any], name: str) -> Rate | None:
    return None if raw.get(name) is None else _rate(raw, name)


def _measures(raw: dict[str, Any]) -> TextMeasures:
    return TextMeasures(
        _number(raw, "erased"), _number_or_none(raw, "kept"), _number_or_none(raw, "kept_worst"),
        _number(raw, "empty"), _number(raw, "residual"),
    )  # fmt: skip


def _drawn(raw: dict[str, Any]) -> Drawn:
    seeds = _READ.entries(raw.get("seeds"), "seeds", 10_000)
    if not seeds:
        raise _READ.wrong("seeds must not be empty")
    return Drawn(
        _text(raw, "template"),
        tuple(_READ.whole(s, "seeds", 0, _SEED) for s in seeds),
        _READ.whole(raw.get("steps"), "steps", 1, 100_000),
        _number(raw, "cfg"),
        _text(raw, "sampler", 100),
        _text(raw, "scheduler", 100),
        _READ.whole(raw.get("width"), "width", 1, 1 << 20),
        _READ.whole(raw.get("height"), "height", 1, 1 << 20),
    )


def _judge(value: Any) -> JudgedBy:
    raw = _READ.fields(value, "judge")
    labels = _READ.entries(raw.get("labels", []), "labels", MOST_LABELS)
    error = None if raw.get("error") is None else _READ.fields(raw["error"], "error")
    return JudgedBy(
        _text(raw, "name", 200),
        _text(raw, "version", 100),
        _number(raw, "threshold"),
        tuple(_READ.text(label, "labels", 200) for label in labels),
        None if error is None else JudgeError(_rate(error, "hits"), _rate(error, "alarms")),
    )


def _curve(raw: dict[str, Any], counted: Rate | None) -> tuple[tuple[float, int], ...]:
    """Of ``counted`` pictures; older files have none."""
    points = [_READ.entries(p, "curve", 2) for p in _READ.entries(raw.get("curve", []), "curve", 20)]
    if any(len(p) != 2 for p in points):
        raise _READ.wrong("curve must be a list of thresholds and hits")
    most = 0 if counted is None else counted.n
    return tuple((_READ.number(t, "curve", 0.0, 1.0), _READ.whole(h, "curve", 0, most)) for t, h in points)


def _counted(value: Any, where: str) -> Counted:
    raw = _READ.fields(value, where)
    after = _rate_or_none(raw, "after")
    return Counted(
        _text(raw, "word"), _text(raw, "asked"), _rate_or_none(raw, "before"), after,
        _number(raw, "moved"), _rate_or_none(raw, "alarms"),
        _number_or_none(raw, "clip_score_before"), _number_or_none(raw, "clip_score_after"), _curve(raw, after),
    )  # fmt: skip


def _survival(value: Any) -> Survival:
    raw = _READ.fields(value, "survival")
    stored = _text(raw, "stored", 20)
    if stored not in ROUNDINGS:
        raise _READ.wrong(f"stored: {stored!r} is none of {', '.join(ROUNDINGS)}{OR_NEWER}")
    loss = RoundingLoss(_number(raw, "worst"), _number(raw, "noise"), _number(raw, "left", -_MOST))
    return Survival(stored, loss, _rate_or_none(raw, "after"))


def _attack(value: Any) -> AttackRecord:
    raw = _READ.fields(value, "attacks")
    prompts, attacked = _READ.entries(raw.get("prompts"), "prompts", 1000), _rate(raw, "attacked")
    return AttackRecord(
        attack=_text(raw, "attack", 100),
        title=_text(raw, "title", 200),
        concept=_text(raw, "concept"),
        budget=_READ.plain(raw.get("budget"), "budget"),
        prompts=tuple(_READ.text(p, "prompts") for p in prompts),
        judge=_judge(raw.get("judge")),
        asking=_rate(raw, "asking"),
        attacked=attacked,
        found=_text(raw, "found"),
        queries=_READ.whole(raw.get("queries"), "queries", 0, 1 << 40),
        seed=_READ.whole(raw.get("seed"), "seed", 0, _SEED),
        base=_text(raw, "base", 128),
        erased=_text(raw, "erased", 128),
        weights=_READ.text(raw.get("weights", ""), "weights", 64),
        memory=_READ.text(raw.get("memory", ""), "memory", 64),
        base_weights=_READ.text(raw.get("base_weights", ""), "base_weights", 64),
        steps=_READ.whole(raw.get("steps", 0), "steps", 0, 100_000),
        cfg=_READ.number(raw.get("cfg", 0.0), "cfg", 0.0, _MOST),
        ceiling=_rate_or_none(raw, "ceiling"),
        found_on_base=_rate_or_none(raw, "found_on_base"),
        tried=_READ.whole(raw.get("tried", 0), "tried", 0, 1 << 40),
        curve=_curve(raw, attacked),
        version=_READ.whole(raw.get("version", 0), "version", 0, 1 << 20),
        share=_READ.number(raw.get("share", 0.0), "share", 0.0, _MOST),
        given=_READ.flag(raw.get("given", False), "given"),
    )
