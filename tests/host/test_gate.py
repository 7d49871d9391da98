"""Gate Erasures in a real ComfyUI."""

from __future__ import annotations

import re

import pytest
import torch
from api_graphs import Graph, latent, shown
from comfy_client import ExecutionFailed
from comfy_host import ComfyServer
from test_attack import attacking
from test_compare import comparing
from test_memory import MemoryGraph
from test_mine import mining
from test_receipt import REPORT, receipt
from test_sdedit import pair
from test_survives import of_sd15


def gate(g: Graph, prompt: str) -> tuple:
    model, clip, _ = g.demo()
    made = [g.erase(model, clip, word, keep="house", method=("uce", {})) for word in ("rose", "cat")]
    node = g.add("ErasureGate", model=model, clip=clip, prompt=prompt, erasure_1=made[0][1], erasure_2=made[1][1])
    return model, clip, made, node


def strengths(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"strength ([0-9.]+)", text)]


def test_the_prompt_opens_and_shuts_the_gate(server: ComfyServer) -> None:
    g = Graph()
    model, clip, made, named = gate(g, "a rose")
    other = g.add("ErasureGate", model=model, clip=clip, prompt="a house", erasure_1=made[0][1], erasure_2=made[1][1])
    said = [g.show(node[1]) for node in (named, other)]
    drawn = [g.latent(g.sample(m, clip, "a rose", steps=3)) for m in (named[0], made[0][0], model)]
    run = server.run(g.api)
    (rose, cat), (rose_off, cat_off) = (strengths(shown(run, node)) for node in said)
    assert rose == 1.0 and max(cat, rose_off, cat_off) < 0.3
    gated, whole, base = (latent(server, run, x) for x in drawn)
    assert torch.isfinite(gated).all()
    assert (gated - whole).norm() < (gated - base).norm(), "a prompt that names it gets the erasure"


def test_an_erasure_for_another_family_is_refused(server: ComfyServer) -> None:
    of_sd15(server.models / "erasure" / "gate-sd15.safetensors")
    g = Graph()
    model, clip, _ = g.demo()
    node = g.add(
        "ErasureGate", model=model, clip=clip, prompt="a cat", erasure_1=g.load("erasure/gate-sd15.safetensors")[0]
    )
    g.show(node[1])
    with pytest.raises(ExecutionFailed, match="it was made for sd15"):
        server.run(g.api)


ASKS = {
    "ErasureCompare": lambda g, model, _base, clip, vae, erasure: comparing(g, model, clip, vae, erasure)[1],
    "ErasureEraseConcept": lambda g, model, _base, clip, _vae, _: g.erase(model, clip, "rose", method=("uce", {}))[2],
    "ErasureLearnSafePromptMemory": lambda g, model, _base, clip, _vae, _: g.learn(model, clip)[3],
    "ErasureMakeSDEditPair": lambda g, model, _base, clip, vae, _: pair(g, [model, clip, vae])[3],
    "ErasureMineDarkEmbeddings": lambda g, model, _base, clip, vae, _: mining(g, model, clip, vae, concept="rose")[3],
    "ErasureReceipt": lambda g, model, _base, _clip, _vae, erasure: receipt(g, erasure, judged=False, model=model)[
        REPORT
    ],
}
"""A link to the report of each node that asks a MODEL other prompts than the user's, and can't ask each at its own gate."""


def test_an_attack_meets_the_gates_that_each_prompt_opens(server: ComfyServer) -> None:
    """Whatever prompt the MODEL was patched for, and if two nodes gate it."""
    runs = []
    for prompt in ("a house", "a rose"):
        g = Graph()
        model, clip, made, node = gate(g, prompt)
        vae, judge = [model[0], 2], [model[0], 3]
        attack = attacking(g, node[0], model, clip, vae, "synonyms", concept="rose", synonyms="house, cat", judge=judge)
        runs.append((g, attack))
    model, clip, made, _ = gate(g := Graph(), "a house")
    first = g.add("ErasureGate", model=model, clip=clip, prompt="a house", erasure_1=made[0][1])
    second = g.add("ErasureGate", model=first[0], clip=clip, prompt="a house", erasure_1=made[1][1])
    runs.append((g, attacking(g, second[0], model, clip, [model[0], 2], "synonyms", concept="rose", synonyms="house, cat",
        judge=[model[0], 3])))  # fmt: skip
    said = []
    for g, attack in runs:
        node = g.show(attack[3])
        said.append(re.sub(r"took .*", "", shown(server.run(g.api), node)))
    assert said[0] == said[1] == said[2]
    (line,) = (line for line in said[0].splitlines() if "gated" in line)
    rose, cat = map(float, re.findall(r"\d\.\d\d", line))
    assert rose == 1.0 and cat < 0.3 and "No record was made" in line


def test_a_merge_behind_the_gate_is_refused(server: ComfyServer) -> None:
    """It scales what the gate had put on."""
    g = Graph()
    model, clip, _made, node = gate(g, "a rose")
    merged = g.add("ModelMergeSimple", model1=node[0], model2=model, ratio=0.5)
    g.show(attacking(g, merged[0], model, clip, [model[0], 2], "synonyms", concept="rose")[3])
    with pytest.raises(ExecutionFailed, match="model: it was merged with another one behind Gate Erasures"):
        server.run(g.api)


@pytest.mark.parametrize("again", ["gate", "apply"])
def test_an_erasure_behind_its_own_gate_is_refused(server: ComfyServer, again: str) -> None:
    g = Graph()
    _model, clip, made, node = gate(g, "a house")
    if again == "gate":
        g.show(g.add("ErasureGate", model=node[0], clip=clip, prompt="a house", erasure_1=made[0][1])[1])
    else:
        g.latent(g.sample(g.apply(node[0], made[0][1], 0.5), clip, "a rose", steps=1))
    with pytest.raises(ExecutionFailed, match="model: it carries this erasure of rose already"):
        server.run(g.api)


def test_a_gated_base_model_is_refused(server: ComfyServer) -> None:
    g = Graph()
    model, clip, made, node = gate(g, "a house")
    g.show(attacking(g, made[0][0], node[0], clip, [model[0], 2], "synonyms", concept="rose")[3])
    with pytest.raises(ExecutionFailed, match="base_model: Gate Erasures patched it for the prompt 'a house' alone"):
        server.run(g.api)


@pytest.mark.parametrize("asked", list(ASKS))
def test_what_asks_other_prompts_refuses_a_gated_model(server: ComfyServer, asked: str) -> None:
    """They would be answered at the gate of the one prompt. Nodes in between don't hide it."""
    g = MemoryGraph()
    model, clip, made, node = gate(g, "a house")
    vae = [model[0], 2]
    behind = g.apply(node[0], g.erase(model, clip, "tulip", method=("uce", {}))[1], 0.5)
    g.show(ASKS[asked](g, behind, model, clip, vae, made[0][1]))
    with pytest.raises(ExecutionFailed, match="model: Gate Erasures patched it for the prompt 'a house' alone"):
        server.run(g.api)
