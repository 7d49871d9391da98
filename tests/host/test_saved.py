"""What Load nodes list, and what they say where nothing is there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from api_graphs import Graph
from comfy_client import ExecutionFailed, PromptRejected
from comfy_host import ComfyServer
from safetensors import safe_open
from safetensors.torch import save_file

from erasure_core import ConceptSpec, Family, Header
from erasure_core.dark import DarkEmbeddings, save_dark
from erasure_core.operators.memory import Mode, Placement, SavedMemory, save_memory
from erasure_core.pair_files import save_pairs
from erasure_core.pairs import ConceptPairs

FAMILY = Family("emojicanvas", 128, 2, 3)
LOADERS = {
    "ErasureLoad": ("erasure", "Save Erasure", "models/loras or models/erasure"),
    "ErasureLoadPromptMemory": ("prompt memory", "Save Prompt Memory", "models/erasure"),
    "ErasureLoadDarkEmbeddings": ("dark embeddings", "Save Dark Embeddings", "models/erasure"),
    "ErasureLoadPairs": ("pairs", "Save Concept Pairs", "models/erasure_pairs"),
}


def listed(server: ComfyServer, node: str) -> list[str]:
    """Of a Load node's list, newest first."""
    kind, options, *_ = server.object_info()[node]["input"]["required"]["file"]
    found: list[str] = options["options"] if kind == "COMBO" else kind
    return found


@pytest.mark.parametrize("node", LOADERS)
def test_nothing_saved_says_how_to_save(server: ComfyServer, node: str) -> None:
    what, saver, places = LOADERS[node]
    g = Graph()
    clip: dict[str, Any] = {"clip": g.demo()[1]} if node == "ErasureLoadDarkEmbeddings" else {}
    for file, sentence in (
        (f"(no {what} saved yet)", f"file: nothing is saved yet in {places}. Run {saver}, then press R"),
        (
            "none.safetensors",
            f"file: 'none.safetensors' is not in {places}. Put it there and press R, or choose another from the list",
        ),
    ):
        again = Graph()
        again.api |= g.api
        loaded = again.add(node, file=file, **clip)
        again.show(loaded[len(clip) + 1])
        with pytest.raises(PromptRejected) as refused:
            server.run(again.api)
        assert sentence in str(refused.value)


def test_each_node_lists_its_own_kind_by_headers_alone(server: ComfyServer) -> None:
    """A file whose tensors are broken is in the list: loading it says what is wrong with it."""
    erasure, pairs = (server.models / name for name in ("erasure", "erasure_pairs"))
    pairs.mkdir(exist_ok=True)
    header = Header("suppress", {}, ConceptSpec.parse("cat"), FAMILY, "0" * 16, "1")
    rows = torch.ones(2, 128)
    memory = save_memory(
        SavedMemory(header, Mode.SUPPRESS, Placement.ALL, 77, rows, rows), erasure / "rows.safetensors"
    )
    with safe_open(memory, framework="pt") as f:
        metadata = f.metadata()
    save_file({"key": rows * torch.nan, "value": rows}, memory, metadata)
    dark = save_dark(DarkEmbeddings(header, torch.ones(1, 77, 128), (0.5,)), erasure / "found.safetensors")
    latents = torch.zeros(1, 4, 16, 16)
    save_pairs(ConceptPairs(latents, latents, (("a cat", "a dog"),), FAMILY), pairs / "shown.safetensors")
    for n, file in enumerate((memory, dark)):
        os.utime(file, (2e9 + n, 2e9 + n))
    everything = {node: listed(server, node) for node in LOADERS}
    assert everything["ErasureLoadPromptMemory"][0] == "erasure/rows.safetensors"
    assert everything["ErasureLoadDarkEmbeddings"][0] == "erasure/found.safetensors"
    assert "shown.safetensors" in everything["ErasureLoadPairs"]
    for node, files in everything.items():
        assert ("erasure/rows.safetensors" in files) == (node == "ErasureLoadPromptMemory")
        assert ("erasure/found.safetensors" in files) == (node == "ErasureLoadDarkEmbeddings")
    g = Graph()
    g.show(g.add("ErasureLoadPromptMemory", file="erasure/rows.safetensors")[1])
    with pytest.raises(ExecutionFailed, match="contains values that are not numbers"):
        server.run(g.api)
