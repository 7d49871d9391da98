"""The page opens, loads a graph, runs it, and shows help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from browser import Browser, PageError
from comfy_client import ComfyClient


def stock_graph(width: int = 96) -> dict[str, Any]:
    """Empty Image into Save Image, in interface format."""
    common: dict[str, Any] = {"flags": {}, "mode": 0, "properties": {}}
    empty = common | {
        "id": 1,
        "type": "EmptyImage",
        "order": 0,
        "pos": [100, 100],
        "size": [270, 130],
        "outputs": [{"name": "IMAGE", "type": "IMAGE", "links": [1]}],
        "widgets_values": [width, 64, 1, 0x3366CC],
    }
    save = common | {
        "id": 2,
        "type": "SaveImage",
        "order": 1,
        "pos": [450, 100],
        "size": [270, 270],
        "inputs": [{"name": "images", "type": "IMAGE", "link": 1}],
        "widgets_values": ["page"],
    }
    link = [1, 1, 0, 2, 0, "IMAGE"]
    return {"last_node_id": 2, "last_link_id": 1, "nodes": [empty, save], "links": [link], "version": 0.4}


def test_runs_a_graph(browser: Browser, client: ComfyClient, tmp_path: Path) -> None:
    browser.load(stock_graph())
    assert browser.alerts == []
    assert browser.missing_nodes() == []
    assert browser.api_prompt()["1"]["inputs"]["color"] == 0x3366CC
    prompt_id = browser.queue()
    assert client.history(prompt_id)[prompt_id]["outputs"]["2"]["images"]
    assert browser.screenshot(tmp_path / "graph.png").stat().st_size > 10_000


def test_names_missing_nodes(browser: Browser) -> None:
    graph = stock_graph()
    graph["nodes"][0]["type"] = "NoSuchNode"
    browser.load(graph)
    assert browser.missing_nodes() == ["NoSuchNode"]
    assert "NoSuchNode" in browser.alerts[0]


def test_rejected_graph_raises(browser: Browser) -> None:
    graph = stock_graph()
    graph["links"] = []
    graph["nodes"][1]["inputs"][0]["link"] = None
    browser.load(graph)
    with pytest.raises(PageError, match="rejected"):
        browser.queue()
    browser.dismiss()


def test_help_panel(browser: Browser, tmp_path: Path) -> None:
    browser.load(stock_graph())
    assert "image" in browser.open_help("SaveImage").lower()
    browser.screenshot(tmp_path / "help.png")
