"""The shipped graphs as tests use them: read, made quick, and turned into what the server queues."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from comfy_cli.workflow_to_api import convert_ui_to_api
from graph_builder import BYPASS

from workflows import FOLDER

Json = dict[str, Any]
QUICK = {"KSampler": {2: 2}, "EmptyLatentImage": {0: 128, 1: 128, 2: 2}}
"""Widgets (by place) that are set for a short run: 2 steps, two pictures of the demo model's size."""


def shipped(name: str) -> Json:
    graph: Json = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return graph


def levels(graph: Json) -> Iterator[Json]:
    """The graph and the subgraphs in it."""
    yield graph
    yield from graph.get("definitions", {}).get("subgraphs", [])


def quick(graph: Json) -> Json:
    graph = copy.deepcopy(graph)
    for level in levels(graph):
        for node in level["nodes"]:
            for place, value in QUICK.get(node["type"], {}).items():
                node["widgets_values"][place] = value
    return graph


def switched_on(graph: Json) -> Json:
    """With no node bypassed."""
    graph = copy.deepcopy(graph)
    for node in graph["nodes"]:
        node["mode"] = 0 if node["mode"] == BYPASS else node["mode"]
    return graph


def queued(graph: Json, info: Json) -> Json:
    """In API format, as `comfy run` makes it; the demo model stands in for a checkpoint that is not here."""
    prompt: Json = convert_ui_to_api(graph, info)
    for node in prompt.values():
        if node["class_type"] == "CheckpointLoaderSimple":
            node |= {"class_type": "ErasureLoadDemo", "inputs": {}}
    return prompt
