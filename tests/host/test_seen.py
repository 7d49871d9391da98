"""What a person sees: every graph opens from Browse Templates and runs on the page, every node's help can be read.

With `SCREENSHOTS=folder` the pictures are kept there.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from browser import Browser
from canvas import boxes, open_gallery, open_template, overlap, shown_images
from comfy_host import PACK, REPO, ComfyServer
from graphs import queued, quick, shipped

from workflows import DEMOS, WORKFLOWS

NAMES = sorted(WORKFLOWS)
OURS = sorted(path.stem for path in (REPO / "web" / "docs").glob("*.md"))


@pytest.fixture
def shots(tmp_path: Path) -> Path:
    return Path(os.environ.get("SCREENSHOTS", tmp_path))


@pytest.fixture
def gallery(browser: Browser) -> Iterator[dict[str, bool]]:
    """Browse Templates, open."""
    yield open_gallery(browser, PACK)
    browser.open()


def test_gallery_shows_them(browser: Browser, gallery: dict[str, bool], shots: Path) -> None:
    browser.screenshot(shots / "gallery.png")
    assert gallery == dict.fromkeys(NAMES, True), "False: a thumbnail does not show"


@pytest.mark.parametrize("name", NAMES)
def test_opens_from_the_gallery(browser: Browser, gallery: dict[str, bool], shots: Path, name: str) -> None:
    open_template(browser, name)
    assert browser.missing_nodes() == []
    if name in DEMOS:
        assert browser.alerts == []
    else:  # the page offers to download the checkpoint
        assert all(alert.startswith("Missing Models") for alert in browser.alerts)
    placed = boxes(browser)
    assert len(placed) == len(shipped(name)["nodes"])
    on_each_other = [(a, b) for (a, p), (b, q) in itertools.combinations(placed.items(), 2) if overlap(p, q)]
    assert on_each_other == []
    assert not browser.driver.execute_script("return app.canvas.low_quality"), "so small that the page writes no text"
    browser.screenshot(shots / f"opened_{name}.png")


@pytest.mark.parametrize("name", DEMOS)
def test_runs_on_the_page(browser: Browser, server: ComfyServer, shots: Path, name: str) -> None:
    graph = quick(shipped(name))
    browser.load(graph)
    assert inputs(browser.api_prompt()) == inputs(queued(graph, server.object_info()))
    browser.queue(timeout=1800)
    previews = [n["id"] for n in graph["nodes"] if n["type"] == "PreviewImage"]
    assert browser._wait(lambda: all(shown_images(browser).values()), "pictures do not show", 60)
    assert sorted(shown_images(browser)) == sorted(previews)
    placed = boxes(browser)  # nodes grow when they get pictures
    assert [(a, b) for (a, p), (b, q) in itertools.combinations(placed.items(), 2) if overlap(p, q)] == []
    browser.fit()
    browser.screenshot(shots / f"ran_{name}.png")


def inputs(prompt: dict[str, Any]) -> dict[str, Any]:
    """What is computed; the page also sends the text that a Preview Any shows."""
    return {i: (n["class_type"], {k: v for k, v in n["inputs"].items() if k != "preview"}) for i, n in prompt.items()}


@pytest.mark.parametrize("node", OURS)
def test_help_can_be_read(browser: Browser, shots: Path, node: str) -> None:
    empty: dict[str, Any] = {"id": 1, "type": node, "pos": [300, 200], "size": [320, 200], "flags": {}, "order": 0}
    empty |= {"mode": 0, "properties": {}, "inputs": [], "outputs": []}
    browser.load({"last_node_id": 1, "last_link_id": 0, "nodes": [empty], "links": [], "version": 0.4})
    assert browser.missing_nodes() == []
    page = (REPO / "web" / "docs" / f"{node}.md").read_text(encoding="utf-8")
    title = page.splitlines()[0].removeprefix("# ")
    # A sentence from its middle: the page says the title on its own, also where it found no help.
    plain = re.sub(r"[*`#\[\]]|\(http[^)]*\)", "", page)
    words = next(line for line in plain.splitlines()[1:] if len(line.split()) > 6).split()[:6]
    said = browser.open_help(node)
    browser.screenshot(shots / f"help_{node}.png")
    assert title in said
    assert " ".join(words) in " ".join(said.split())
