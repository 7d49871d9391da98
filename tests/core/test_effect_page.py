"""The effect page: what it says in the terms of papers, worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from erasure_core.emojicanvas.effect import in_terms_of_papers
from erasure_core.metrics.rates import Rate

pytestmark = pytest.mark.core


def row(kind: str, **shares: int) -> dict[str, Any]:
    """A summary row; shares are of 20 pictures."""
    return {"erased": kind, "kind": kind, "method": "uce"} | {k: Rate(v, 20).to_json() for k, v in shares.items()}


def cells(text: str) -> list[str]:
    return [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]


def test_objects_are_of_a_kind_where_an_object_was_erased() -> None:
    of = cells(in_terms_of_papers([row("object", direct=2, unseen=10, kept_objects=18, kept_styles=16)]))
    assert of[:2] == ["object", "uce"]
    assert [x.split(" [")[0] for x in of[2:6]] == ["90 %", "90 %", "80 %", "87 %"]
    # 3 / (1 / 0.9 + 1 / 0.9 + 1 / 0.5)
    assert of[6].startswith("71 % [")


def test_styles_are_of_a_kind_where_a_style_was_erased() -> None:
    erased = row("style", direct=0, kept_objects=18, kept_styles=16) | {"unseen": Rate(0, 0).to_json()}
    of = cells(in_terms_of_papers([erased]))
    assert [x.split(" [")[0] for x in of[2:6]] == ["100 %", "80 %", "90 %", "90 %"]
    assert of[6] == "-", "a style has no synonyms"
