"""Methods that train, from the node: what they run on, what people see meanwhile, what is left behind."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from api_graphs import Graph, Node, cut_off, latent, report, shown
from comfy_client import ExecutionFailed, ExecutionInterrupted, Run
from comfy_host import ComfyServer
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure_core import Erasure, all_methods, load
from erasure_core.names import to_kohya

TRAINED = [spec.name for spec in all_methods().values() if spec.trains and not spec.needs_pairs]
SMALL = {
    "iterations": 2, "sample_steps": 3, "pictures": 2, "rounds": 1, "mine_steps": 2, "looks": 1, "nearest": 4, "warmup": 1,
    "anchors": 1, "attack_steps": 2, "stages": 2, "adversaries": 2,
}  # fmt: skip
"""A run of seconds; each method takes what it has of these."""
VISIBLE = ("esd", {"iterations": 3, "sample_steps": 3, "layers": "all", "learning_rate": 1e-3, "energy": 1.0})
"""A short training whose change shows in a picture."""


def small(name: str, **changed: Any) -> tuple[str, dict[str, Any]]:
    known = {f.name for f in dataclasses.fields(all_methods()[name].settings)}
    return name, {k: v for k, v in SMALL.items() if k in known} | changed


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max()) + 1e-7


def checksum(server: ComfyServer) -> str:
    """Of the base model's weights in memory."""
    g = Graph()
    node = g.checksum(g.again(g.demo()[0]))
    state: str = report(server.run(g.api), node)["sha256"]
    return state


def saved(server: ComfyServer, name: str) -> Erasure:
    return load(server.models / "loras" / f"{name}.safetensors")


# What it runs on


@pytest.mark.parametrize("kind", ["plain", "with a LoRA", "XL", "float16", "bfloat16", "float8_e4m3fn"])
def test_replica_is_the_live_network(server: ComfyServer, kind: str) -> None:
    """Bit for bit where both attend with PyTorch's attention; whatever the weights are stored in."""
    g = Graph()
    model, clip, _ = g.demo()
    if kind == "with a LoRA":
        user_lora(server)
        model = g.lora(model, "user-trained.safetensors", 0.8)
    elif kind == "XL":
        model = g.add("ProbeTinyXL")[0]
    elif kind != "plain":
        model = g.add("ProbeStored", type=kind)[0]
    node = g.add("ProbeReplica", model=model, clip=clip)
    seen = report(server.run(g.api), node)
    assert seen["equal"] and seen["stock"] < 1e-4
    assert len(seen["beside"]) == (kind == "XL") and all(off < 1e-4 for off in seen["beside"])
    assert seen["gradients"] and seen["inference"] == 0
    assert seen["untouched"] and seen["freed"]
    assert 0 < seen["bytes"]["checkpointed"] < seen["bytes"]["plain"] / 2 and seen["bytes"]["weights"] > 1e7
    assert seen["bytes"]["ten latents"] == 10 * 4 * 16 * 16 * 4
    assert seen["kept"] <= seen["bytes"]["plain"] < 1.03 * seen["kept"], (
        "the estimate is what a pass keeps, and no less"
    )
    held, told = seen["drawn"]
    assert 0.9 * held < told < 1.15 * held, "and so is that of a pass without gradients"
    assert seen["rows"] == 16
    assert seen["room"] == [1, 0], "a text encoder that had to be loaded is taken off while the network is there"
    assert seen["fits"] == {"ample": [False, 16], "short": [False, 3], "shorter": [True, 3]}, (
        "short: fewer rows at a time"
    )
    assert seen["with matrices"] > 1.05 * seen["kept"], "where PyTorch attends by the plain formula"
    assert seen["in pieces"] == [True, False]
    assert seen["refused"].startswith(f"model: training on it here takes about {1.35 * (1 << 50) / 1e9:.1f} GB")
    assert "GB of cpu memory are free. Lower the batch" in seen["refused"]


@pytest.mark.parametrize("family", ["demo", "sd20", "sdxl"])
def test_a_prompt_is_encoded_once(server: ComfyServer, family: str) -> None:
    """Its states and its pooled text come of one pass, in batches too."""
    g = Graph()
    inputs = {"clip": g.demo()[1], "model": g.add("ProbeTinyXL")[0]}
    if family != "demo":
        inputs = {"clip": g.add("ProbeTinyClip", family=family)[0]}
    node = g.add("ProbeConditions", **inputs)
    seen = report(server.run(g.api), node)
    assert seen["sections"] == seen["wanted"] == 5 and seen["off"] < 1e-4
    assert seen["with a model"] == (5 if family == "demo" else 0)


def user_lora(server: ComfyServer) -> None:
    """A LoRA on all layers that training could change."""
    from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort
    from erasure_core.operators.trainable import linear_sites

    core, generator = EmojiCanvas.load(), torch.Generator().manual_seed(5)
    tensors = {}
    for site in linear_sites(core.unet):
        name = to_kohya(site.name, EmojiCanvasPort(core).family)
        tensors[f"{name}.lora_up.weight"] = torch.randn(site.d_out, 3, generator=generator) * 0.02
        tensors[f"{name}.lora_down.weight"] = torch.randn(3, site.d_in, generator=generator) * 0.2
        tensors[f"{name}.alpha"] = torch.tensor(1.5)
    save_file(tensors, server.models / "loras" / "user-trained.safetensors")


def test_lora_before(server: ComfyServer) -> None:
    """The training starts from the weights with the LoRA in them: it is another training."""
    user_lora(server)
    g = Graph()
    model, clip, _ = g.demo()
    for name, start in (("from-base", model), ("from-lora", g.lora(model, "user-trained.safetensors"))):
        g.save(g.erase(start, clip, "cat", keep="dog", method=VISIBLE)[1], name)
    server.run(g.api)
    base, lora = saved(server, "from-base"), saved(server, "from-lora")
    assert base.header.base != lora.header.base
    assert base.deltas.keys() == lora.deltas.keys()
    assert not any(torch.equal(d.dense(), lora.deltas[n].dense()) for n, d in base.deltas.items())


@pytest.mark.parametrize("method", ["esd", "dark_miner"])
def test_other_architectures_are_refused(server: ComfyServer, method: str) -> None:
    g = Graph()
    _, clip, _ = g.demo()
    g.show(g.erase(g.add("ProbeFluxModel")[0], clip, "cat", method=small(method))[2])
    with pytest.raises(ExecutionFailed) as caught:
        server.run(g.api)
    assert caught.value.message.startswith("model: flux has no ")
    assert caught.value.message.endswith("It works on SD 1.x, SD 2.x and SDXL checkpoints")


# What it does


@pytest.mark.parametrize("name", TRAINED)
def test_every_method_runs_from_its_node(server: ComfyServer, name: str) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    erased = g.erase(model, clip, "cat, kitty", replace_with="", keep="dog", method=small(name), vae=vae)
    g.save(erased[1], f"trained-{name}")
    said = g.show(erased[2])
    run = server.run(g.api)
    text = shown(run, said)
    assert text.startswith("suppressed: cat, kitty; kept: dog\n") and re.search(r"\ntrained in \d+:\d\d", text)
    assert re.search(r"\ntraining takes about \d+\.\d GB of cpu memory, by estimate", text)
    made = saved(server, f"trained-{name}")
    assert made.header.method == name and made.deltas
    assert any(d.dense().any() for d in made.deltas.values())


def test_models_that_read_more_than_text(server: ComfyServer) -> None:
    """Pooled text and sizes, as in SDXL, and a network that predicts v."""
    g = Graph()
    _, clip, _ = g.demo()
    erased = g.erase(g.add("ProbeTinyXL")[0], clip, "cat", keep="dog", method=small("spm"))
    g.save(erased[1], "trained-xl")
    server.run(g.api)
    assert any(d.dense().any() for d in saved(server, "trained-xl").deltas.values())


def test_a_training_from_start_to_end(server: ComfyServer) -> None:
    """The picture changes, strength 0 is the base, the same seed gives the same, the base model is as it was."""
    before = checksum(server)
    g = Graph()
    model, clip, _ = g.demo()
    erased = [g.erase(g.again(model), clip, "cat", keep="dog", method=VISIBLE) for _ in range(2)]
    drawn = {
        "base": g.latent(g.sample(model, clip)),
        "off": g.latent(g.sample(g.apply(model, erased[0][1], 0.0), clip)),
        "on": g.latent(g.sample(erased[0][0], clip)),
        "again": g.latent(g.sample(g.apply(model, erased[1][1]), clip)),
    }
    other = g.erase(model, clip, "cat", keep="dog", method=("esd", VISIBLE[1] | {"seed": 1}))
    drawn["other seed"] = g.latent(g.sample(other[0], clip))
    run = server.run(g.api)
    seen = {name: latent(server, run, node) for name, node in drawn.items()}
    assert torch.equal(seen["off"], seen["base"])
    assert torch.equal(seen["on"], seen["again"])
    assert not close(seen["on"], seen["base"], 1e-3)
    assert not torch.equal(seen["other seed"], seen["on"])
    assert checksum(server) == before


def test_files_of_all_layers_in_the_stock_lora_node(server: ComfyServer) -> None:
    """Saved as LoRA and as full delta, loaded by the stock node, by ours, and merged with a closed-form one."""
    g = Graph()
    model, clip, _ = g.demo()
    erased = g.erase(model, clip, "cat", keep="dog", method=VISIBLE)
    rank = g.erase(model, clip, "cat", keep="dog", method=("esd", VISIBLE[1] | {"rank": 4}))
    g.save(erased[1], "all-layers-full", layout="full delta (large)")
    g.save(rank[1], "all-layers-rank")
    drawn = {name: g.latent(g.sample(node[0], clip)) for name, node in (("full", erased), ("rank", rank))}
    merged = g.merge(model, clip, rank[1], g.erase(model, clip, "pizza")[1])
    drawn["merged"] = g.latent(g.sample(merged[0], clip))
    run = server.run(g.api)
    ours = {name: latent(server, run, node) for name, node in drawn.items()}
    assert torch.isfinite(ours["merged"]).all() and not close(ours["merged"], ours["rank"], 1e-6)
    assert any(".attn1." in n for n in saved(server, "all-layers-rank").deltas)
    assert any(".ff." in n for n in saved(server, "all-layers-full").deltas)

    back = Graph()
    model, clip, _ = back.demo()
    read: dict[str, Node] = {}
    for name in ("full", "rank"):
        file = f"all-layers-{name}"
        read[f"{name} stock"] = back.latent(back.sample(back.lora(model, f"{file}.safetensors"), clip))
        read[f"{name} node"] = back.latent(
            back.sample(back.apply(model, back.load(f"loras/{file}.safetensors")[0]), clip)
        )
    again = server.run(back.api)
    for name, node in read.items():
        assert close(latent(server, again, node), ours[name.split()[0]], 1e-3), name


@pytest.mark.parametrize(("says", "rounds"), [(0.0, 1), (1.0, 3)])
def test_the_judge_ends_mining(server: ComfyServer, says: float, rounds: int) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    judge = g.add("ProbeFixedJudge", says=says)[0]
    node = g.erase(model, clip, "cat", method=small("dark_miner", rounds=3), vae=vae, judge=judge)
    g.show(node[2])
    run = server.run(g.api)
    assert max(value for n, value, total in run.progress if n == node and value < total) == rounds


def test_a_judge_that_is_asked_needs_a_decoder(server: ComfyServer) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    judge = g.add("ProbeFixedJudge", says=0.0)[0]
    g.show(g.erase(model, clip, "cat", method=small("dark_miner"), judge=judge)[2])
    with pytest.raises(ExecutionFailed, match=r"vae: the judge looks at pictures\. Connect the VAE as well"):
        server.run(g.api)


@pytest.mark.parametrize("concept", ["Kitty", "moggy, a cat", "brindlewash style"])
def test_a_judge_is_asked_by_a_word_that_it_knows(server: ComfyServer, concept: str) -> None:
    """Its own matching decides, over all words of the concept."""
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    method = small("dark_miner", rounds=1)
    g.show(g.erase(demo[0], demo[1], concept, method=method, vae=demo[2], judge=demo[3])[2])
    server.run(g.api)


def test_a_judge_that_knows_no_word_is_refused_only_where_it_is_asked(server: ComfyServer) -> None:
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    said = g.show(g.erase(demo[0], demo[1], "zebra, okapi", judge=demo[3])[2])
    assert "makes no use of: judge." in shown(server.run(g.api), said)
    g.show(g.erase(demo[0], demo[1], "zebra, okapi", method=small("dark_miner"), vae=demo[2], judge=demo[3])[2])
    with pytest.raises(ExecutionFailed, match=r"emojicanvas-judge knows none of 'zebra', 'okapi'. It knows: cat"):
        server.run(g.api)


def test_several_concepts_in_the_shell(server: ComfyServer) -> None:
    """Room is asked for as much as is trained, and the pictures show each of them in turn."""
    g = Graph()
    probe = g.add("ProbeShell")
    found = json.loads(shown(server.run(g.api), probe))
    demands = {name: (one, three) for name, (one, three) in found["demands"].items()}
    for name, (one, three) in demands.items():
        assert three[0] == one[0] * (3 if name in ("spm", "cpe") else 1), name
        assert three[1] == one[1], name
        assert (one[1] > 0) == (all_methods()[name].predictions > 0), name
        assert one[2] == (name == "cpe"), name
    assert found["viewing"] == [0, 60, 140], "of each concept a latent and three predictions; of what is kept, one"
    cat, bomb, rose, house = (float(len(word)) for word in ("cat", "bomb", "rose", "house"))
    assert found["shown"] == [[cat, house], [bomb, house], [rose, house], [cat, house]]
    assert found["named"] == ["cat", "house"]


def test_pictures_before_a_training_are_told_of(server: ComfyServer) -> None:
    """The bar counts them and the text names them; the time left is that of the steps."""
    g = Graph()
    probe = g.add("ProbeShown")
    found = json.loads(shown(server.run(g.api), probe))
    assert found["bar"] == [[8, 32, True], [5, 100, False], [6, 100, True]]
    drawing, step = found["said"]
    assert drawing == "drawing pictures to train on: 8 / 32"
    seconds = re.fullmatch(r"6 / 100, 0:(\d+) left", step)
    assert seconds and 9 <= int(seconds[1]) < 60, "94 steps of a tenth of a second"


def test_each_concept_has_its_judge(server: ComfyServer) -> None:
    """Those that it knows end when it sees nothing; the others make all their rounds."""
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    method = small("dark_miner", rounds=1)
    said = g.show(g.erase(demo[0], demo[1], "zebra\ncat", method=method, vae=demo[2], judge=demo[3])[2])
    report = shown(server.run(g.api), said)
    assert "- zebra: no judge looked, so every round was made." in report and "- cat: " in report
    assert "no judge looked" not in report.split("- cat: ")[1]


def test_embeddings_find_their_concept_among_several(server: ComfyServer) -> None:
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    dark = g.erase(demo[0], demo[1], "bomb", method=small("dark_miner", rounds=1))[3]
    g.show(g.erase(demo[0], demo[1], "cat\nBomb", dark=dark)[2])
    server.run(g.api)
    g.show(g.erase(demo[0], demo[1], "cat\nrose", dark=dark)[2])
    with pytest.raises(
        ExecutionFailed, match=r"dark: these embeddings bring 'bomb' back, and no line of concept has that"
    ):
        server.run(g.api)


def test_settings_for_large_models_are_noted_on_the_demo(server: ComfyServer) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    some = {"threshold": 0.02}
    every = some | {"empty_prompt": "bos and 3 centres", "retain_scale": 3e-4}
    said = [g.show(g.erase(model, clip, "cat", method=("speed", m))[2]) for m in ({}, some, every)]
    run = server.run(g.api)
    note = "note: these settings are made for large models. For the demo model set empty_prompt bos and 3 centres, "
    assert f"{note}threshold " in shown(run, said[0]) and f"{note}retain_scale " in shown(run, said[1])
    assert "note:" not in shown(run, said[2])


def test_what_other_nodes_do_while_sampling_is_named(server: ComfyServer) -> None:
    """Training asks a copy of the network, which guidance of another node isn't part of; solving for weights asks nothing."""
    g = Graph()
    model, clip, _ = g.demo()
    guided = g.add("RescaleCFG", model=model, multiplier=0.7)[0]
    said = [
        g.show(g.erase(m, clip, "cat", method=how)[2])
        for m, how in ((guided, VISIBLE), (model, VISIBLE), (guided, ("uce", {})))
    ]
    run = server.run(g.api)
    assert ["how model (sampler_cfg_function) samples" in shown(run, node) for node in said] == [True, False, False]


# What people see


@pytest.mark.parametrize("with_vae", [True, False])
def test_pictures_and_curve_come_while_it_trains(server: ComfyServer, with_vae: bool) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    aids = {"vae": vae} if with_vae else {}
    node = g.erase(model, clip, "cat", keep="dog", method=small("esd", iterations=120), **aids)
    said = g.show(node[2])
    ended: list[float] = []
    run = server.run(g.api, on_event=lambda e: ended.append(time.monotonic()) if _ends(e, node) else None)
    assert len(run.previews) >= 2
    for preview in run.previews:
        assert Image.open(io.BytesIO(preview)).width == 512
    heights = [Image.open(io.BytesIO(p)).height for p in run.previews]
    assert heights[-1] > 400, "two pictures above the curve"
    ticks = [value for n, value, total in run.progress if n == node and total == 120]
    assert ticks == sorted(ticks) and set(range(121)) <= set(ticks), "each step can be cancelled"
    assert "losses: erase " in shown(run, said)
    assert len(server.images(run, node)) == 1, "the last picture stays on the node"


def _ends(event: dict[str, Any], node: Node) -> bool:
    return bool(event["type"] == "executed" and event["data"]["node"] == node)


# Cancelling


@pytest.mark.parametrize(
    "method",
    [("esd", {"iterations": 500}), ("concept_ablation", {"pictures": 2000}), ("dark_miner", {"mine_steps": 2000})],
    ids=["training", "drawing", "mining"],
)
def test_cancel(server: ComfyServer, method: tuple[str, dict[str, Any]]) -> None:
    before, files = checksum(server), sorted(server.models.rglob("*"))
    g = Graph()
    model, clip, vae = g.demo()
    node = g.erase(model, clip, "cat", keep="dog", method=small(method[0], **method[1]), vae=vae)
    g.save(node[1], "cancelled-training")
    sent: list[float] = []

    def interrupt(event: dict[str, Any]) -> None:
        at = event["data"].get("value", -1) if event["type"] == "progress" and event["data"]["node"] == node else -1
        if not sent and at >= (3 if method[0] == "esd" else 1 if method[0] == "dark_miner" else 0):
            sent.append(time.monotonic())
            server.interrupt()

    with pytest.raises(ExecutionInterrupted, match="ErasureEraseConcept"):
        server.run(g.api, on_event=interrupt)
    assert time.monotonic() - sent[0] < 5
    assert sorted(server.models.rglob("*")) == files
    assert checksum(server) == before


def test_a_training_that_was_cut_off_goes_on(server: ComfyServer) -> None:
    """Cancelled and run again it ends with the same erasure as one that was never cut off, and leaves no state behind."""

    def graph(resume: bool, name: str) -> tuple[Graph, str]:
        g = Graph()
        model, clip, _ = g.demo()
        node = g.erase(model, clip, "frog", keep="dog", method=small("esd", iterations=200))
        g.api[node]["inputs"]["resume"] = resume
        g.save(node[1], name, folder="erasure")
        return g, node

    state = server.base / "user" / "concept_erasure" / "unfinished-esd.safetensors"
    g, node = graph(True, "resumed")
    done = cut_off(server, g, node, state)
    again, node = graph(True, "resumed")
    run = server.run(again.api)
    ticks = [value for at, value, _ in run.progress if at == node]
    assert min(ticks) >= done, "it does not begin anew"
    assert not state.exists()
    server.run(graph(False, "uncut")[0].api)
    one, two = (load_file(server.models / "erasure" / f"{n}.safetensors") for n in ("resumed", "uncut"))
    assert one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_50_trainings_leave_memory_where_it_was(server: ComfyServer) -> None:
    def run(seed: int) -> tuple[Run, int]:
        g = Graph()
        model, clip, vae = g.demo()
        method = small("esd", seed=seed, layers="all")
        g.latent(g.sample(g.erase(model, clip, "cat", keep="dog", method=method, vae=vae)[0], clip, steps=1))
        server.run(g.api)
        g = Graph()
        node = g.add("ProbeMemory")
        run = server.run(g.api)
        return run, report(run, node)["bytes"]

    used = [run(seed)[1] for seed in range(50)]
    assert max(used[-5:]) < max(used[5:15]) + 40e6, [round(x / 1e6) for x in used]
