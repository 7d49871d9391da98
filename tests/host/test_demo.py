"""EmojiCanvas in ComfyUI's classes and in the core's own: the same weights, the same text, latents, pictures, erasures."""

from __future__ import annotations

import pytest
import torch
from api_graphs import FULL, Graph, latent, picture
from comfy_host import ComfyServer
from safetensors.torch import load_file
from torch import Tensor

from erasure_core import ConceptSpec, erase, load
from erasure_core.emojicanvas.diffusion import sample
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort, noise_of, patched
from erasure_core.emojicanvas.taesd import SD15_SCALE

PROMPT, SEED, STEPS, CFG = "a cat in neon style", 11, 20, 4.0


@pytest.fixture(scope="module")
def core() -> EmojiCanvas:
    return EmojiCanvas.load()


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


@pytest.mark.parametrize("prompt", [PROMPT, "", "Ünïcode 猫, a \\(cat\\)", "kitten " * 70])
def test_text_states(server: ComfyServer, core: EmojiCanvas, prompt: str) -> None:
    g = Graph()
    _, clip, _ = g.demo()
    name = f"states-{abs(hash(prompt))}.safetensors"
    g.add("ProbeTextStates", conditioning=g.text(clip, prompt), name=name)
    server.run(g.api)
    states = load_file(server.output / name)["states"]
    assert relative(states, core.encode([prompt.replace("\\", "")])) < 1e-5


def test_latents_and_pictures(server: ComfyServer, core: EmojiCanvas) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    samples = g.sample(model, clip, PROMPT, seed=SEED, steps=STEPS, cfg=CFG)
    saved, shown = g.latent(samples), g.image(vae, samples)
    run = server.run(g.api)

    z = sample(core.unet, noise_of([SEED]), core.encode([PROMPT]), core.encode([""]), steps=STEPS, cfg=CFG)
    assert relative(latent(server, run, saved) * SD15_SCALE, z) < 1e-3
    ours = core.generate([PROMPT], [SEED], steps=STEPS, cfg=CFG)[0].permute(1, 2, 0)
    apart = (picture(server, run, shown) - 127.5 * (ours + 1)).abs()
    assert apart.mean() < 1  # ComfyUI cuts fractions off where others round
    assert apart.quantile(0.999) < 2


@pytest.mark.parametrize(
    ("method", "everyday"), [("uce", False), ("rece", False), ("speed", False), ("uce", True), ("rece", True)]
)
def test_erasures(server: ComfyServer, core: EmojiCanvas, method: str, everyday: bool) -> None:
    words = {"concept": "cat, kitty\npizza", "replace_with": "dog\ncar", "keep": "tiger, horse"}
    g = Graph()
    model, clip, _ = g.demo()
    erased = g.erase(model, clip, **words, keep_everyday=everyday, method=(method, {}))
    file = f"core-{method}-{everyday}"
    g.save(erased[1], file, folder="erasure", layout=FULL)
    server.run(g.api)
    theirs = load(server.models / "erasure" / f"{file}.safetensors")
    ours = erase(EmojiCanvasPort(core), ConceptSpec.parse(**words, everyday=everyday), method)

    assert theirs.header.spec == ours.header.spec
    assert theirs.header.family == ours.header.family
    assert theirs.header.base == ours.header.base
    assert set(theirs.deltas) == {name for name, d in ours.deltas.items() if d.rank}
    for name, delta in theirs.deltas.items():
        assert relative(delta.dense(), ours.deltas[name].dense()) < 1e-3


def test_an_erasure_draws_alike_in_both(server: ComfyServer, core: EmojiCanvas) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    base = g.latent(g.sample(model, clip, PROMPT, seed=SEED, steps=8))
    erased = g.erase(model, clip, "cat", keep="dog")
    drawn = g.latent(g.sample(erased[0], clip, PROMPT, seed=SEED, steps=8))
    run = server.run(g.api)
    delta = erase(EmojiCanvasPort(core), ConceptSpec.parse("cat", "", "dog"), "uce")
    before = latent(server, run, base)
    with patched(core.unet, delta) as unet:
        z = sample(unet, noise_of([SEED]), core.encode([PROMPT]), core.encode([""]), steps=8, cfg=CFG)
    assert relative(latent(server, run, drawn) * SD15_SCALE, z) < 1e-3
    assert not torch.equal(latent(server, run, drawn), before)
