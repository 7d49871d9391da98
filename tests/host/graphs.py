"""The shipped graphs as tests use them: read, made quick, and turned into what the server queues."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from comfy_cli.workflow_to_api import convert_ui_to_api
from graph_builder import BYPASS, has_control

from workflows import FOLDER

Json = dict[str, Any]
QUICK: dict[str, dict[str, Any]] = {
    "KSampler": {"steps": 2},
    "EmptyLatentImage": {"width": 128, "height": 128, "batch_size": 2},
    "ErasureMethodESD": {"iterations": 2, "sample_steps": 3},
    "ErasureMethodCPE": {"stages": 1, "iterations": 2, "attack_steps": 2},
    "ErasureMethodDUO": {"iterations": 2},
    "ErasureLearnSafePromptMemory": {"iterations": 2},
    "ErasureCompare": {"steps": 2, "seeds": 2},
    "ErasureAttack": {"steps": 2, "effort": 0.01, "pictures": 2},
    "ErasureReceipt": {"steps": 2, "pictures": 2},
    "ErasureMakeSDEditPair": {"count": 2},
    "ErasureMineDarkEmbeddings": {"count": 1, "steps": 3, "looks": 2},
}
"""Widgets that are set for a short run: two pictures of the demo model's size in 2 steps, trainings of 2 steps."""


def shipped(name: str) -> Json:
    graph: Json = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return graph


def levels(graph: Json) -> Iterator[Json]:
    """The graph and the subgraphs in it."""
    yield graph
    yield from graph.get("definitions", {}).get("subgraphs", [])


def _place(node: Json, widget: str) -> int:
    """Where the page keeps a widget's value. Behind a seed stands what happens to it after a run."""
    place = 0
    for entry in node["inputs"]:
        name = entry.get("widget", {}).get("name")
        if name == widget:
            return place
        if name is not None:
            place += 2 if has_control(name, entry["type"], {}) else 1
    raise KeyError(f"{node['type']} has no widget {widget!r}")


def quick(graph: Json) -> Json:
    graph = copy.deepcopy(graph)
    for level in levels(graph):
        for node in level["nodes"]:
            for name, value in QUICK.get(node["type"], {}).items():
                node["widgets_values"][_place(node, name)] = value
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
