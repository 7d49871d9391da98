"""What Load nodes list, and what they say where nothing is there."""

from __future__ import annotations

import json
import os
import struct
import unicodedata
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from api_graphs import DIFFUSERS, Graph, shown
from comfy_client import ExecutionFailed, PromptRejected
from comfy_host import PACK, ComfyServer
from safetensors import safe_open
from safetensors.torch import save_file

from erasure_core import ConceptSpec, Delta, Erasure, Family, Header, load, save
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


def an_erasure(path: Path, word: str = "cat", family: Family = FAMILY) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = Header("uce", {}, ConceptSpec.parse(word), family, "0" * 16, "1")
    site = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
    return save(Erasure(header, {site: Delta(torch.ones(8, 1), torch.ones(1, 128))}), path)


def loaded(server: ComfyServer, file: Any) -> str:
    """What Load Erasure says of a file, or why it doesn't load it."""
    g = Graph()
    node = g.show(g.add("ErasureLoad", file=file)[1])
    try:
        return shown(server.run(g.api), node)
    except PromptRejected as refused:
        return str(refused)
    except ExecutionFailed as failed:
        return failed.message


@pytest.mark.parametrize(
    "file",
    [
        "loras/Über mir/A b.safetensors",
        "loras/Über mir\\A b.safetensors",
        "loras\\Über mir\\A b.safetensors",
        "loras/über MIR/a B.safetensors",
        unicodedata.normalize("NFD", "loras/Über mir/A b.safetensors"),
        "erasure/A b.safetensors",
        "loras/A b.safetensors",
        "loras/elsewhere\\a b.safetensors",
        "A b.safetensors",
    ],
    ids=ascii,
)
def test_workflows_of_other_machines_find_their_files(server: ComfyServer, file: str) -> None:
    """Saved on Windows, unpacked on a Mac, or put into another folder here."""
    an_erasure(server.models / "loras" / "Über mir" / "A b.safetensors", "walrus")
    assert loaded(server, file).startswith("suppressed: walrus")


def test_the_nearest_name_is_meant_and_several_are_named(server: ComfyServer) -> None:
    for folder, word in (("loras/one", "lion"), ("loras/two", "wolf"), ("erasure", "bear")):
        an_erasure(server.models / folder / "same.safetensors", word)
    save_file({"x": torch.ones(1)}, server.models / "loras" / "three.safetensors")
    an_erasure(server.models / "erasure" / "three.safetensors", "seal")
    assert loaded(server, "loras/two\\same.safetensors").startswith("suppressed: wolf")
    assert loaded(server, "erasure/same.safetensors").startswith("suppressed: bear")
    assert (
        "file: 'loras/nine/same.safetensors' could be erasure/same.safetensors or loras/one/same.safetensors or "
        "loras/two/same.safetensors. Choose one of them from the list"
    ) in loaded(server, "loras/nine/same.safetensors")
    assert loaded(server, "loras/sub/three.safetensors").startswith("suppressed: seal"), "the other one is a LoRA"


def test_words_that_the_text_encoder_may_not_know(server: ComfyServer) -> None:
    """Reports claim nothing of them, neither of what was made here nor of what comes from a file."""
    perhaps, path = "(if the text encoder knows it)", server.models / "loras" / "foreign-words.safetensors"
    an_erasure(path, "cat, walrus")
    assert loaded(server, "loras/foreign-words.safetensors").startswith(f"suppressed: cat, walrus {perhaps}\n")
    an_erasure(path, "cat, walrus, котик, gigarete", Family("sd15", 768, 16, 3))
    said = f"suppressed: cat, walrus, котик {perhaps}, gigarete {perhaps}\n"
    assert loaded(server, "loras/foreign-words.safetensors").startswith(said)
    g = Graph()
    model, clip, _ = g.demo()
    erased = [g.erase(model, clip, word) for word in ("cat, walrus", "bomb")]
    merged = g.add("ErasureMerge", model=model, clip=clip, erasure_1=erased[0][1], erasure_2=erased[1][1])
    reports = [g.show(link) for link in (erased[0][2], erased[1][2], merged[2])]
    run = server.run(g.api)
    first, second, both = (shown(run, node) for node in reports)
    assert first.startswith(f"suppressed: cat, walrus {perhaps}\n") and "never learned 'walrus'" in first
    assert second.startswith("suppressed: bomb\n") and "note:" not in second
    assert both.startswith(f"suppressed: cat, walrus {perhaps}; bomb\n")


def test_a_linked_name_has_a_fingerprint(server: ComfyServer) -> None:
    an_erasure(server.models / "loras" / "linked.safetensors", "otter")
    g = Graph()
    said = g.show(g.add("ErasureLoad", file=g.add("ProbeChoice", value="loras/linked.safetensors")[0])[1])
    assert shown(server.run(g.api), said).startswith("suppressed: otter")
    assert "NoneType" not in server.log_tail()


def test_endings_in_capitals_newer_and_broken_files_are_listed(server: ComfyServer) -> None:
    loras, own = server.models / "loras", server.models / "erasure"
    an_erasure(loras / "loud.SAFETENSORS")
    newer = an_erasure(loras / "newer.safetensors")
    with safe_open(newer, framework="pt") as f:
        raw = json.loads(f.metadata()["erasure"])
    save_file({"x": torch.ones(1)}, newer, {"erasure": json.dumps(raw | {"format": 9})})
    whole = an_erasure(loras / "whole.safetensors").read_bytes()
    for folder in (loras, own):
        (folder / "short.safetensors").write_bytes(whole[:-20])
    (loras / "foreign.safetensors").write_bytes(struct.pack("<Q", 2) + b"{}")
    files = listed(server, "ErasureLoad")
    assert {"loras/loud.SAFETENSORS", "loras/newer.safetensors", "erasure/short.safetensors"} <= set(files)
    assert not {"loras/foreign.safetensors", "loras/short.safetensors"} & set(files)
    assert "format 9 is not 1. Update Concept Erasure" in loaded(server, "loras/newer.safetensors")
    assert "short.safetensors: " in (said := loaded(server, "erasure/short.safetensors")) and "again" in said
    assert "erasure/short.safetensors" in listed(server, "ErasureLoadPromptMemory"), "who knows what it was"


def test_load_says_whether_it_fits_the_model_and_merge_whether_the_bases_differ(server: ComfyServer) -> None:
    """Without any receipt."""
    g = Graph()
    model, clip, _ = g.demo()
    for word in ("cat", "dog"):
        g.save(g.erase(model, clip, word)[1], f"of-{word}")
    server.run(g.api)
    folder = server.models / "loras"
    elsewhere = replace(load(folder / "of-dog.safetensors"), receipt=None)
    save(replace(elsewhere, header=replace(elsewhere.header, base="5" * 16)), folder / "of-dog.safetensors")
    an_erasure(folder / "of-fish.safetensors")
    g = Graph()
    model, clip, _ = g.demo()
    read = {x: g.add("ErasureLoad", file=f"loras/of-{x}.safetensors", model=model) for x in ("cat", "dog", "fish")}
    said = {x: g.show(node[1]) for x, node in read.items()}
    merged = g.merge(model, clip, read["cat"][0], read["dog"][0])
    told = g.show(merged[2])
    run = server.run(g.api)
    assert "model: the one that it was made on, or a finetune of that one" in shown(run, said["cat"])
    assert "WARNING: this model is of the right family, but neither" in shown(run, said["dog"])
    assert "WARNING: this model can't use it. erasure: it was made for" in shown(run, said["fish"])
    assert "WARNING: erasure_2: made on another base model than erasure_1" in shown(run, told)
    g = Graph()
    model, clip, _ = g.demo()
    cats = [g.erase(model, clip, word)[1] for word in ("cat", "bird")]
    told = g.show(g.merge(model, clip, *cats)[2])
    assert "WARNING" not in shown(server.run(g.api), told)
    searched = g.erase(model, clip, "fish", method=("rece", {}))[1]
    told = g.show(g.merge(model, clip, cats[0], searched)[2])
    assert "WARNING: erasure_2: made to hold against more than words" in shown(server.run(g.api), told)


def test_a_save_says_where_the_file_really_is(tmp_path: Path) -> None:
    """extra_model_paths.yaml may put the first loras folder outside of models."""
    config = tmp_path / "paths.yaml"
    config.write_text(f"elsewhere:\n  base_path: {tmp_path}\n  is_default: true\n  loras: far\n")
    with ComfyServer(args=["--whitelist-custom-nodes", PACK, "--extra-model-paths-config", str(config)]) as server:
        texts = []
        for folder in ("loras", "erasure"):
            g = Graph()
            model, clip, _ = g.demo()
            saved = g.save(g.erase(model, clip, "cat")[1], "where", folder=folder, layout=DIFFUSERS)
            texts.append(shown(server.run(g.api), saved))
    assert f"saved {tmp_path / 'far' / 'where.safetensors'} (" in texts[0]
    assert "saved models/erasure/where.safetensors (" in texts[1]
