"""The effect page: what it says in the terms of papers, worked out by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from erasure_core import all_methods
from erasure_core.emojicanvas.bench import rows
from erasure_core.emojicanvas.bench.effect import figure, in_terms_of_papers, singles, true_shares
from erasure_core.emojicanvas.bench.measures import MEASURES
from erasure_core.emojicanvas.bench.rows import least_pace, timed
from erasure_core.metrics.judge_error import JudgeError
from erasure_core.metrics.rates import Rate

pytestmark = pytest.mark.core
RESULTS = Path(__file__).resolve().parents[2] / "docs" / "results"


def row(kind: str, **shares: int) -> dict[str, Any]:
    """A summary row; shares are of 20 pictures, or of none where they are not given."""
    nothing = {m: Rate(0, 0).to_json() for m in MEASURES}
    return (
        {"erased": kind, "kind": kind, "method": "uce"}
        | nothing
        | {k: Rate(v, 20).to_json() for k, v in shares.items()}
    )


PERFECT = JudgeError(Rate(10**6, 10**6), Rate(0, 10**6))
ERRORS = {"object": PERFECT, "style": PERFECT}


def cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]


def test_objects_are_of_a_kind_where_an_object_was_erased() -> None:
    of = cells(in_terms_of_papers([row("object", direct=2, unseen=10, kept_objects=18, kept_styles=16)], ERRORS))
    assert of[:2] == ["object", "uce"]
    assert [x.split(" [")[0] for x in of[2:6]] == ["90 %", "90 %", "80 %", "87 %"]
    # 3 / (1 / 0.9 + 1 / 0.9 + 1 / 0.5)
    assert of[6].startswith("71 % [")


def test_styles_are_of_a_kind_where_a_style_was_erased() -> None:
    erased = row("style", direct=0, kept_objects=18, kept_styles=16)
    of = cells(in_terms_of_papers([erased], ERRORS))
    assert [x.split(" [")[0] for x in of[2:6]] == ["100 %", "80 %", "90 %", "90 %"]
    assert of[6] == "-", "a style has no synonyms"


def test_a_judge_that_errs_is_taken_out_of_every_share() -> None:
    seen = row("style", direct=4, named=4, neighbours=18, kept_objects=18, kept_styles=16, beside=18)
    blind = {"object": PERFECT, "style": JudgeError(Rate(80, 100), Rate(20, 100))}
    true = true_shares(seen, blind)
    assert true["direct"].share == 0, "as often as it sees a style that isn't there"
    assert true["kept_styles"].share == 1 and true["kept_objects"].share == pytest.approx(0.9)
    assert true["beside"].share == pytest.approx(0.9), "beside an erased style objects are looked for"
    sure = true_shares(seen, ERRORS)
    for m in ("direct", "kept_styles"):
        assert true[m].high - true[m].low > sure[m].high - sure[m].low
    assert str(true["unseen"]) == "-"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (1029.4, "1030"),
        (1315.35, "1320"),
        (1234567.0, "1230000"),
        (425.32, "425"),
        (28.05, "28.1"),
        (20.0, "20"),
        (0.02, "0.02"),
        (0, "0"),
    ],
)
def test_seconds_have_three_digits_and_no_exponent(seconds: float, said: str) -> None:
    assert figure(seconds) == said


def test_what_was_erased_together_stands_in_the_summary_alone() -> None:
    rows = [row("object"), row("several objects"), row("style")]
    assert [r["kind"] for r in singles(rows)] == ["object", "style"]


def test_seconds_are_of_what_ran_alone() -> None:
    made = [{"seconds": 4.0}, {"seconds": 6.0, "busy": False}, {"seconds": 50.0, "busy": True}, {"seconds": None}]
    assert timed(made) == (True, 5.0)
    assert timed(made[2:]) == (False, 50.0)
    assert timed(made[3:]) == (True, None), "the base takes none"
    mixed = [{"seconds": 8.0, "pace": 2.0}, {"seconds": 3.0, "pace": 0.5}, {"seconds": 7.0, "pace": None}]
    assert least_pace(mixed) == 0.5 and least_pace(made) is None
    assert timed(mixed[:2], 0.5) == (True, 2.5) and timed(mixed[2:], 0.5) == (True, 7.0), "as on one machine"


@pytest.mark.parametrize(
    ("seconds", "loads", "busy"),
    [
        (30, (1.2, 3.0, 3.0), False),
        (30, (1.8, 0.1, 0.1), True),
        (400, (1.0, 1.7, 0.5), True),
        (400, (1.0, 1.2, 3.0), False),
        (1000, (1.0, 1.2, 3.0), True),
    ],
)
def test_work_beside_is_noticed_over_a_whole_training(monkeypatch, seconds: float, loads, busy: bool) -> None:
    monkeypatch.setattr(rows.os, "getloadavg", lambda: loads)
    monkeypatch.setattr(rows.torch, "get_num_threads", lambda: 1)
    assert rows._busy(seconds) is busy


@pytest.mark.parametrize("page", sorted(RESULTS.glob("*.json")), ids=lambda p: p.stem)
def test_what_was_measured_can_still_be_found(page: Path) -> None:
    """Results are found by their settings: a setting that is new needs a name in the old ones too."""
    known = json.loads(page.read_text(encoding="utf-8"))
    measured = known.get("measured", {}).get("rows", {}) if isinstance(known, dict) else {}
    for one in measured.values():
        if one.get("settings"):  # neither the unchanged model's nor a memory's
            names = {field.name for field in dataclasses.fields(all_methods()[one["method"]].settings)}
            assert one["settings"].keys() == names, one["method"]
