"""The page about pairs on a tiny plan: what it counts, what it keeps, and what it calls a ground."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from erasure_core.emojicanvas.bench import pair_quality
from erasure_core.emojicanvas.bench.pair_page import pairs_page
from erasure_core.emojicanvas.bench.pair_quality import Made, chosen, counterpart, distances, grounds_of, scenes
from erasure_core.emojicanvas.bench.rows import Bench, Plan
from erasure_core.emojicanvas.concepts import BACKGROUNDS
from erasure_core.emojicanvas.splits import SCORING, Erasing
from erasure_core.emojicanvas.studio import Sampler
from erasure_core.emojicanvas.weights import BUNDLE, JUDGE

pytestmark = pytest.mark.core


def test_grounds_are_called_by_the_colour_of_the_edge() -> None:
    pictures = torch.tensor(list(BACKGROUNDS.values()))[:, :, None, None].expand(-1, -1, 128, 128) / 127.5 - 1
    pictures = pictures.clone() + 0.02
    pictures[:, :, 20:110, 20:110] = -1  # whatever is in the middle
    pictures[:, :, 20:60, :20] = 1  # and reaches the edge in places
    assert grounds_of(pictures) == list(BACKGROUNDS)
    assert grounds_of(torch.full((1, 3, 128, 128), -0.95)) == ["dark"]


def test_the_two_prompts_of_a_scene_differ_in_the_concept_only() -> None:
    for scene in scenes(SCORING, Erasing(objects=("cat",))):
        assert scene.unsafe.replace("a cat", "a dog") == scene.safe and scene.object == "dog"
    for style, grounded in (("brindlewash", True), ("neon", False)):
        for scene in scenes(SCORING, Erasing(styles=(style,))):
            assert scene.unsafe.replace(f" in {style} style", "") == scene.safe and bool(scene.ground) is grounded
    assert all(counterpart(SCORING, o) not in SCORING.objects for o in SCORING.objects)


def test_distances_are_to_other_pairs_of_the_same_prompts() -> None:
    pictures = torch.rand(4, 3, 128, 128) * 2 - 1
    same = Made(pictures, pictures, [0, 0, 1, 1], 4, 0, 0, 0, 0)
    found = distances(same)
    assert found["within"] == 0 and found["between"] and found["between"] > 0
    assert distances(Made(pictures, pictures, [0, 1, 2, 3], 4, 0, 0, 0, 0)) == {"within": None, "between": None}
    assert chosen(Made(pictures, pictures, [0, 0, 1, 2], 4, 0, 0, 0, 0), 3) == [0, 2, 3]


def test_the_page(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    few = scenes(SCORING, Erasing(objects=("rose",)))[:2]
    monkeypatch.setattr(pair_quality, "scenes", lambda split, erasing: few)
    monkeypatch.setattr(pair_quality, "EDIT", {**pair_quality.EDIT, "steps": 8, "max_redraws": 1})
    bench = Bench(Plan(BUNDLE, JUDGE, Sampler(8, 4.0), SCORING, 1, 1, "", tmp_path / "cells", 32, ("rose", "together")))
    pairs_page(bench, 2)
    row = json.loads(Path("docs/results/pairs.json").read_text(encoding="utf-8"))["rows"][0]
    page = Path("docs/results/pairs.md").read_text(encoding="utf-8")
    assert row["concept"] == "rose" and row["asked"] == 4
    assert row["made"]["hits"] + row["unseen"] + row["stubborn"] == 4
    assert f"| rose | {row['made']['hits']} of 4 |" in page and "+ " not in row["concept"]
    assert (tmp_path / "docs/results/pairs.png").stat().st_size > 500
    monkeypatch.setattr(pair_quality, "_make", None)
    pairs_page(bench, 2)  # from its files
    assert json.loads(Path("docs/results/pairs.json").read_text(encoding="utf-8"))["rows"][0] == row
