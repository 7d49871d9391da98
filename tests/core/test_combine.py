"""Several erasures on one model on a tiny plan: what each way draws, and the page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from erasure_core.emojicanvas.bench import combine as module
from erasure_core.emojicanvas.bench.combine import How, alone, combine, draw_with
from erasure_core.emojicanvas.bench.effect import run
from erasure_core.emojicanvas.bench.rows import Bench, Plan
from erasure_core.emojicanvas.bench.settings import settings_for
from erasure_core.emojicanvas.model import EmojiCanvasPort
from erasure_core.emojicanvas.splits import SCORING, Erasing, Shot
from erasure_core.emojicanvas.studio import Sampler
from erasure_core.emojicanvas.weights import BUNDLE, JUDGE

pytestmark = pytest.mark.core
UCE = {"uce": settings_for("uce")}
TWO = Erasing(objects=("cat", "rose"))


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.chdir(tmp_path)
    for where in ("erasure_core.emojicanvas.bench.rows.erasings", "erasure_core.emojicanvas.bench.combine.erasings"):
        monkeypatch.setattr(where, lambda split: [*alone(TWO), Erasing(styles=("neon",)), TWO])
    return Bench(Plan(BUNDLE, JUDGE, Sampler(3, 4.0), SCORING, 1, 1, "", tmp_path / "cells"))


def test_what_each_way_draws(bench: Bench) -> None:
    """Shots of several prompts come back in their order, each as the model with what that prompt is to read draws it."""
    port = EmojiCanvasPort(bench.studio.model, bf16=bench.studio.bf16)
    erasures = [bench.erase(e, "uce", UCE["uce"])[0] for e in alone(TWO)]
    words = ("cat", "house", "cat", "rose")
    shots = [Shot(f"a {word}", seed, word) for seed, word in enumerate(words)]
    plain = bench.studio.draw(shots, None)
    drawn = {how: draw_with(bench.studio, port, erasures, how)(shots) for how in How}
    for how, pictures in drawn.items():
        far = (pictures - plain).abs().mean(dim=(1, 2, 3))
        assert far[[0, 2, 3]].min() > 5 * far[1], how
    dense = {
        name: sum(e.deltas[name].dense() for e in erasures if name in e.deltas) for name in erasures[0].deltas
    }  # both change every text key and value
    weights = {name: bench.studio.model.unet.get_submodule(name).weight for name in dense}
    before = {name: w.clone() for name, w in weights.items()}
    try:
        for name, w in weights.items():
            w += dense[name]
        by_hand = bench.studio.draw([Shot(s.prompt, s.seed + 1000, s.object) for s in shots], None)
    finally:
        for name, w in weights.items():
            w.copy_(before[name])
    again = draw_with(bench.studio, port, erasures, How.ADDED)
    summed = again([Shot(s.prompt, s.seed + 1000, s.object) for s in shots])
    assert (summed - by_hand).abs().mean() < 2e-3
    one = draw_with(bench.studio, port, erasures[:1], How.GATED)(shots[:1])
    assert torch.equal(one, bench.studio.draw(shots[:1], erasures[0])), "a gate that its own name opens"


def test_the_page(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit, match="bench -- effect --method none uce"):
        combine(bench, UCE)
    run(bench, UCE)
    combine(bench, UCE)
    page = Path("docs/results/combine.md").read_text(encoding="utf-8")
    both, single = page.split("## One erasure")
    assert all(f"| cat + rose | {method} |" in both for method in ("none", "uce", *(f"uce, {how}" for how in How)))
    assert all(f"| object (2) | {method} |" in single for method in ("none", "uce", "uce, gated"))
    found = json.loads(Path("docs/results/combine.json").read_text(encoding="utf-8"))["measured"]["rows"]
    assert len(found) == 6 + 5
    monkeypatch.setattr(module, "measure", lambda *_: pytest.fail("measured once"))
    combine(bench, UCE)
    assert Path("docs/results/combine.md").read_text(encoding="utf-8") == page
