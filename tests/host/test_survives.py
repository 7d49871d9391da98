"""What a person may type, connect or put into a folder: it works, or the node says in a sentence what to do."""

from __future__ import annotations

import json
import os
import pickle
import struct
from pathlib import Path

import pytest
import torch
from api_graphs import Graph, Link, latent, shown, weights
from comfy_client import ExecutionFailed, ExecutionInterrupted, PromptRejected
from comfy_host import ComfyServer
from safetensors.torch import save, save_file

from erasure_core import Concept, ConceptSpec, Delta, Erasure, Family, Header
from erasure_core import save as save_erasure

LONG = "a very long description of a cat that sits on a mat and thinks about dogs, "


def refusal(server: ComfyServer, graph: Graph) -> str:
    """The sentence that the person sees, before or during the run."""
    with pytest.raises((PromptRejected, ExecutionFailed)) as caught:
        server.run(graph.api)
    error = caught.value
    if isinstance(error, ExecutionFailed):
        return error.message
    return "\n".join(e["details"] for report in error.node_errors.values() for e in report["errors"])


def erased(g: Graph, concept: str = "cat", **widgets) -> tuple[Link, Link, Link]:
    """MODEL, ERASURE, report of Erase Concept on the demo model."""
    model, clip, _ = g.demo()
    node = g.erase(model, clip, concept, **widgets)
    g.show(node[2])
    return node[0], node[1], node[2]


# What is typed


@pytest.mark.parametrize(
    ("boxes", "sentence"),
    [
        ({"concept": ""}, "concept: nothing to erase. Write at least one word, for example: cigarette"),
        ({"concept": " \n\t , ,\n"}, "concept: nothing to erase. Write at least one word, for example: cigarette"),
        ({"concept": "​"}, "concept: one of the words to erase is empty. Write a word, or remove it"),
        (
            {"concept": "cat", "replace_with": "Cat "},
            "replace_with: 'cat' would be replaced by itself. Name something else",
        ),
        (
            {"concept": "cat\ndog", "replace_with": "dog"},
            "replace_with: 'dog' would be replaced by itself. Name something",
        ),
        (
            {"concept": "cat\ndog", "replace_with": "dog\ncar"},
            "replace_with: 'dog' is itself being erased (as 'dog'). Name",
        ),
        ({"concept": "cat", "keep": "tiger, CAT"}, "keep: 'CAT' is also in the concepts to erase. Remove it from one"),
        (
            {"concept": "cat", "keep": "dog, (cat:1.2)"},
            "keep: '(cat:1.2)' says the same as 'cat', which is to be erased.",
        ),
        (
            {"concept": "cat", "replace_with": "a Cat"},
            "replace_with: 'a Cat' says the same as 'cat', which is to be erased.",
        ),
        ({"concept": "cat, kitty\nKitty"}, "concept: 'Kitty' is listed twice. Remove one of them"),
        (
            {"concept": "a\nb\nc", "replace_with": "x\ny"},
            "replace_with: 2 lines for 3 concepts. Write one line for all",
        ),
        ({"concept": LONG.replace(",", "") * 40}, "characters, at most 2000 fit"),
        (
            {"concept": "cat", "keep": "dog\0"},
            "keep: 'dog\\x00' contains control characters. Type it again without them",
        ),
    ],
    ids=[
        "empty",
        "blank",
        "invisible",
        "itself",
        "itself-of-2",
        "erased-too",
        "kept",
        "kept-with-weight",
        "itself-with-article",
        "twice",
        "lines",
        "long",
        "control",
    ],
)
@pytest.mark.parametrize("typed", [True, False], ids=["typed", "linked"])
def test_refused_text(server: ComfyServer, boxes: dict[str, str], sentence: str, typed: bool) -> None:
    """The same sentence on the node before the run, and when the text comes through a link and is known only then."""
    g = Graph()
    if not typed:
        boxes = boxes | {"concept": g.add("PrimitiveStringMultiline", value=boxes["concept"])[0]}
    erased(g, **boxes)
    assert sentence in refusal(server, g)


@pytest.mark.parametrize(
    "concept",
    [
        LONG.replace(",", "") * 19,
        "kitten " * 280,
        "🐱",
        "👨‍👩‍👧, 🏴󠁧󠁢󠁷󠁬󠁳󠁿",
        "猫, 小貓\nねこ",
        "고양이",
        "قطة\nחתול",
        "می‌خواهم",
        "(cat:1.5)",
        "((cat)), [cat]",
        "cat \\(cartoon\\)",
        "{cat|dog}",
        "cat%s %(x)s {0} {}",
        'cat\'s "toy" <lora:x:1> & </b>',
        "a\r\nb",
        "CAT",
    ],
    ids=str,
)
def test_any_script_and_length(server: ComfyServer, concept: str) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    node = g.erase(model, clip, concept, keep="dog")
    base, after, said = g.weights(model), g.weights(node[0]), g.show(node[2])
    run = server.run(g.api)
    assert shown(run, said).startswith("suppressed: ")
    before, changed = weights(server, g, base), weights(server, g, after)
    assert all(torch.isfinite(w).all() for w in changed.values())
    assert all(not torch.equal(w, before[site]) for site, w in changed.items())


def test_weighted_words_count_as_one(server: ComfyServer) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    plain, weighted = (
        g.weights(g.erase(model, clip, c, keep=k)[0]) for c, k in (("cat", "dog"), ("(cat:1.5)", "(dog:0.2)"))
    )
    server.run(g.api)
    ours, theirs = weights(server, g, plain), weights(server, g, weighted)
    assert all(torch.equal(w, theirs[site]) for site, w in ours.items())


def test_embeddings_can_be_erased_and_kept(server: ComfyServer) -> None:
    """A textual inversion: for example one that Mine Dark Embeddings saved."""
    rows = torch.randn(2, 128, generator=torch.Generator().manual_seed(1)) * 0.3
    save_file({"clip_l": rows}, server.models / "embeddings" / "dark.safetensors")
    g = Graph()
    base_model, _, _ = g.demo()
    model, _, _ = erased(g, "embedding:dark", keep="embedding:dark dog")
    base, after = g.weights(base_model), g.weights(model)
    server.run(g.api)
    before, changed = weights(server, g, base), weights(server, g, after)
    assert all(not torch.equal(w, before[site]) for site, w in changed.items())


def test_an_embedding_that_was_written_anew_is_read_anew(server: ComfyServer) -> None:
    """What the CLIP said of its name before is not what it says now."""
    rows = torch.randn(2, 2, 128, generator=torch.Generator().manual_seed(1)) * 0.3
    made = []
    for content in rows:
        save_file({"clip_l": content}, server.models / "embeddings" / "anew.safetensors")
        g = Graph()
        model, clip, _ = g.demo()
        node = g.weights(g.erase(g.again(model), clip, "embedding:anew", keep="dog")[0])
        server.run(g.api)
        made.append(weights(server, g, node))
    assert all(not torch.equal(w, made[1][site]) for site, w in made[0].items())


@pytest.mark.parametrize("concept", ["embedding:missing", "cat, embedding:missing", "embedding:wide"])
def test_missing_embeddings_are_named(server: ComfyServer, concept: str) -> None:
    """ComfyUI drops an embedding that it can't find or that is of another width; erasing nothing would look like success."""
    save_file({"clip_l": torch.ones(1, 768)}, server.models / "embeddings" / "wide.safetensors")
    g = Graph()
    erased(g, concept)
    sentence = refusal(server, g)
    assert sentence.startswith(
        f"concept: to this CLIP, 'embedding:{concept.rpartition(':')[2]}' means the same as nothing"
    )
    assert "models/embeddings" in sentence


def test_many_concepts(server: ComfyServer) -> None:
    g = Graph()
    model, _, _ = erased(
        g, "\n".join(f"thing number {i}" for i in range(100)), keep=", ".join(f"kept {i}" for i in range(100))
    )
    after = g.weights(model)
    server.run(g.api)
    assert all(torch.isfinite(w).all() for w in weights(server, g, after).values())


@pytest.mark.parametrize(
    ("name", "widgets", "sentence"),
    [
        ("uce", {"ridge": 0.0}, "ridge"),
        ("uce", {"rows": "some"}, "UCE: rows = 'some' is none of 'last', 'last to end', 'summary', 'all'"),
        ("rece", {"rounds": 1000}, "rounds"),
        ("rece", {"derivation": "x"}, "RECE: derivation = 'x' is none of 'regzero', "),
        ("speed", {"threshold": 1e9}, "threshold"),
    ],
)
def test_settings_out_of_range(server: ComfyServer, name: str, widgets: dict, sentence: str) -> None:
    g = Graph()
    erased(g, "cat", method=(name, widgets))
    assert sentence in refusal(server, g)


def test_unknown_choices(server: ComfyServer) -> None:
    """Only API calls can send them."""
    g = Graph()
    erased(g, "cat", quality="perfect")
    assert refusal(server, g) == "quality: 'perfect' is none of fast, balanced, thorough"
    for what, known in (
        ("folder", "loras, erasure"),
        ("layout", "LoRA (ComfyUI"),
        ("precision", "full (float32), half"),
    ):
        g = Graph()
        _, erasure, _ = erased(g, "cat")
        g.save(erasure, "choice", **{what: "../x"})
        assert refusal(server, g).startswith(f"{what}: '../x' is not one of {known}")


# What is connected


@pytest.mark.parametrize(("method", "name"), [("uce", "Flux"), ("rece", "Flux"), ("speed", "Flux"), ("uce", "Video")])
def test_model_without_cross_attention(server: ComfyServer, method: str, name: str) -> None:
    """Flux has no attn2; that of LTX-Video reads what a projection makes of the text."""
    g = Graph()
    _, clip, _ = g.demo()
    other = g.add(f"Probe{name}Model")[0]
    g.show(g.erase(other, clip, "cat", method=(method, {}))[2])
    sentence = refusal(server, g)
    assert sentence.startswith(
        f"model: {'ltxv' if name == 'Video' else 'flux'} has no separate text cross-attention (attn2.to_k / to_v)"
    )
    assert sentence.endswith("It works on SD 1.x, SD 2.x and SDXL checkpoints")


def test_erasure_on_a_model_without_cross_attention(server: ComfyServer) -> None:
    g = Graph()
    _, erasure, _ = erased(g)
    g.weights(g.apply(g.add("ProbeFluxModel")[0], erasure))
    assert "this is a model without text cross-attention" in refusal(server, g)


def of_sd15(path: Path, value: float = 0.01) -> Path:
    """An erasure for SD 1.5, written by the core."""
    generator = torch.Generator().manual_seed(0)
    deltas = {}
    for block, width in ((1, 320), (4, 640), (7, 1280)):
        for leaf in ("to_k", "to_v"):
            up = torch.randn(width, 2, generator=generator) * value
            down = torch.randn(2, 768, generator=generator)
            deltas[f"input_blocks.{block}.1.transformer_blocks.0.attn2.{leaf}"] = Delta(up, down)
    spec = ConceptSpec((Concept(("cat",), "dog"),), ("tiger",))
    header = Header("uce", {}, spec, Family("sd15", 768, 2, 4), "0" * 16, "0.1.0")
    return save_erasure(Erasure(header, deltas), path)


@pytest.mark.parametrize("strength", [1.0, 0.0])
def test_erasure_of_another_family(server: ComfyServer, strength: float) -> None:
    of_sd15(server.models / "erasure" / "of-sd15.safetensors")
    g = Graph()
    model, clip, _ = g.demo()
    loaded = g.load("erasure/of-sd15.safetensors")
    g.latent(g.sample(g.apply(model, loaded[0], strength), clip))
    assert refusal(server, g) == (
        "erasure: it was made for sd15 (text width 768), but this is a model with text width 128: 6 of 6 weights do not fit, "
        "first input_blocks.1.1.transformer_blocks.0.attn2.to_k. Erase the concept on this model instead"
    )


def test_merge_with_another_family(server: ComfyServer) -> None:
    of_sd15(server.models / "erasure" / "of-sd15.safetensors")
    g = Graph()
    model, clip, _ = g.demo()
    ours = g.erase(model, clip, "cat")
    g.show(g.merge(model, clip, ours[1], g.load("erasure/of-sd15.safetensors")[0])[2])
    assert "it was made for sd15 (text width 768), but this is a model with text width 128" in refusal(server, g)


# What lies in the folders


class _Bomb:
    def __reduce__(self):
        return (os.mkdir, ("pickle-was-run",))


def pickled(path: Path) -> None:
    torch.save({"lora_unet_x.lora_up.weight": torch.ones(2, 2), "bomb": _Bomb()}, path)


def plain_pickle(path: Path) -> None:
    path.write_bytes(pickle.dumps(_Bomb(), protocol=4))


def truncated(path: Path) -> None:
    of_sd15(path)
    path.write_bytes(path.read_bytes()[:-1000])


def huge_header(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", 1 << 40) + b'{"a":1}' + bytes(100))


def foreign_lora(path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": torch.ones(4, 2)}, path)


def broken_header(path: Path) -> None:
    path.write_bytes(save({"x": torch.ones(1)}, {"erasure": "{not json"}))


def wrong_tensors(path: Path) -> None:
    of_sd15(path)
    raw = path.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    metadata = json.loads(raw[8 : 8 + length])["__metadata__"]
    path.write_bytes(save({"something.else": torch.ones(2, 2)}, metadata))


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = {
    "pickled": (pickled, "this is a pickled file (.pt / .ckpt), which can run code. Only .safetensors files are read"),
    "plain-pickle": (plain_pickle, "this is a pickled file (.pt / .ckpt), which can run code"),
    "truncated": (truncated, "Copy or download it again"),
    "huge-header": (huge_header, "its header claims 1099511627776 bytes, at most 8388608 are read"),
    "foreign-lora": (foreign_lora, "a safetensors file, but not an erasure. If it is a LoRA, use the Load LoRA node"),
    "broken-header": (broken_header, "header: "),
    "empty": (empty, "it is empty or cut off. Copy or download it again"),
}


@pytest.mark.parametrize("folder", ["loras", "erasure"])
@pytest.mark.parametrize("kind", FILES)
def test_bad_files_are_not_listed_and_refused_by_name(server: ComfyServer, kind: str, folder: str) -> None:
    make, sentence = FILES[kind]
    path = server.models / folder / f"bad-{kind}.safetensors"
    make(path)
    listed = server.object_info("ErasureLoad")["ErasureLoad"]["input"]["required"]["file"][0]
    assert not [name for name in listed if "bad-" in name]
    g = Graph()
    g.show(g.load(f"{folder}/{path.name}")[1])
    assert sentence in refusal(server, g)
    assert not list(server.base.rglob("pickle-was-run"))
    assert not Path("pickle-was-run").exists()
    path.unlink()


def poisoned(path: Path) -> None:
    """An erasure with one NaN in it, which saving refuses: so the bits are written over."""
    of_sd15(path)
    raw = bytearray(path.read_bytes())
    raw[-4:] = struct.pack("<f", float("nan"))
    path.write_bytes(raw)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (poisoned, "contains values that are not numbers (NaN or infinite)"),
        (wrong_tensors, "lora_up.weight is missing; the file is incomplete"),
    ],
    ids=["nan", "other-tensors"],
)
def test_bad_contents_are_refused(server: ComfyServer, make, sentence: str) -> None:
    path = server.models / "erasure" / "poisoned.safetensors"
    make(path)
    g = Graph()
    g.show(g.load("erasure/poisoned.safetensors")[1])
    answer = refusal(server, g)
    assert answer.startswith("poisoned.safetensors: ")
    assert sentence in answer
    path.unlink()


OUTSIDE = [
    "../x",
    "..\\x",
    "a/b",
    "a\\b",
    "/tmp/x",
    "C:\\x",
    "c:x",
    "..",
    ".",
    "",
    "   ",
    ".hidden",
    "nul",
    "x\0y",
    "x" * 300,
]


@pytest.mark.parametrize("name", OUTSIDE, ids=repr)
def test_save_stays_in_its_folder(server: ComfyServer, name: str) -> None:
    before = sorted(server.base.rglob("*.safetensors"))
    g = Graph()
    _, erasure, _ = erased(g)
    g.save(erasure, name)
    sentence = refusal(server, g)
    assert "name: " in sentence
    assert any(
        s in sentence for s in ("must be a plain file name", "must have 1 to 150 bytes", "is reserved by Windows")
    )
    assert sorted(server.base.rglob("*.safetensors")) == before


@pytest.mark.parametrize(
    "file",
    [
        "loras/../secret.safetensors",
        "erasure/..\\secret.safetensors",
        "checkpoints/secret.safetensors",
        "../secret.safetensors",
        "loras//etc/passwd",
        "C:\\secret.safetensors",
        "loras/C:\\secret.safetensors",
        "secret.safetensors",
        "loras/",
        "",
        "loras/none.safetensors",
    ],
)
def test_load_stays_in_its_folders(server: ComfyServer, file: str) -> None:
    of_sd15(server.models / "secret.safetensors")
    of_sd15(server.models / "checkpoints" / "secret.safetensors")
    g = Graph()
    g.show(g.load(file)[1])
    assert (
        f"file: {file!r} is not in models/loras or models/erasure. Put it there and press R, or choose another from the list"
        in refusal(server, g)
    )


def test_existing_files_stay_unless_overwrite(server: ComfyServer) -> None:
    path = server.models / "loras" / "mine.safetensors"
    foreign_lora(path)
    before = path.read_bytes()

    def graph(overwrite: bool) -> Graph:
        g = Graph()
        _, erasure, _ = erased(g)
        g.save(erasure, "mine", overwrite=overwrite)
        return g

    assert refusal(server, graph(False)) == (
        "name: mine.safetensors is already in models/loras. Choose another name or switch overwrite on"
    )
    assert path.read_bytes() == before
    server.run(graph(True).api)
    assert path.read_bytes() != before


def test_no_model_carries_an_erasure_twice(server: ComfyServer) -> None:
    """Erase Concept hands out the patched model; with Apply Erasure behind it strength 0 would not undo anything."""
    for strength in (0.0, 1.0):
        g = Graph()
        model, erasure, _ = erased(g)
        g.latent(g.sample(g.apply(model, erasure, strength), g.demo()[1]))
        assert refusal(server, g).startswith(
            "model: it carries this erasure of cat already. Connect the model from before it"
        )


def test_saving_the_same_again_is_no_error(server: ComfyServer) -> None:
    """The same graph after a restart: the file is there already, and stays as it was."""

    def graph(**widgets) -> Graph:
        g = Graph()
        g.save(erased(g)[1], "twice", **widgets)
        return g

    server.run(graph().api)
    path = server.models / "loras" / "twice.safetensors"
    before = path.stat().st_mtime_ns
    server.run(graph(overwrite=False).api)
    assert path.stat().st_mtime_ns == before
    server.run(graph(overwrite=True).api)
    assert path.stat().st_mtime_ns == before, "who has it open could not be overwritten under"
    for other in ({"precision": "half (float16)"}, {"layout": "diffusers"}):
        assert "is already in models/loras" in refusal(server, graph(**other))
    assert path.stat().st_mtime_ns == before


def test_write_errors_leave_nothing(server: ComfyServer) -> None:
    """The last step of writing fails here (as on a full disk): a folder has the file's name."""
    path = server.models / "erasure" / "taken.safetensors"
    path.mkdir()
    before = sorted((server.models / "erasure").iterdir())
    g = Graph()
    _, erasure, _ = erased(g)
    g.save(erasure, "taken", folder="erasure", overwrite=True)
    sentence = refusal(server, g)
    assert sentence.startswith("taken.safetensors: could not be written (")
    assert sentence.endswith("Free some space or choose another folder")
    assert sorted((server.models / "erasure").iterdir()) == before
    path.rmdir()


# Cancelling


@pytest.mark.parametrize("when", ["while encoding", "while solving"])
def test_cancel_while_erasing(server: ComfyServer, when: str) -> None:
    """SPEED with much to protect takes its time."""
    words = [f"thing number {i}" for i in range(150)]

    def base() -> torch.Tensor:
        g = Graph()
        model, clip, _ = g.demo()
        saved = g.latent(g.sample(g.again(model), clip))
        return latent(server, server.run(g.api), saved)

    before, files = base(), sorted(server.models.rglob("*"))
    g = Graph()
    model, clip, _ = g.demo()
    concept = "\n".join(f"{word} {when}" for word in words)
    node = g.erase(model, clip, concept, keep=", ".join(words), method=("speed", {"augment": 100}))
    g.save(node[1], "cancelled")
    g.latent(g.sample(node[0], clip))

    def interrupt(event: dict) -> None:
        kind, data = event["type"], event["data"]
        if data.get("node") == node and kind == ("executing" if when == "while encoding" else "progress"):
            server.interrupt()

    with pytest.raises(ExecutionInterrupted, match="ErasureEraseConcept"):
        server.run(g.api, on_event=interrupt)
    assert sorted(server.models.rglob("*")) == files
    assert torch.equal(base(), before)
