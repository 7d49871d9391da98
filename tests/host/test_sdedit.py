"""Make SDEdit Pair on the demo model: what comes out, that a seed owns it, that a judge is heard, and that it stops."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from api_graphs import Graph, Node, latent, report, shown
from comfy_client import ExecutionInterrupted, Run
from comfy_host import ComfyServer
from PIL import Image
from test_judges import plain, refusal

from erasure_core.emojicanvas.taesd import SD15_SCALE
from erasure_core.pair_files import load_pairs
from erasure_core.pairs import ConceptPairs

UNSAFE, SAFE = "a cat on a blue background", "a dog on a blue background"


def pair(g: Graph, demo: Node, **changed: Any) -> Node:
    """unsafe, safe, pairs, report."""
    inputs = {
        "unsafe_prompt": UNSAFE, "safe_prompt": SAFE, "strength": 0.75, "count": 2, "seed": 3, "steps": 4, "cfg": 4.0,
        "width": 0, "height": 0, "max_redraws": 1, "concept": "",
    }  # fmt: skip
    return g.add("ErasureMakeSDEditPair", model=demo[0], clip=demo[1], vae=demo[2], **inputs | changed)


def saving(g: Graph, made: Node, name: str, overwrite: bool = True) -> Node:
    return g.add("ErasureSavePairs", pairs=made[2], name=name, overwrite=overwrite)


def saved(server: ComfyServer, name: str) -> ConceptPairs:
    return load_pairs(server.models / "erasure_pairs" / f"{name}.safetensors")


def made(server: ComfyServer, name: str, **changed: Any) -> ConceptPairs:
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    # A seed that no other test has, so that nothing comes from the cache, unless the test says so.
    saving(g, pair(g, demo, **changed), name)
    server.run(g.api)
    return saved(server, name)


def pictures(server: ComfyServer, run: Run, node: Node) -> list[np.ndarray]:
    return [np.array(Image.open(io.BytesIO(p)).convert("RGB")) for p in server.images(run, node)]


def test_pairs_come_out(server: ComfyServer) -> None:
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    node = pair(g, demo)
    saving(g, node, "out")
    run = server.run(g.api)
    pairs, shots = saved(server, "out"), pictures(server, run, node)
    assert pairs.unsafe.shape == pairs.safe.shape == (2, 4, 16, 16)
    assert (pairs.scenes, pairs.family.name) == (((UNSAFE, SAFE),), "emojicanvas")
    assert not torch.allclose(pairs.unsafe, pairs.safe, atol=1e-2)
    assert [s.shape for s in shots] == [(128, 256, 3)] * 2, "both members side by side"
    said = shown(run, node)
    assert said.startswith(f"2 pairs: {UNSAFE!r} -> {SAFE!r}") and "no judge looked at them" in said
    ticks = [(value, total) for n, value, total in run.progress if n == node]
    assert [t for _, t in ticks] == [2 * 4 + 2 * 3] * len(ticks), "one bar over all draws"
    assert [v for v, _ in ticks] == sorted(v for v, _ in ticks) and ticks[-1][0] == 14


def test_it_is_the_samplers_own_picture_in_the_networks_space(server: ComfyServer) -> None:
    """The unsafe member is what KSampler makes of the same noise; latents are scaled."""
    pairs = made(server, "ksampler", count=1, seed=11, strength=0.0)
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    node = g.latent(g.sample(demo[0], demo[1], UNSAFE, seed=11 * 1_000_003, steps=4, cfg=4.0))
    run = server.run(g.api)
    assert torch.allclose(pairs.unsafe, latent(server, run, node) * SD15_SCALE, atol=1e-4)


def test_the_ends_of_strength(server: ComfyServer) -> None:
    """At 0 nothing is drawn anew; at 1 next to nothing is left of the picture: it is that of the safe prompt."""
    none, all_ = (made(server, f"strength-{s}", strength=s, seed=12) for s in (0.0, 1.0))
    assert torch.equal(none.unsafe, none.safe) and torch.equal(none.unsafe, all_.unsafe)
    some = made(server, "strength-half", strength=0.25, seed=12)
    moved = [float((p.safe - p.unsafe).norm()) for p in (some, all_)]
    assert 0 < moved[0] < moved[1]


def test_scenes_take_turns(server: ComfyServer) -> None:
    """One unsafe prompt for two safe ones: pair k is the one that scene k % 2 makes alone."""
    mixed = made(server, "scenes", count=3, seed=14, safe_prompt=f"{SAFE}\n\na house")
    alone = [made(server, f"scene-{n}", count=3, seed=14, safe_prompt=text) for n, text in enumerate((SAFE, "a house"))]
    assert torch.allclose(mixed.unsafe, alone[0].unsafe, atol=1e-4)
    for number, scene in enumerate((0, 1, 0)):
        assert torch.allclose(mixed.safe[number], alone[scene].safe[number], atol=1e-4)
    assert mixed.scenes == ((UNSAFE, SAFE), (UNSAFE, "a house")) and mixed.shown == (0, 1, 0)


def test_a_seed_owns_its_pairs(server: ComfyServer) -> None:
    one = made(server, "seed-a", seed=21)
    server.free()
    time.sleep(2)
    again, other, more = (
        made(server, "seed-b", seed=21, max_redraws=2),  # another widget, so it isn't the cached one
        made(server, "seed-c", seed=22),
        made(server, "seed-d", seed=21, count=3),
    )
    assert torch.equal(one.unsafe, again.unsafe) and torch.equal(one.safe, again.safe)
    assert not torch.allclose(one.unsafe, other.unsafe, atol=1e-2)
    assert torch.allclose(more.unsafe[:2], one.unsafe, atol=1e-4)


def test_the_judge_is_heard(server: ComfyServer) -> None:
    """What it says decides; how good the demo's pictures are doesn't."""
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    pair(g, demo, seed=31, judge=g.add("ProbeFixedJudge", says=0.9)[0], concept="cat")
    sentence = refusal(server, g)
    assert sentence.startswith(
        "judge: no pair passed. 0 of 2 pairs made; redrawn until the judge saw the concept: 0 times"
    )
    assert "still showed the concept after 1 redraws: 2 (pair 1, 2)" in sentence
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    pair(g, demo, seed=31, judge=g.add("ProbeFixedJudge", says=0.1)[0], concept="cat")
    assert "does not see the concept in the unsafe picture after 1 redraws: 2 (pair 1, 2)" in refusal(server, g)


def test_scenes_of_two_concepts_are_judged_for_their_own(server: ComfyServer) -> None:
    """Asked for the first one's word alone, the judge would leave out every pair of the other."""
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    inputs: dict[str, Any] = {"unsafe_prompt": "a cat\na house", "safe_prompt": "a house\na cat", "strength": 1.0}
    inputs |= {"count": 4, "seed": 81, "steps": 12, "judge": demo[3], "max_redraws": 3, "concept": "cat\nhouse"}
    saving(g, pair(g, demo, **inputs), "two-concepts")
    server.run(g.api)
    assert set(saved(server, "two-concepts").shown) == {0, 1}


def test_the_demos_judge(server: ComfyServer) -> None:
    """Each pair that comes out is judged rightly both ways, as the judge itself says afterwards."""
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    node = pair(
        g, demo, seed=41, steps=8, count=6, strength=0.9, max_redraws=4, judge=demo[3], concept="kitty",
        unsafe_prompt="a cat", safe_prompt="a house",
    )  # fmt: skip
    looks = [g.add("ErasureJudgePictures", judge=demo[3], images=node[i], concept="cat") for i in (0, 1)]
    run = server.run(g.api)
    unsafe, safe = (shown(run, n) for n in looks)
    n = len(unsafe.splitlines()[1].split(", "))
    assert unsafe.startswith(f"cat: seen in {n} of {n}") and safe.startswith(f"cat: seen in 0 of {n}")
    assert f"{n} of 6 pairs made" in shown(run, node) and "judged by emojicanvas-judge " in shown(run, node)


def test_real_pictures(server: ComfyServer) -> None:
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    node = pair(g, demo, images=plain(g, "red", -0.2), seed=51, count=9, strength=0.25)
    saving(g, node, "real")
    run = server.run(g.api)
    pairs, shots = saved(server, "real"), pictures(server, run, node)
    assert len(pairs) == 2, "as many as pictures, whatever count says"
    left = shots[0][:, :128].reshape(-1, 3).mean(0)
    assert left[0] > 200 and left[1] < 60 and left[2] < 60
    assert not torch.allclose(pairs.unsafe, pairs.safe, atol=1e-2)


def test_size(server: ComfyServer) -> None:
    assert made(server, "size", width=96, height=64, count=1, seed=61).unsafe.shape == (1, 4, 8, 12)


@pytest.mark.parametrize(
    ("widgets", "sentence"),
    [
        (
            {"safe_prompt": f"a dog\n {UNSAFE.upper()}  "},
            f"safe_prompt: {UNSAFE.upper()!r} is the same as unsafe_prompt",
        ),
        ({"safe_prompt": "\n".join(f"a{n}" for n in range(65))}, "safe_prompt: 65 lines, at most 64 scenes fit"),
        ({"unsafe_prompt": "a\nb\nc", "safe_prompt": "d\ne"}, "safe_prompt: 2 lines for 3 of unsafe_prompt"),
        ({"unsafe_prompt": " "}, "unsafe_prompt: describe a picture that shows the concept"),
        ({"safe_prompt": "a dog " * 500}, "safe_prompt: 3000 characters, at most 2000 fit"),
        ({"count": 0}, "count: 0 pairs; 1 to 1024 can be made at once"),
        ({"count": 5000}, "count: 5000 pairs; 1 to 1024 can be made at once"),
        ({"strength": 1.5}, "strength: 1.5 must lie between 0 and 1"),
    ],
)
def test_what_is_refused(server: ComfyServer, widgets: dict, sentence: str) -> None:
    g = Graph()
    pair(g, g.add("ErasureLoadDemo"), **widgets)
    assert sentence in refusal(server, g)


def test_prompts_through_links_are_checked_too(server: ComfyServer) -> None:
    g = Graph()
    text = g.add("PrimitiveStringMultiline", value=UNSAFE)[0]
    pair(g, g.add("ErasureLoadDemo"), safe_prompt=text)
    assert f"safe_prompt: {UNSAFE!r} is the same as unsafe_prompt" in refusal(server, g)


def test_a_judge_needs_a_word_that_it_knows(server: ComfyServer) -> None:
    for concept, sentence in (
        ("", "concept: write what the judge should look for"),
        ("zebra", "does not know 'zebra'"),
        ("cat\ndog", "concept: 2 lines for 1 scenes. Write one for all of them, or one for each"),
    ):
        g = Graph()
        demo = g.add("ErasureLoadDemo")
        pair(g, demo, seed=71, judge=demo[3], concept=concept)
        assert sentence in refusal(server, g)


def test_cancel(server: ComfyServer) -> None:
    """Within a step or two, and nothing of the model is left changed."""
    g = Graph()
    model, _, _ = g.demo()
    node = g.checksum(g.again(model))
    before = report(server.run(g.api), node)["sha256"]
    g = Graph()
    pair(g, g.add("ErasureLoadDemo"), seed=81, count=200, steps=50)
    stopped: list[float] = []

    def stop(event: dict) -> None:
        if event["type"] == "progress" and event["data"]["value"] > 8 and not stopped:
            stopped.append(time.monotonic())
            server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.run(g.api, on_event=stop)
    assert stopped and time.monotonic() - stopped[0] < 30
    g = Graph()
    model, _, _ = g.demo()
    node = g.checksum(g.again(model))
    assert report(server.run(g.api), node)["sha256"] == before


# Files


def test_saved_and_loaded(server: ComfyServer) -> None:
    pairs = made(server, "kept", count=1, seed=91)
    g = Graph()
    loaded = g.add("ErasureLoadPairs", file="kept.safetensors")
    g.add("ErasureSavePairs", pairs=loaded[0], name="kept-again", overwrite=True)
    said = g.show(loaded[1])
    run = server.run(g.api)
    again = saved(server, "kept-again")
    assert torch.equal(again.unsafe, pairs.unsafe) and torch.equal(again.safe, pairs.safe)
    assert shown(run, said).startswith("1 pairs: ") and "seed 91" in shown(run, said)


@pytest.mark.parametrize("name", ["../x", "a/b", "C:x", "", "con", ".hidden", "a\\b"])
def test_names_that_are_refused(server: ComfyServer, name: str) -> None:
    g = Graph()
    saving(g, pair(g, g.add("ErasureLoadDemo"), count=1), name)
    assert "name: " in refusal(server, g)


def test_a_file_is_not_replaced_unasked(server: ComfyServer) -> None:
    made(server, "once", count=1)
    g = Graph()
    saving(g, pair(g, g.add("ErasureLoadDemo"), count=1), "once", overwrite=False)
    assert "once.safetensors is already in models/erasure_pairs" in refusal(server, g)


def test_files_that_are_refused(server: ComfyServer) -> None:
    made(server, "whole", count=1)
    folder: Path = server.models / "erasure_pairs"
    (folder / "cut.safetensors").write_bytes((folder / "whole.safetensors").read_bytes()[:-8])
    (folder / "odd.safetensors").write_bytes(b"PK\x03\x04" + bytes(64))
    for file, sentence in (
        ("cut.safetensors", "cut.safetensors: damaged"),
        ("odd.safetensors", "pickled file"),
        ("missing.safetensors", "is not in models/erasure_pairs"),
        ("../loras/x.safetensors", "is not in models/erasure_pairs"),
    ):
        g = Graph()
        g.show(g.add("ErasureLoadPairs", file=file)[1])
        assert sentence in refusal(server, g)


# DUO


def test_duo_learns_from_them(server: ComfyServer) -> None:
    """The whole graph: pairs, DUO, a changed picture; and pairs of a file in their place."""
    made(server, "for-duo", seed=101)
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    widgets = {"iterations": 3, "batch": 2, "rank": 4, "beta": 100.0, "base_learning_rate": 1e-3}
    drawn = g.erase(demo[0], demo[1], "cat", method=("duo", widgets))
    g.api[drawn]["inputs"]["pairs"] = pair(g, demo, seed=101)[2]
    loaded = g.erase(demo[0], demo[1], "cat", method=("duo", widgets))
    g.api[loaded]["inputs"]["pairs"] = g.add("ErasureLoadPairs", file="for-duo.safetensors")[0]
    latents = [g.latent(g.sample(m, demo[1])) for m in (demo[0], drawn[0], loaded[0])]
    said = g.show(drawn[2])
    run = server.run(g.api)
    base, one, two = (latent(server, run, node) for node in latents)
    assert not torch.equal(base, one) and torch.equal(one, two)
    assert "cat" in shown(run, said)


def test_duo_trains_at_the_size_of_the_pairs(server: ComfyServer) -> None:
    """Pairs of another size than the model's own: everything that training draws has theirs."""
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    widgets = {"iterations": 3, "batch": 2, "rank": 4, "beta": 100.0, "base_learning_rate": 1e-3}
    erased = g.erase(demo[0], demo[1], "cat", method=("duo", widgets))
    g.api[erased]["inputs"]["pairs"] = pair(g, demo, seed=111, width=96, height=64)[2]
    latents = [g.latent(g.sample(m, demo[1])) for m in (demo[0], erased[0])]
    run = server.run(g.api)
    base, changed = (latent(server, run, node) for node in latents)
    assert not torch.equal(base, changed) and torch.isfinite(changed).all()
