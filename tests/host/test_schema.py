"""Every node explains itself: category, description, a tooltip at each socket, a help page that the server hands out."""

from __future__ import annotations

import dataclasses
import re
from enum import StrEnum
from typing import Any

import pytest
from comfy_host import PACK, ComfyServer

from erasure_core import Family, MethodSpec, all_methods
from erasure_core.methods import settings_from
from erasure_core.presets import PRESETS

NODES = (
    "ErasureLoadDemo",
    "ErasureEraseConcept",
    "ErasureApply",
    "ErasureSave",
    "ErasureLoad",
    "ErasureMerge",
    "ErasureGate",
    "ErasureMineDarkEmbeddings",
    "ErasureSaveDarkEmbeddings",
    "ErasureLoadDarkEmbeddings",
    "ErasureMakeSDEditPair",
    "ErasureSavePairs",
    "ErasureLoadPairs",
    "ErasureJudgeCLIP",
    "ErasureJudgeExamples",
    "ErasureJudgeONNX",
    "ErasureJudgePictures",
    "ErasureLearnSafePromptMemory",
    "ErasureApplySafePromptMemory",
    "ErasureSavePromptMemory",
    "ErasureLoadPromptMemory",
    "ErasureAttack",
    "ErasureCompare",
    "ErasureReceipt",
    *(f"ErasureMethod{name.upper()}" for name in all_methods()),
)
"""Ids are in people's workflows: they are never renamed."""


@pytest.fixture(scope="module")
def ours(server: ComfyServer) -> dict[str, Any]:
    return {i: n for i, n in server.object_info().items() if n["python_module"] == f"custom_nodes.{PACK}"}


def inputs(node: dict[str, Any]) -> dict[str, Any]:
    return {name: socket for group in ("required", "optional") for name, socket in node["input"].get(group, {}).items()}


def test_all_ids_are_there(ours: dict[str, Any]) -> None:
    assert set(NODES) <= set(ours)


def test_every_node_explains_itself(ours: dict[str, Any]) -> None:
    for name, node in ours.items():
        assert node["category"].split("/")[0] == "Concept Erasure", name
        assert node["display_name"] and not re.match(r"Erasure\B", node["display_name"]), f"{name} shows its id"
        assert len(node["description"]) > 40, name
        for socket, (_, options, *_) in inputs(node).items():
            assert len(options["tooltip"]) > 15, f"{name}.{socket}"
        assert len(node["output_tooltips"] or ()) == len(node["output"]), name
        assert all(len(tip or "") > 10 for tip in node["output_tooltips"] or ()), name


def test_every_node_has_a_help_page(ours: dict[str, Any], server: ComfyServer) -> None:
    for name, node in ours.items():
        page = server.get(f"/extensions/{PACK}/docs/{name}.md")
        text = page.content.decode()
        assert text.startswith(f"# {node['display_name']}\n"), name
        if name.startswith("ErasureMethod"):
            undocumented = [s for s in inputs(node) if f"**{s}**" not in text]
            assert not undocumented, name


def test_every_method_says_where_it_comes_from(ours: dict[str, Any], server: ComfyServer) -> None:
    for name, spec in all_methods().items():
        page = server.get(f"/extensions/{PACK}/docs/ErasureMethod{name.upper()}.md").content.decode()
        number = re.search(r"\d{4}\.\d{5}", spec.paper)
        assert (number[0] if number else spec.paper) in page
        assert spec.paper in ours[f"ErasureMethod{name.upper()}"]["description"]


@pytest.mark.parametrize("spec", all_methods().values(), ids=lambda s: s.name)
def test_method_node_has_a_widget_for_each_setting(ours: dict[str, Any], spec: MethodSpec) -> None:
    sockets = inputs(ours[f"ErasureMethod{spec.name.upper()}"])
    fields = {f.name: f for f in dataclasses.fields(spec.settings)}
    assert list(sockets) == list(fields)
    for name, field in fields.items():
        kind, options, *_ = sockets[name]
        assert options["tooltip"] == field.metadata["help"]
        if isinstance(field.default, StrEnum):
            choices = kind if isinstance(kind, list) else options["options"]
            assert choices == [choice.value for choice in type(field.default)]
            assert options["default"] == field.default.value
        elif isinstance(field.default, bool):
            assert (kind, options["default"]) == ("BOOLEAN", field.default)
        elif isinstance(field.default, str):
            assert (kind, options["default"]) == ("STRING", field.default)
        else:
            assert kind == {int: "INT", float: "FLOAT"}[type(field.default)]
            assert (options["default"], options["min"], options["max"]) == (
                field.default,
                field.metadata["low"],
                field.metadata["high"],
            )


def test_erase_concept_takes_aids_last(ours: dict[str, Any]) -> None:
    """Sockets are kept by place in people's workflows: new ones come behind the others."""
    sockets = list(ours["ErasureEraseConcept"]["input"]["optional"].items())
    assert [(name, socket[0]) for name, socket in sockets[:5]] == [
        ("method", "ERASURE_METHOD"),
        ("vae", "VAE"),
        ("pairs", "CONCEPT_PAIRS"),
        ("dark", "DARK_EMBEDDINGS"),
        ("judge", "JUDGE"),
    ]


def test_seeds_stay_as_they_are(ours: dict[str, Any]) -> None:
    """The page would draw another after each run, and what took hours would be made anew."""
    seeds = [i["seed"][1] for i in map(inputs, ours.values()) if "seed" in i]
    assert len(seeds) > 10 and all(options["control_after_generate"] is False for options in seeds)


def test_presets_are_the_choices_of_quality(ours: dict[str, Any]) -> None:
    kind, options, *_ = inputs(ours["ErasureEraseConcept"])["quality"]
    assert (kind if isinstance(kind, list) else options["options"]) == list(PRESETS)
    assert all(f"{name}: {preset.summary}" in options["tooltip"] for name, preset in PRESETS.items())


def test_only_presets_that_draw_take_a_seed() -> None:
    for preset in PRESETS.values():
        method, settings = preset.on(Family("sdxl", 2048, 2, 3), 7)
        spec = all_methods()[method]
        assert settings_from(spec, settings) and (settings.get("seed") == 7) == spec.trains


def test_folders_are_known_to_the_server(server: ComfyServer) -> None:
    assert {"erasure", "loras", "erasure_pairs", "erasure_judges"} <= set(server.get("/models").json())
