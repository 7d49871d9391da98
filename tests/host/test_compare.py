"""Compare Erasures in a real ComfyUI: its pictures are KSampler's, its sheet and table say what was drawn."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from api_graphs import Graph, Link, Node, picture, shown
from comfy_client import ComfyError, ExecutionInterrupted, PromptRejected
from comfy_host import ComfyServer

SHEET, REPORT = range(2)
STEPS, TILE = 3, 128
MARGIN, SIDE, GAP, CAPTION = 16, 120, 4, 18


def comparing(g: Graph, model: Link, clip: Link, vae: Link, *erasures: Link, **inputs: Any) -> Node:
    widgets = {
        "prompts": "a beer\na crown", "strengths": "1", "seeds": 2, "seed": 7, "steps": STEPS, "cfg": 4.0,
        "sampler_name": "euler", "scheduler": "normal", "width": 0, "height": 0, "tile": TILE, "labels": "", "concept": "",
    }  # fmt: skip
    named = {f"erasure_{i}": e for i, e in enumerate(erasures, 1)}
    return g.add("ErasureCompare", model=model, clip=clip, vae=vae, **named, **{**widgets, **inputs})


def saved(g: Graph, made: Node) -> Node:
    return g.add("SaveImage", images=made[SHEET], filename_prefix="compare")


def cell(sheet: torch.Tensor, row: int, column: int, rows: int, across: int, caption: int = 0) -> torch.Tensor:
    """[128, 128, 3], the first picture of a cell."""
    width, height = across * (TILE + GAP) - GAP, TILE + caption
    top = sheet.shape[0] - MARGIN - rows * (height + 2 * GAP)
    x, y = MARGIN + SIDE + column * (width + 2 * GAP), top + row * (height + 2 * GAP)
    return sheet[y : y + TILE, x : x + TILE]


def test_its_pictures_are_those_of_ksampler(server: ComfyServer) -> None:
    """The model as it is and the erased one, bit for bit, at the first seed and the second."""
    g = Graph()
    model, clip, vae = g.demo()
    erase = g.erase(model, clip, "beer", method=("uce", {}))
    sheet = saved(g, comparing(g, model, clip, vae, erase[1]))
    drawn = {
        (row, seed): g.image(vae, g.sample(m, clip, "a crown", seed=7 + seed, steps=STEPS))
        for row, m in enumerate((model, erase[0]))
        for seed in range(2)
    }
    run = server.run(g.api)
    whole = picture(server, run, sheet)
    for (row, seed), node in drawn.items():
        start = cell(whole, row, 1, rows=2, across=2)
        if seed:
            x = MARGIN + SIDE + (2 * (TILE + GAP) - GAP + 2 * GAP) + TILE + GAP
            top = whole.shape[0] - MARGIN - 2 * (TILE + 2 * GAP) + row * (TILE + 2 * GAP)
            start = whole[top : top + TILE, x : x + TILE]
        assert torch.equal(start, picture(server, run, node)), (row, seed)


def test_one_prompt_is_a_grid_of_erasures_and_strengths(server: ComfyServer) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    first, second = (g.erase(model, clip, "beer", method=(m, {}))[1] for m in ("uce", "rece"))
    made = comparing(
        g, model, clip, vae, first, second,
        prompts="a beer", strengths="0, 0.5, 1", seeds=1, labels="gentle\nfirm", judge=[model[0], 3], concept="beer",
    )  # fmt: skip
    sheet, said = saved(g, made), g.show(made[REPORT])
    plain = g.image(vae, g.sample(model, clip, "a beer", seed=7, steps=STEPS))
    run = server.run(g.api)
    whole, text = picture(server, run, sheet), shown(run, said)
    assert whole.shape[1] == 2 * MARGIN + SIDE + 3 * (TILE + 2 * GAP)
    cells = [[cell(whole, r, c, 2, 1, CAPTION) for c in range(3)] for r in range(2)]
    assert torch.equal(cells[0][0], picture(server, run, plain)) and torch.equal(cells[0][0], cells[1][0])
    different = [cells[0][1], cells[0][2], cells[1][1], cells[1][2], cells[0][0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows[2:]] == [
        ["as it is", "0"], ["gentle", "0.5"], ["gentle", "1"], ["firm", "0.5"], ["firm", "1"],
    ]  # fmt: skip
    assert "counted: beer, by emojicanvas-judge 2, threshold 0.5, knows cat, " in text
    assert "shares and intervals are after the judge's own error: it sees 97 %" in text
    assert not any("[21, 100]" in row[2] or "[0, 79]" in row[2] for row in rows[2:]), (
        "plain intervals of 1 of 1 and 0 of 1"
    )
    assert all(" of 1 (" in row[2] and "moved " in row[2] for row in rows[2:]) and "moved 0.0 %" in rows[2][2]
    ticks = [value for node, value, _ in run.progress if node == made]
    assert ticks == sorted(ticks) and ticks[-1] == 5 * STEPS, "the model as it is, once"
    assert len(run.previews) >= 5, "the sheet grows"


def test_labels_say_the_method_and_number_twins(server: ComfyServer) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    twins = [g.erase(model, clip, word, method=("uce", {}))[1] for word in ("beer", "bomb")]
    said = g.show(comparing(g, model, clip, vae, *twins, seeds=1)[REPORT])
    text = shown(server.run(g.api), said)
    assert "| UCE | 1 |" in text and "| UCE (2) | 1 |" in text
    assert "%" in text and " of 1 (" not in text, "no judge, no counts"


def test_cancel(server: ComfyServer) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    g.add("PreviewImage", images=comparing(g, model, clip, vae, steps=200, seeds=20, seed=99)[SHEET])

    def stop(event: dict) -> None:
        if event["type"] == "progress" and event["data"]["max"] == 8000 and event["data"]["value"] > 3:
            server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.run(g.api, on_event=stop)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"prompts": " "}, "prompts: write at least one"),
        ({"strengths": "strong"}, "strengths: 'strong' must be numbers by commas"),
        ({"strengths": "9"}, "strengths: at most 12 numbers from -2 to 3"),
        ({"strengths": "nan"}, "strengths: at most 12 numbers from -2 to 3"),
        ({"strengths": ""}, "strengths: write at least one number other than 0"),
        ({"strengths": "0, 0.0"}, "strengths: write at least one number other than 0"),
        ({"labels": "one\ntwo"}, r"labels: 2 for 1 erasures"),
        ({"judge": True}, r"concept: 0 lines for 2 prompts"),
        ({"judge": True, "concept": "unicorn"}, r"does not know 'unicorn'"),
        ({"sampler_name": "crayon"}, r"sampler_name: 'crayon' is not one|Value not in list"),
    ],
)
def test_what_can_not_work_is_said(server: ComfyServer, inputs: dict[str, Any], message: str) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    inputs = dict(inputs)
    if inputs.pop("judge", False):
        inputs["judge"] = [model[0], 3]
    erasure = g.erase(model, clip, "beer", method=("uce", {}))[1]
    g.add("PreviewImage", images=comparing(g, model, clip, vae, erasure, **inputs)[SHEET])
    with pytest.raises((ComfyError, PromptRejected), match=message):
        server.run(g.api)
