"""Gate Erasures in a real ComfyUI."""

from __future__ import annotations

import re

import pytest
import torch
from api_graphs import Graph, latent, shown
from comfy_client import ExecutionFailed
from comfy_host import ComfyServer
from test_attack import attacking
from test_mine import mining
from test_receipt import REPORT, receipt
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


@pytest.mark.parametrize("asked", ["ErasureAttack", "ErasureMineDarkEmbeddings", "ErasureReceipt"])
def test_what_asks_other_prompts_refuses_a_gated_model(server: ComfyServer, asked: str) -> None:
    """They would be counted at the gate of the one prompt. Nodes in between don't hide it."""
    g = Graph()
    model, clip, made, node = gate(g, "a house")
    vae = [model[0], 2]
    behind = g.apply(node[0], made[0][1], 0.5)
    tested = {
        "ErasureAttack": lambda: attacking(g, behind, model, clip, vae, "synonyms", concept="rose"),
        "ErasureMineDarkEmbeddings": lambda: mining(g, behind, clip, vae, concept="rose"),
        "ErasureReceipt": lambda: receipt(g, made[0][1], judged=False, model=behind),
    }[asked]()
    g.show(tested[REPORT if asked == "ErasureReceipt" else 3])
    with pytest.raises(ExecutionFailed, match="model: Gate Erasures patched it for the prompt 'a house' alone"):
        server.run(g.api)
