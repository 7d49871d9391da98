"""Judges in the real server: the demo's, CLIP's two halves, example pictures, ONNX files; and how each is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import tiny_onnx
from api_graphs import Graph, Link, Node, shown
from comfy_client import ComfyError, ExecutionFailed, PromptRejected
from comfy_host import ComfyServer


def asked(g: Graph, judge: Link, images: Link, concept: str) -> Node:
    return g.add("ErasureJudgePictures", judge=judge, images=images, concept=concept)


def plain(g: Graph, colour: str, shift: float = 0.0) -> Link:
    return g.add("ProbePlain", colour=colour, shift=shift)[0]


def figures(text: str) -> list[float]:
    return [float(p) for p in text.splitlines()[1].split(", ")]


def refusal(server: ComfyServer, graph: Graph) -> str:
    with pytest.raises(ComfyError) as caught:
        server.run(graph.api)
    error = caught.value
    if isinstance(error, PromptRejected):
        return "\n".join(e["details"] for report in error.node_errors.values() for e in report["errors"])
    assert isinstance(error, ExecutionFailed)
    return error.message


# EmojiCanvas


@pytest.mark.parametrize(("concept", "label"), [("cat", "cat"), ("kitty", "cat"), ("in neon style", "neon")])
def test_the_demos_judge_knows_the_words_of_prompts(server: ComfyServer, concept: str, label: str) -> None:
    g = Graph()
    demo = g.add("ErasureLoadDemo")
    latents = g.sample(demo[0], demo[1], "a cat", steps=2)
    images = g.add("VAEDecode", vae=demo[2], samples=latents)[0]
    one, two = asked(g, demo[3], images, concept), asked(g, demo[3], images, label)
    run = server.run(g.api)
    assert shown(run, one).startswith(f"{concept}: seen in ")
    assert "(emojicanvas-judge " in shown(run, one)
    assert figures(shown(run, one)) == figures(shown(run, two))


def test_the_demos_judge_says_what_it_knows(server: ComfyServer) -> None:
    g = Graph()
    asked(g, g.add("ErasureLoadDemo")[3], plain(g, "red"), "zebra")
    sentence = refusal(server, g)
    assert sentence.startswith("judge: emojicanvas-judge does not know 'zebra'. It knows: cat, dog, ")
    assert sentence.endswith("brindlewash, and synonyms of these")


# CLIP


def clip_judge(g: Graph, vision: Link, clip: Link, **widgets) -> Link:
    inputs = {"contrasts": "blue\ngreen\nblack\nwhite", "threshold": 0.5} | widgets
    return g.add("ErasureJudgeCLIP", clip_vision=vision, clip=clip, **inputs)[0]


def test_clip_halves_that_belong_together(server: ComfyServer) -> None:
    g = Graph()
    vision = g.add("ProbeTinyVision", width=128)[0]
    judge = clip_judge(g, vision, g.add("ProbeAgreeingText", clip_vision=vision)[0])
    looked = {c: asked(g, judge, plain(g, c), "red") for c in ("red", "blue")}
    run = server.run(g.api)
    red, blue = (figures(shown(run, looked[c])) for c in ("red", "blue"))
    assert min(red) > max(blue)
    assert shown(run, looked["red"]).endswith("\nthe judge's own error is not known and not counted")


def test_clip_halves_of_different_models(server: ComfyServer) -> None:
    """The demo's projection is the identity: as that of an SD 1.x checkpoint, nothing was trained for it."""
    g = Graph()
    _, clip, _ = g.demo()
    asked(g, clip_judge(g, g.add("ProbeTinyVision", width=128)[0], clip), plain(g, "red"), "red")
    assert "don't agree which is which" in refusal(server, g)
    g = Graph()
    _, clip, _ = g.demo()
    asked(g, clip_judge(g, g.add("ProbeTinyVision", width=64)[0], clip), plain(g, "red"), "red")
    assert "its features have 64 numbers, those of this clip 128" in refusal(server, g)


def test_clip_needs_contrasts(server: ComfyServer) -> None:
    g = Graph()
    vision = g.add("ProbeTinyVision", width=128)[0]
    clip = g.add("ProbeAgreeingText", clip_vision=vision)[0]
    asked(g, clip_judge(g, vision, clip, contrasts=" \n"), plain(g, "red"), "red")
    assert refusal(server, g).startswith("contrasts: name at least one thing")


def test_contrasts_are_in_the_judges_version(server: ComfyServer) -> None:
    g = Graph()
    vision = g.add("ProbeTinyVision", width=128)[0]
    clip = g.add("ProbeAgreeingText", clip_vision=vision)[0]
    judges = [clip_judge(g, vision, clip), clip_judge(g, vision, clip, contrasts="blue\nblack")]
    looked = [asked(g, judge, plain(g, "red"), "red") for judge in judges]
    run = server.run(g.api)
    one, two = (shown(run, node).partition("(clip-zero-shot 1-")[2][:8] for node in looked)
    assert len(one) == len(two) == 8 and one != two


# Examples


def example_judge(g: Graph, examples: Link, others: Link, concept: str = "red, crimson") -> Link:
    vision = g.add("ProbeTinyVision", width=48)[0]
    inputs = {"clip_vision": vision, "concept": concept, "examples": examples, "others": others, "threshold": 0.5}
    return g.add("ErasureJudgeExamples", **inputs)[0]


def test_examples_make_a_judge(server: ComfyServer) -> None:
    g = Graph()
    judge = example_judge(g, plain(g, "red", -0.1), plain(g, "blue", -0.1))
    red, blue = (asked(g, judge, plain(g, c, -0.05), "Crimson") for c in ("red", "blue"))
    run = server.run(g.api)
    assert "(examples 1-" in shown(run, red) and ", threshold 0.5, knows red, crimson)" in shown(run, red)
    assert "seen in 2 of 2 pictures, " in shown(run, red) and "seen in 0 of 2 pictures, " in shown(run, blue)


@pytest.mark.parametrize(
    ("examples", "asked_for", "sentence"),
    [
        ("red", "zebra", "judge: examples does not know 'zebra'. It knows: red, crimson"),
        ("blue", "red", "examples: to this image encoder they look no more alike"),
    ],
)
def test_examples_that_are_refused(server: ComfyServer, examples: str, asked_for: str, sentence: str) -> None:
    g = Graph()
    judge = example_judge(g, plain(g, examples, -0.1), plain(g, "blue", -0.1))
    asked(g, judge, plain(g, "red"), asked_for)
    assert refusal(server, g).startswith(sentence)


# ONNX


def judges_folder(server: ComfyServer) -> Path:
    """Where a person puts ONNX files, after making the folder."""
    folder = server.models / "erasure_judges"
    folder.mkdir(exist_ok=True)
    return folder


def onnx_judge(g: Graph, file: str, **widgets) -> Node:
    inputs = {"labels": "red\ngreen\nblue", "groups": "", "pixels": "0 to 1", "outputs": "softmax"}
    return g.add("ErasureJudgeONNX", file=file, **inputs | {"threshold": 0.5, "side": 224} | widgets)


def test_onnx_file(server: ComfyServer) -> None:
    pytest.importorskip("onnxruntime")
    folder = judges_folder(server)
    tiny_onnx.mean_colour(folder / "rgb.onnx")
    (folder / "rgb.txt").write_text("red\ngreen\nblue\n")
    assert "rgb.onnx" in server.get("/models/erasure_judges").json()
    g = Graph()
    judge = onnx_judge(g, "rgb.onnx", labels="", groups="warm = red, green")
    looked = [asked(g, judge[0], plain(g, "red"), word) for word in ("red", "warm", "blue")]
    said = g.show(judge[1])
    run = server.run(g.api)
    red, warm, blue = (figures(shown(run, node))[0] for node in looked)
    assert red > blue and warm == pytest.approx(1 - blue, abs=0.02)
    assert shown(run, said) == "rgb knows: warm, red, green, blue"


@pytest.mark.parametrize(
    ("file", "widgets", "sentence"),
    [
        ("none.onnx", {}, "file: 'none.onnx' is not in models/erasure_judges"),
        ("../outside.onnx", {}, "is not in models/erasure_judges"),
        ("rgb2.onnx", {"labels": "red"}, "labels: 1 names, but rgb2 has outputs of shape"),
        ("rgb2.onnx", {"labels": " \n"}, "labels: write what the outputs of rgb2.onnx mean"),
        ("rgb2.onnx", {"groups": "warm"}, "groups: 'warm' must read: name = label, label"),
        ("rgb2.onnx", {"pixels": "odd"}, "pixels: 'odd' is not one of 0 to 1, "),
        ("rgb2.onnx", {"outputs": "odd"}, "outputs: 'odd' is not one of softmax, "),
        ("broken.onnx", {}, "file: broken.onnx can't be read as an ONNX model"),
    ],
)
def test_onnx_files_that_are_refused(server: ComfyServer, file: str, widgets: dict, sentence: str) -> None:
    pytest.importorskip("onnxruntime")
    folder = judges_folder(server)
    tiny_onnx.mean_colour(folder / "rgb2.onnx", (1, 3, 8, 8))
    tiny_onnx.mean_colour(server.models / "outside.onnx", (1, 3, 8, 8))
    (folder / "broken.onnx").write_bytes(b"\x80\x04 not this")
    g = Graph()
    asked(g, onnx_judge(g, file, **widgets)[0], plain(g, "red"), "red")
    assert sentence in refusal(server, g)


def test_onnx_files_of_other_machines_and_weights_beside_them(server: ComfyServer) -> None:
    """A folder and slash of Windows; a linked name; and large models have their weights in a second file."""
    pytest.importorskip("onnxruntime")
    folder = judges_folder(server)
    tiny_onnx.mean_colour(folder / "Far Away.onnx", (1, 3, 8, 8))

    def graph(file) -> tuple[Graph, Node]:
        g = Graph()
        judge = onnx_judge(g, file)
        g.show(judge[1])
        return g, judge

    server.run(graph("sub\\far away.onnx")[0].api)
    again, judge = graph("sub\\far away.onnx")
    assert judge in server.run(again.api).cached
    (folder / "Far Away.onnx.data").write_bytes(b"weights")
    again, judge = graph("sub\\far away.onnx")
    assert judge in server.run(again.api).executed
    linked = Graph()
    linked.show(onnx_judge(linked, linked.add("ProbeChoice", value="Far Away.onnx")[0])[1])
    server.run(linked.api)
    assert "NoneType" not in server.log_tail()
