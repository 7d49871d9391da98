"""The control of searches: what it draws is never learned, judged by others' drawings, measured once, and said."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from erasure_core.attacks import Sampler as AttackSampler
from erasure_core.emojicanvas.bench import never_learned, siege
from erasure_core.emojicanvas.bench.leaderboard_page import table
from erasure_core.emojicanvas.bench.leaderboard_words import teaching
from erasure_core.emojicanvas.bench.perceptual import embedding
from erasure_core.emojicanvas.bench.rows import Bench, Plan
from erasure_core.emojicanvas.bench.settings import settings_for
from erasure_core.emojicanvas.concepts import OBJECTS
from erasure_core.emojicanvas.splits import SCORING
from erasure_core.emojicanvas.studio import Sampler
from erasure_core.emojicanvas.training import drawings
from erasure_core.emojicanvas.training.judge_data import EMOJI_SETS
from erasure_core.emojicanvas.weights import BUNDLE, JUDGE
from erasure_core.metrics.rates import Rate

pytestmark = pytest.mark.core
SETS: dict[str, set[str]] = {}


def blobs(label: str, sets, count: int, folder: Path) -> torch.Tensor:
    """Red discs where one of the things is asked for, blue squares for the model's objects."""
    SETS.setdefault(label, set()).update(sets)
    x = torch.linspace(-1, 1, 128)
    disc = (
        (x[:, None] ** 2 + x[None] ** 2 < 0.5)
        if label in never_learned.THINGS
        else (x[:, None].abs() < 0.6) & (x[None].abs() < 0.6)
    )
    colour = torch.tensor([1.0, -1, -1] if label in never_learned.THINGS else [-1.0, -1, 1])[:, None, None]
    pictures = torch.where(disc, colour, torch.ones(3, 1, 1)).repeat(count, 1, 1, 1)
    return pictures + 0.02 * torch.randn(pictures.shape, generator=torch.Generator().manual_seed(len(label)))


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(never_learned, "drawn", blobs)
    monkeypatch.setattr(never_learned, "embedding", lambda x: torch.nn.functional.avg_pool2d(x, 32).flatten(1))
    monkeypatch.setattr(drawings, "fetch", lambda folder: None)
    monkeypatch.setattr(never_learned, "THINGS", ("hamburger", "anchor"))
    monkeypatch.setattr(never_learned, "ERASED", "rose")
    monkeypatch.setattr(never_learned, "OBJECTS", OBJECTS[:6])
    monkeypatch.setattr(never_learned, "SEARCHES", ((siege.ASKING, {}), ("free_embedding", {"steps": 2, "starts": 1})))
    for name, fewer in (("_EXAMPLES", 4), ("_OTHERS", 1), ("_GIVEN", 4), ("_SHOWN", 2)):
        monkeypatch.setattr(never_learned, name, fewer)
    for module in (never_learned, siege):
        monkeypatch.setattr(module, "PICTURES", 2)
        monkeypatch.setattr(module, "LOOKS", 2)
        monkeypatch.setattr(module, "SAMPLER", AttackSampler(2, 4.0, 8))
    folder = tmp_path / "cells"
    folder.mkdir()
    never_learned.RESULTS.mkdir(parents=True)
    return Bench(Plan(BUNDLE, JUDGE, Sampler(2, 4.0), SCORING, 1, 1, "", folder, 32))


def test_searches_are_measured_once_and_said(bench: Bench, monkeypatch) -> None:
    never_learned.never_learned(bench, {"uce": settings_for("uce")})
    results = Path("docs/results")
    page = (results / "never_learned.md").read_text(encoding="utf-8")
    lines = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert [line[0].strip("|* ") for line in lines[1:]] == [
        "never learned", "hamburger", "anchor", "rose", "rose, erased with uce",
    ]  # fmt: skip
    assert all(len(line) == 3 for line in lines) and "Free Embedding, 2 steps" in lines[0][2]
    assert "nox -s bench -- never_learned --method uce" in page
    cells = json.loads((results / "never_learned.json").read_text(encoding="utf-8"))["measured"]["attacks"].values()
    assert len(cells) == 8 and all(cell["n"] == 2 for cell in cells)
    strangers = [cell for cell in cells if "judge" in cell]
    assert {cell["erased"] for cell in strangers} == {"hamburger", "anchor"}
    assert all(Rate.from_json(cell["judge"]["hits"]) == Rate(4, 4) for cell in strangers), (
        "red discs are told from blue squares"
    )
    assert (results / "never_learned.png").stat().st_size > 1000
    taught = never_learned.control(bench, {siege.ASKING: {}, "free_embedding": {"steps": 2}, "synonyms": {}})
    assert list(taught) == [siege.ASKING, "free_embedding"], "what was tried, at the budget that is asked for"
    assert list(never_learned.control(bench, {"free_embedding": {"steps": 3}})) == []
    assert str(taught["free_embedding"]) in lines[1][2], "the page's first line"
    row = table([], [siege.ASKING, "synonyms", "free_embedding"], taught).splitlines()[-1].split(" | ")
    assert row[0] == "| *never learned*" and row[5] == "-" and row[4] != "-" != row[6]
    assert str(taught["free_embedding"]) in teaching(taught) and teaching({}) == ""
    for module in (never_learned, siege):
        monkeypatch.setattr(module, "evaluate", lambda *_, **__: pytest.fail("it was measured already"))
    never_learned.never_learned(bench, {"uce": settings_for("uce")})


def test_the_judge_is_made_of_other_drawings_than_searches_learn_from(bench: Bench) -> None:
    SETS.clear()
    stranger = never_learned.Stranger(bench, "hamburger", Path())
    assert len(stranger.given) == 4 and SETS["hamburger"] == set(drawings.PAINTED_SETS)
    SETS.clear()
    assert stranger.judge.labels == ("hamburger",)
    assert not SETS["hamburger"] & set(drawings.PAINTED_SETS) and SETS["hamburger"] < set(EMOJI_SETS)
    assert {o.emoji for o in OBJECTS[:6]} < set(SETS), "what it is told apart from is everything that the model learned"


def test_nothing_of_them_is_among_what_the_model_learned() -> None:
    known = {word for o in OBJECTS for word in (*o.words, o.emoji)}
    assert not known & set(never_learned.THINGS)


def test_an_embedding_is_of_the_scaled_picture() -> None:
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    large = torch.nn.functional.interpolate(pictures, size=224, mode="bilinear")
    seen = embedding(pictures, batch=2)
    assert seen.shape == (3, 320)
    torch.testing.assert_close(seen, embedding(large), rtol=1e-4, atol=1e-4)
