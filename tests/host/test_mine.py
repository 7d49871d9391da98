"""Mine, Save and Load Dark Embeddings in a real ComfyUI, and the text encoder that words are searched through."""

from __future__ import annotations

import io
import uuid

import pytest
import torch
from api_graphs import Graph, Link, Node, latent, report, shown
from comfy_client import ComfyError, ExecutionFailed, ExecutionInterrupted, PromptRejected
from comfy_host import ComfyServer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from erasure_core import ConceptSpec, Family, Header
from erasure_core.dark import DarkEmbeddings, load_dark, save_dark

FEW = {"form": "free", "words": 2, "count": 2, "steps": 6, "learning_rate": 0.02, "batch": 8, "looks": 2, "seed": 3}
DARK, CONDITIONING, IMAGES, REPORT, SCORE = range(5)


def mining(g: Graph, model: Link, clip: Link, vae: Link, concept: str = "tulip", **inputs) -> Node:
    return g.add("ErasureMineDarkEmbeddings", model=model, clip=clip, vae=vae, concept=concept, **{**FEW, **inputs})


def states(server: ComfyServer, g: Graph, conditioning: Link) -> str:
    name = f"states-{uuid.uuid4().hex}.safetensors"
    g.add("ProbeTextStates", conditioning=conditioning, name=name)
    return name


def read(server: ComfyServer, name: str) -> Tensor:
    return load_file(server.output / name)["states"]


def drawn_with(g: Graph, model: Link, clip: Link, conditioning: Link) -> Node:
    """The latent of a picture with a CONDITIONING in place of a prompt."""
    sampled = g.sample(model, clip, steps=3)
    g.api[sampled[0]]["inputs"]["positive"] = conditioning
    return g.latent(sampled)


def test_it_searches_an_erased_model(server: ComfyServer) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    judge = [model[0], 3]
    before = g.checksum(model)
    erased = g.erase(model, clip, "tulip", keep="rose", method=("uce", {}))
    mined = mining(g, erased[0], clip, vae, base_model=model, judge=judge)
    pictures = g.add("PreviewImage", images=mined[IMAGES])
    said, score = g.show(mined[REPORT]), g.show(mined[SCORE])
    drawn = drawn_with(g, erased[0], clip, mined[CONDITIONING])
    run = server.run(g.api)
    assert len(run.outputs[pictures]["images"]) == 4, "two finds, two pictures each"
    text = shown(run, said)
    assert "2 dark embeddings for tulip (free conditionings), mined in emojicanvas" in text
    assert "pictures that base_model drew" in text and "scored by judge" in text
    assert 0 <= float(shown(run, score)) <= 1
    assert torch.isfinite(latent(server, run, drawn)).all()
    ticks = [value for node, value, top in run.progress if node == mined and top == 18]
    assert ticks == sorted(ticks) and ticks[-1] == 18 and len(set(ticks)) >= 12
    again = Graph()
    model, _, _ = again.demo()
    after = again.checksum(model)
    assert report(server.run(again.api), after)["sha256"] == report(run, before)["sha256"]


def test_words_become_embeddings_of_prompts(server: ComfyServer) -> None:
    """What was searched through our own encoder is what ComfyUI's encodes for the saved embedding."""
    name = f"found-{uuid.uuid4().hex[:8]}"
    g = Graph()
    model, clip, vae = g.demo()
    mined = mining(g, model, clip, vae, form="words", words=2, steps=4)
    saved = g.add("ErasureSaveDarkEmbeddings", dark=mined[DARK], name=name, overwrite=False)
    found = states(server, g, mined[CONDITIONING])
    run = server.run(g.api)
    assert f"embedding:{name}-1" in shown(run, saved)
    files = [server.models / "embeddings" / f"{name}-{i}.safetensors" for i in (1, 2)]
    vectors = [load_file(f)["clip_l"] for f in files]
    assert [tuple(v.shape) for v in vectors] == [(2, 128)] * 2 and not torch.equal(*vectors)

    back = Graph()
    _, clip, _ = back.demo()
    typed = states(server, back, back.text(clip, f"a picture of embedding:{name}-1"))
    plain = states(server, back, back.text(clip, "a picture of"))
    loaded = back.add("ErasureLoadDarkEmbeddings", clip=clip, file=f"erasure/{name}.safetensors")
    reloaded = states(server, back, loaded[1])
    server.run(back.api)
    mined_states = read(server, found)
    assert torch.allclose(read(server, typed), mined_states, atol=1e-5)
    assert torch.equal(read(server, reloaded), mined_states)
    assert not torch.allclose(read(server, plain), mined_states, atol=1e-2)
    dark = load_dark(server.models / "erasure" / f"{name}.safetensors")
    assert torch.equal(dark.words["clip_l"][0], vectors[0]) and dark.header.settings["steps"] == 4

    once_more = Graph()
    model, clip, vae = once_more.demo()
    mined = mining(once_more, model, clip, vae, form="words", words=2, steps=4)
    once_more.add("ErasureSaveDarkEmbeddings", dark=mined[DARK], name=name, overwrite=False)
    with pytest.raises(ExecutionFailed, match=r"already in models/(erasure|embeddings)"):
        server.run(once_more.api)


def test_mine_erase_mine_again(server: ComfyServer) -> None:
    """The loop in one graph: the second search is of the model from which the first's finds were erased."""
    g = Graph()
    model, clip, vae = g.demo()
    first = g.erase(model, clip, "tulip", method=("uce", {}))
    found = mining(g, first[0], clip, vae, base_model=model, count=1, steps=3)
    second = g.erase(model, clip, "tulip", method=("uce", {}))
    g.api[second]["inputs"]["dark"] = found[DARK]
    left = mining(g, second[0], clip, vae, base_model=model, count=1, steps=3)
    pictures = [drawn_with(g, erased[0], clip, found[CONDITIONING]) for erased in (first, second)]
    said = g.show(left[REPORT])
    run = server.run(g.api)
    one, two = (latent(server, run, p) for p in pictures)
    assert not torch.allclose(one, two, atol=1e-3), "erasing the find changes what it draws"
    assert "1 dark embeddings for tulip" in shown(run, said)


def test_it_shows_what_it_has_found_so_far(server: ComfyServer) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    mined = mining(g, model, clip, vae, count=1, steps=60, seed=8)
    g.add("PreviewImage", images=mined[IMAGES])
    run = server.run(g.api)
    assert run.previews, "a picture and the loss, while it searches"
    for preview in run.previews:
        assert Image.open(io.BytesIO(preview)).width == 512


def test_images_are_enough(server: ComfyServer) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    image = g.add("EmptyImage", width=200, height=150, batch_size=3, color=0x88AA22)[0]
    mined = mining(g, model, clip, vae, concept="anything, at all", images=image, count=1, steps=2)
    said = g.show(mined[REPORT])
    assert "searched with 3 given images" in shown(server.run(g.api), said)


def test_cancel(server: ComfyServer) -> None:
    before = {p for folder in ("erasure", "embeddings") for p in (server.models / folder).rglob("*")}
    g = Graph()
    model, clip, vae = g.demo()
    mined = mining(g, model, clip, vae, steps=5000, seed=77)
    g.add("ErasureSaveDarkEmbeddings", dark=mined[DARK], name="never", overwrite=True)

    def stop(event: dict) -> None:
        data = event["data"]
        if event["type"] == "progress" and data["max"] == 15000 and data["value"] > 5002:
            server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.run(g.api, on_event=stop)
    assert {p for folder in ("erasure", "embeddings") for p in (server.models / folder).rglob("*")} == before


@pytest.mark.parametrize(("concept", "message"), [("", "concept"), ("cat\ndog", "one at a time")])
def test_bad_concepts(server: ComfyServer, concept: str, message: str) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    g.add("PreviewImage", images=mining(g, model, clip, vae, concept=concept)[IMAGES])
    with pytest.raises(PromptRejected, match=message):
        server.run(g.api)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"base_model": "flux"}, r"base_model: it is .* the model under test emojicanvas"),
        ({"judge": 0.0}, r"the judge recognised the concept in 0\. Connect the model before the erasure as base_model"),
        ({"base_model": "erased"}, r"base_model: it carries an erasure of 'tulip', so it is no model from before that"),
        ({"form": "verse"}, r"form: 'verse' is not one of free, words|Value not in list"),
    ],
)
def test_what_can_not_work_is_said(server: ComfyServer, inputs: dict, message: str) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    if "base_model" in inputs:
        erased = inputs["base_model"] == "erased"
        inputs = {"base_model": g.erase(model, clip, "tulip")[0] if erased else g.add("ProbeFluxModel")[0]}
    if "judge" in inputs:
        inputs = {"judge": g.add("ProbeFixedJudge", says=inputs["judge"])[0]}
    g.add("PreviewImage", images=mining(g, model, clip, vae, **inputs)[IMAGES])
    with pytest.raises(ComfyError, match=message):
        server.run(g.api)


@pytest.mark.parametrize(
    ("family", "skip", "towers"),
    [
        ("demo", None, ["clip_l"]),
        ("sd15", None, ["clip_l"]),
        ("sd15", -2, ["clip_l"]),
        ("sd20", None, ["clip_h"]),
        ("sdxl", None, ["clip_l", "clip_g"]),
        ("sdxl", -1, ["clip_l", "clip_g"]),
    ],
)
def test_the_text_encoder_is_comfyuis(server: ComfyServer, family: str, skip: int | None, towers: list[str]) -> None:
    g = Graph()
    clip = g.demo()[1] if family == "demo" else g.add("ProbeTinyClip", family=family)[0]
    if skip is not None:
        clip = g.add("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=skip)[0]
    measured = g.add("ProbeTower", clip=clip)
    seen = report(server.run(g.api), measured)
    assert seen["towers"] == towers and seen["size"] > 0.1
    assert seen["off"] is not None and seen["off"] < 1e-5 * max(1, seen["size"])


@pytest.mark.parametrize("form", ["free", "words"])
def test_what_dark_miner_found_comes_out_of_erase_concept(server: ComfyServer, form: str) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    judge = g.add("ProbeFixedJudge", says=0.75)[0]
    few = {"rounds": 2, "population": 2, "mine_steps": 2, "iterations": 2, "sample_steps": 3, "pictures": 2, "looks": 1}
    erased = g.erase(
        model, clip, "tulip", method=("dark_miner", {**few, "form": form, "words": 2}), vae=vae, judge=judge
    )
    name = f"pool-{uuid.uuid4().hex}"
    g.add("ErasureSaveDarkEmbeddings", dark=erased[3], name=name, overwrite=False)
    said = g.show(erased[2])
    run = server.run(g.api)
    assert (
        "Dark Miner: embeddings found and erased: 4. The best find of each round scored 0.75, 0.75, but the rounds ended: "
        "ways back are left." in shown(run, said)
    )
    pool = load_dark(server.models / "erasure" / f"{name}.safetensors")
    assert pool.scores == (0.75,) * 4 and pool.concept == "tulip" and pool.header.method == "dark_miner"
    assert pool.header.settings["form"] == form and not pool.words


def test_saving_what_was_not_found_is_refused(server: ComfyServer) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    g.add("ErasureSaveDarkEmbeddings", dark=g.erase(model, clip, "tulip")[3], name="none", overwrite=False)
    with pytest.raises(ExecutionFailed, match=r"dark: nothing was found"):
        server.run(g.api)


def saved_dark(server: ComfyServer, name: str, width: int, words: bool) -> str:
    """A set, as Load Dark Embeddings lists it."""
    header = Header("mine", {}, ConceptSpec.parse("tulip"), Family("emojicanvas", width, 2, 3), "0" * 16, "1")
    vectors = {"clip_l": torch.ones(1, 1, width)} if words else {}
    save_dark(
        DarkEmbeddings(header, torch.ones(1, 77, width), (0.5,), vectors),
        server.models / "erasure" / f"{name}.safetensors",
    )
    return f"erasure/{name}.safetensors"


@pytest.mark.parametrize(
    ("name", "better"),
    [("my tulips (2)", "my-tulips-2"), ("a {b}", "a-b"), ("( )", "dark")],
)
def test_words_need_a_name_that_prompts_can_hold(server: ComfyServer, name: str, better: str) -> None:
    def graph(words: bool) -> Graph:
        g = Graph()
        file = saved_dark(server, f"held-{words}", 128, words)
        dark = g.add("ErasureLoadDarkEmbeddings", clip=g.demo()[1], file=file)[0]
        g.add("ErasureSaveDarkEmbeddings", dark=dark, name=name, overwrite=True)
        return g

    with pytest.raises(ExecutionFailed, match=f"name: .* has blanks or brackets.* Take '{better}' instead"):
        server.run(graph(True).api)
    assert not (server.models / "erasure" / f"{name}.safetensors").exists()
    server.run(graph(False).api)


def test_a_clip_of_another_width_is_refused(server: ComfyServer) -> None:
    g = Graph()
    read = g.add("ErasureLoadDarkEmbeddings", clip=g.demo()[1], file=saved_dark(server, "wide", 768, False))
    g.show(read[2])
    with pytest.raises(
        ExecutionFailed, match=r"clip: its text width is 128, .* mined in emojicanvas \(text width 768\)"
    ):
        server.run(g.api)
