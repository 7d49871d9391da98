"""What erasing must not do: change the base model, fight with LoRAs, differ from run to run, compute twice."""

from __future__ import annotations

import pytest
import torch
from api_graphs import DIFFUSERS, FULL, LORA, Graph, Node, latent, report, shown, weights
from comfy_client import ExecutionInterrupted
from comfy_host import ComfyServer
from safetensors.torch import save_file
from torch import Tensor

from erasure_core import ConceptSpec, erase
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort
from erasure_core.names import to_kohya

METHODS = ["uce", "rece", "speed"]


def close(one: Tensor, other: Tensor, tolerance: float) -> bool:
    """Up to ``tolerance`` of the largest entry, and rounding."""
    return float((one - other).abs().max()) <= tolerance * float(other.abs().max()) + 1e-7


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def base_picture(server: ComfyServer) -> tuple[Tensor, str, int]:
    """Sampled anew: latent, checksum of the weights in memory, and in which network object they are."""
    g = Graph()
    model, clip, _ = g.demo()
    model = g.again(model)
    saved, checked = g.latent(g.sample(model, clip)), g.checksum(model)
    run = server.run(g.api)
    state = report(run, checked)
    return latent(server, run, saved), state["sha256"], state["network"]


@pytest.mark.parametrize("method", METHODS)
def test_strength_0_is_the_base_bit_for_bit(server: ComfyServer, method: str) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    erased = g.erase(model, clip, "cat", keep="dog", method=(method, {}))
    drawn = {
        "base": g.latent(g.sample(model, clip)),
        "off": g.latent(g.sample(g.apply(model, erased[1], 0.0), clip)),
        "on": g.latent(g.sample(g.apply(model, erased[1], 1.0), clip)),
        "node": g.latent(g.sample(erased[0], clip)),
    }
    run = server.run(g.api)
    seen = {name: latent(server, run, node) for name, node in drawn.items()}
    assert torch.equal(seen["off"], seen["base"])
    assert not close(seen["on"], seen["base"], 1e-3)
    assert torch.equal(seen["node"], seen["on"]), "Erase Concept's model is Apply Erasure at 1"


def test_base_is_untouched_after_20_cycles(server: ComfyServer) -> None:
    picture, checksum, network = base_picture(server)
    interrupted = 0
    for cycle in range(20):
        g = Graph()
        model, clip, _ = g.demo()
        method = ("rece", {"rounds": 20}) if cycle % 2 else (METHODS[cycle % 3], {})
        erased = g.erase(model, clip, "cat\npizza", keep="dog", method=method, replace_with=f"word{cycle}")
        applied = g.apply(model, erased[1], (0.5, 1.0, 1.5)[cycle % 3])
        loaded = g.checksum(applied)
        g.latent(g.sample(applied, clip, seed=cycle, steps=2))
        # Every second run is cancelled, alternately while it erases and while it samples.
        stop_at = (erased if cycle % 4 == 1 else None) if cycle % 2 else ""
        try:
            run = server.run(g.api, on_event=_interrupter(server, stop_at))
            assert report(run, loaded)["network"] == network
            assert report(run, loaded)["sha256"] != checksum, "while it is applied, memory holds the patched weights"
        except ExecutionInterrupted:
            interrupted += 1
        assert not list(server.models.rglob("*.tmp"))
    assert interrupted >= 8
    after, after_checksum, after_network = base_picture(server)
    assert after_network == network, "the same object was used all the time"
    assert after_checksum == checksum
    assert torch.equal(after, picture)


def _interrupter(server: ComfyServer, node: str | None):
    """Interrupts when ``node`` starts, or for None at the first sampling step; "" never."""

    def on_event(event: dict) -> None:
        kind, data = event["type"], event["data"]
        sampling = node is None and kind == "progress" and data["max"] == 2
        if node != "" and (sampling or (node and kind == "executing" and data.get("node") == node)):
            server.interrupt()

    return on_event


@pytest.fixture(scope="module")
def core() -> EmojiCanvas:
    return EmojiCanvas.load()


@pytest.fixture(scope="module")
def lora(server: ComfyServer, core: EmojiCanvas) -> dict[str, Tensor]:
    """A random rank-3 LoRA on some text weights, written as models/loras/user.safetensors: its changes by site."""
    port, generator = EmojiCanvasPort(core), torch.Generator().manual_seed(5)
    tensors, changes = {}, {}
    for site in port.sites()[::2] + port.sites()[1:4:2]:
        up = torch.randn(site.d_out, 3, generator=generator) * 0.05
        down = torch.randn(3, site.d_in, generator=generator) * 0.5
        name = to_kohya(site.name, port.family)
        tensors |= {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(1.5)}
        changes[site.name] = 0.5 * up @ down
    save_file(tensors, server.models / "loras" / "user.safetensors")
    return changes


@pytest.mark.parametrize("method", METHODS)
def test_lora_before(server: ComfyServer, core: EmojiCanvas, lora: dict[str, Tensor], method: str) -> None:
    """The erasure is computed against the weights with the LoRA in them, and comes on top."""
    g = Graph()
    model, clip, _ = g.demo()
    with_lora = g.lora(model, "user.safetensors", 0.8)
    erased = g.erase(with_lora, clip, "cat", keep="dog", method=(method, {}))
    read = {"base": g.weights(model), "lora": g.weights(with_lora), "erased": g.weights(erased[0])}
    server.run(g.api)
    seen = {name: weights(server, g, node) for name, node in read.items()}

    effective = {site: w + 0.8 * lora.get(site, 0) for site, w in seen["base"].items()}
    assert all(close(seen["lora"][site], w, 1e-6) for site, w in effective.items())
    merged = EmojiCanvas.load()
    for site, weight in effective.items():
        merged.unet.get_submodule(site).weight.copy_(weight)
    delta = erase(EmojiCanvasPort(merged), ConceptSpec.parse("cat", "", "dog"), method)
    assert delta.header.base != erase(EmojiCanvasPort(core), ConceptSpec.parse("cat"), "uce").header.base
    for site, weight in effective.items():
        change = delta.deltas[site].dense() if site in delta.deltas else torch.zeros_like(weight)
        assert close(seen["erased"][site] - weight, change, 1e-3), site


def test_lora_behind_adds(server: ComfyServer, lora: dict[str, Tensor]) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    erased = g.erase(model, clip, "cat", keep="dog")
    behind = g.lora(erased[0], "user.safetensors", 0.8)
    before = g.apply(g.lora(model, "user.safetensors", 0.8), erased[1])
    read = {"erased": g.weights(erased[0]), "behind": g.weights(behind), "before": g.weights(before)}
    server.run(g.api)
    seen = {name: weights(server, g, node) for name, node in read.items()}
    for site, weight in seen["erased"].items():
        assert close(seen["behind"][site], weight + 0.8 * lora.get(site, 0), 1e-6)
        assert close(seen["before"][site], seen["behind"][site], 1e-6), "both orders of patches add up to the same"


@pytest.mark.parametrize("layout", [LORA, FULL], ids=["lora", "full"])
@pytest.mark.parametrize("method", METHODS)
def test_saved_file_in_the_stock_lora_node(server: ComfyServer, method: str, layout: str) -> None:
    """Somebody without this pack gets the same picture."""
    name = f"stock-{method}-{layout[:4].strip()}"
    g = Graph()
    model, clip, _ = g.demo()
    erased = g.erase(model, clip, "cat\npizza", keep="dog", method=(method, {}))
    saved = g.save(erased[1], name, layout=layout)
    ours = {s: g.latent(g.sample(g.apply(model, erased[1], s), clip)) for s in (1.0, 0.5)}
    run = server.run(g.api)
    assert f"saved models/loras/{name}.safetensors" in shown(run, saved)

    stock = Graph()
    model, clip, _ = stock.demo()
    theirs = {s: stock.latent(stock.sample(stock.lora(model, f"{name}.safetensors", s), clip)) for s in (1.0, 0.5)}
    again = server.run(stock.api)
    for strength in ours:
        expected = latent(server, run, ours[strength])
        assert close(latent(server, again, theirs[strength]), expected, 1e-3)
    assert not close(latent(server, run, ours[1.0]), latent(server, run, ours[0.5]), 1e-3)


@pytest.mark.parametrize("folder", ["loras", "erasure"])
@pytest.mark.parametrize("layout", [LORA, DIFFUSERS, FULL], ids=["lora", "diffusers", "full"])
def test_save_and_load(server: ComfyServer, layout: str, folder: str) -> None:
    name = f"round-{layout[:4].strip()}"
    g = Graph()
    model, clip, _ = g.demo()
    erased = g.erase(model, clip, "cat, kitty", replace_with="dog", keep="tiger")
    saved = g.save(erased[1], name, layout=layout, folder=folder)
    direct, said = g.weights(erased[0]), g.show(erased[2])
    first = server.run(g.api)
    assert ("Load LoRA and A1111 don't read this layout" in shown(first, saved)) == (layout == DIFFUSERS)

    assert f"{folder}/{name}.safetensors" in _choices(server), "listed without a restart"
    back = Graph()
    model, clip, _ = back.demo()
    loaded = back.load(f"{folder}/{name}.safetensors")
    read, told = back.weights(back.apply(model, loaded[0])), back.show(loaded[1])
    run = server.run(back.api)
    ours, theirs = weights(server, g, direct), weights(server, back, read)
    assert all(close(theirs[site], w, 1e-6) for site, w in ours.items())
    assert (
        shown(run, told).splitlines()[0]
        == shown(first, said).splitlines()[0]
        == "suppressed: cat, kitty -> dog; kept: tiger"
    )


def _choices(server: ComfyServer) -> list[str]:
    kind, extra = server.object_info("ErasureLoad")["ErasureLoad"]["input"]["required"]["file"]
    choices: list[str] = kind if isinstance(kind, list) else extra["options"]
    return choices


def test_half_precision_is_close(server: ComfyServer) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    erased = g.erase(model, clip, "cat")
    g.save(erased[1], "half", precision="half (float16)")
    g.save(erased[1], "whole")
    full = g.weights(erased[0])
    server.run(g.api)
    back = Graph()
    model, clip, _ = back.demo()
    read = back.weights(back.apply(model, back.load("loras/half.safetensors")[0]))
    server.run(back.api)
    ours, theirs = weights(server, g, full), weights(server, back, read)
    assert all(close(theirs[site], w, 2e-3) for site, w in ours.items())
    sizes = [(server.models / "loras" / f"{n}.safetensors").stat().st_size for n in ("half", "whole")]
    assert sizes[0] < 0.6 * sizes[1]


@pytest.mark.parametrize("method", METHODS)
def test_runs_are_equal_to_the_bit(server: ComfyServer, method: str) -> None:
    """Computed twice, in two nodes and in two runs, with other seeds having been drawn between."""
    seen = []
    for other_seed in (1, 2):
        g = Graph()
        model, clip, _ = g.demo()
        g.latent(g.sample(model, clip, seed=other_seed, steps=1))
        nodes = [g.weights(g.erase(g.again(model), clip, "cat", keep="dog", method=(method, {}))[0]) for _ in range(2)]
        server.run(g.api)
        seen += [weights(server, g, node) for node in nodes]
    assert all(same(seen[0], other) for other in seen[1:])


def test_cache(server: ComfyServer) -> None:
    """The second run computes nothing; a changed strength re-runs Apply Erasure and what follows, not the erasing."""

    def graph(strength: float) -> tuple[Graph, Node, set[str]]:
        g = Graph()
        model, clip, _ = g.demo()
        erased = g.erase(model, clip, "cat", keep="dog", method=("uce", {"keep_weight": 2.0}))
        applied = g.apply(model, erased[1], strength)
        sampled = g.sample(applied, clip)
        saved = g.add("SaveLatent", samples=sampled, filename_prefix="cache")
        return g, erased, {applied[0], sampled[0], saved}

    g, erased, behind = graph(1.0)
    assert erased in server.run(g.api).executed
    second = server.run(g.api)
    assert second.executed == []
    assert set(second.cached) == set(g.api)
    moved, erased, behind = graph(0.7)
    third = server.run(moved.api)
    assert set(third.executed) == behind
    assert erased in third.cached


def test_merge(server: ComfyServer) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    cat = g.erase(model, clip, "cat", keep="horse")
    car = g.erase(model, clip, "car", keep="house", method=("rece", {}))
    merged = g.merge(model, clip, cat[1], car[1])
    read = {"base": model, "cat": cat[0], "car": car[0], "merged": merged[0]}
    nodes = {name: g.weights(link) for name, link in read.items()}
    said = g.show(merged[2])
    run = server.run(g.api)
    seen = {name: weights(server, g, node) for name, node in nodes.items()}
    assert all(
        not torch.equal(seen["merged"][site], w) for name in ("base", "cat", "car") for site, w in seen[name].items()
    )
    assert shown(run, said).startswith("suppressed: cat; car; kept: horse, house\nmethod: uce + rece")
