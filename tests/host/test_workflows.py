"""Every graph of workflows/ fits the nodes there are, and runs to the end on the demo model."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import Any

import pytest
from comfy_host import PACK, ComfyServer
from graph_builder import READABLE, SCREEN, SUBGRAPH_IN, SUBGRAPH_OUT, TITLE, fits, has_control, input_specs
from graphs import levels, queued, quick, shipped, switched_on
from PIL import Image

from workflows import FOLDER, SHARED_FILE, WORKFLOWS, build, text

NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
ONLY_ON_THE_PAGE = ("Note", "MarkdownNote")
every = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def info(server: ComfyServer) -> dict[str, Any]:
    return server.object_info()


def test_there_are_all(info: dict[str, Any]) -> None:
    assert sorted(WORKFLOWS) == NAMES


@pytest.mark.skipif("COMFYUI_PATH" in os.environ, reason="another version's core nodes may have other widgets")
@every
def test_is_up_to_date(info: dict[str, Any], name: str) -> None:
    written = (FOLDER / f"{name}.json").read_text(encoding="utf-8")
    assert written == text(build(info)[name]), "a node has changed: run tools/pictures.py (or tools/workflows.py)"


@every
def test_types_and_widgets(info: dict[str, Any], name: str) -> None:
    graph = shipped(name)
    subgraphs = {level["id"] for level in levels(graph)}
    for level in levels(graph):
        for node in level["nodes"]:
            if node["type"] in ONLY_ON_THE_PAGE or node["type"] in subgraphs:
                continue
            assert node["type"] in info
            specs = input_specs(info[node["type"]])
            wanted = sum(1 + has_control(n, kind, options) for n, kind, options, widget in specs if widget)
            assert len(node["widgets_values"]) == wanted, node["type"]
            assert {i["name"]: i["type"] for i in node["inputs"]} == {n: kind for n, kind, *_ in specs}
            assert [o["type"] for o in node["outputs"]] == info[node["type"]]["output"]


@every
def test_links_fit(name: str) -> None:
    for level in levels(shipped(name)):
        nodes = {n["id"]: n for n in level["nodes"]}
        ends: dict[int, list[dict[str, Any]]] = {n: node["inputs"] for n, node in nodes.items()}
        starts: dict[int, list[dict[str, Any]]] = {n: node["outputs"] for n, node in nodes.items()}
        if "inputs" in level:
            starts[SUBGRAPH_IN], ends[SUBGRAPH_OUT] = level["inputs"], level["outputs"]
        parts = ("id", "origin_id", "origin_slot", "target_id", "target_slot", "type")
        seen = set()
        for link in level["links"]:
            number, origin, out, target, into, kind = [link[p] for p in parts] if isinstance(link, dict) else link
            seen.add(number)
            source, sink = starts[origin][out], ends[target][into]
            assert fits(source["type"], kind)
            assert fits(kind, sink["type"])
            assert number in (source.get("links") or source.get("linkIds"))
            assert number == sink.get("link") or number in sink.get("linkIds", [])
        assert seen == {i["link"] for n in nodes.values() for i in n["inputs"] if i["link"] is not None} | {
            k for o in level.get("outputs", []) for k in o["linkIds"]
        }


@every
def test_says_what_to_do(name: str) -> None:
    notes = [n["widgets_values"][0] for n in shipped(name)["nodes"] if n["type"] in ONLY_ON_THE_PAGE]
    assert len(notes) == 1
    for words in ("**Run**", "**Look at**"):
        assert words in notes[0]


@every
def test_opens_readably_on_a_small_screen(name: str) -> None:
    """The page fits all nodes, and ten units around, into three quarters of its window, unless the file has a view."""
    graph = shipped(name)
    boxes = []
    for node in graph["nodes"]:
        (x, y), (width, height) = node["pos"], node["size"]
        boxes.append((x, y - TITLE, x + width, y + height * (not node["flags"].get("collapsed"))))
    left, top = (min(box[i] for box in boxes) for i in (0, 1))
    right, bottom = (max(box[i] for box in boxes) for i in (2, 3))
    width, height = SCREEN
    view = graph["extra"].get("ds")
    if view is None:
        assert 0.75 * min(width / (right - left + 20), height / (bottom - top + 20)) >= READABLE
        return
    assert name != "erase_object", "the first one is to fit, whatever the screen"
    scale, (x, y) = view["scale"], view["offset"]
    assert scale >= READABLE
    assert (left + x) * scale >= 60 and (top + y) * scale >= 90, "nothing lies under the bars at the left and on top"
    note = boxes[next(n for n, node in enumerate(graph["nodes"]) if node["type"] in ONLY_ON_THE_PAGE)]
    assert (note[2] + x) * scale < width / 3 and (note[3] + y) * scale < height, "all of the note is seen"
    if name not in ("compare_methods", "red_team", "pairs_then_duo"):  # too large: they begin at their start
        assert (right + x) * scale <= width
        assert (bottom + y) * scale <= height + 40, "but for the last widgets"


@every
def test_has_a_thumbnail(name: str) -> None:
    path = FOLDER / f"{name}.jpg"
    with Image.open(path) as picture:
        assert picture.format == "JPEG"
        assert picture.width == picture.height >= 256
    assert path.stat().st_size < 300_000


def test_gallery_offers_them(server: ComfyServer) -> None:
    assert sorted(server.get("/api/workflow_templates").json()[PACK]) == NAMES
    for name in NAMES:
        assert server.get(f"/api/workflow_templates/{PACK}/{name}.json").json() == shipped(name)
        assert server.get(f"/api/workflow_templates/{PACK}/{name}.jpg").content[:2] == b"\xff\xd8"


@every
def test_runs(server: ComfyServer, info: dict[str, Any], name: str) -> None:
    prompt = queued(quick(shipped(name)), info)
    run = server.run(prompt, timeout=1800)
    previews = [i for i, node in prompt.items() if node["class_type"] == "PreviewImage"]
    assert previews
    for node in previews:
        pictures = [Image.open(io.BytesIO(png)) for png in server.images(run, node)]
        sheet = prompt[prompt[node]["inputs"]["images"][0]]["class_type"] in ("ErasureCompare", "ErasureReceipt")
        assert len(pictures) == (1 if sheet else 2)
        assert all(low < high for p in pictures for low, high in p.convert("RGB").getextrema())


def test_shared_file_gives_the_same_pictures(server: ComfyServer, info: dict[str, Any]) -> None:
    """Load Erasure and the stock LoRA loader do, from the saved file, what Erase Concept did."""
    graph = quick(shipped("load_shared_erasure"))
    server.run(queued(graph, info), timeout=1800)
    assert (Path(server.models) / "loras" / f"{SHARED_FILE}.safetensors").exists()
    prompt = queued(switched_on(graph), info)
    run = server.run(prompt, timeout=1800)
    made, loaded, stock = (
        [Image.open(io.BytesIO(png)).convert("RGB").tobytes() for png in server.images(run, node)]
        for node in sorted((i for i, n in prompt.items() if n["class_type"] == "PreviewImage"), key=int)
    )
    assert made == loaded
    assert made == stock
