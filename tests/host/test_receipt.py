"""Erasure Receipt in a real ComfyUI: measured, saved, read back in another graph, and never believed blindly."""

from __future__ import annotations

import io
import json
import re
import uuid
from pathlib import Path

import pytest
import torch
from api_graphs import DIFFUSERS, Graph, Link, Node, shown
from comfy_client import ComfyError, ExecutionInterrupted, PromptRejected
from comfy_host import ComfyServer
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erasure_core import load
from erasure_core.vocabulary import VOCABULARY

QUICK = {
    "strength": 1.0, "prompt": "a {}", "pictures": 2, "first_seed": 5000, "erased_words": 2, "kept_words": 1,
    "steps": 6, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "width": 0, "height": 0,
    "fp16": False, "bf16": False, "fp8_e4m3": False, "int8": False,
}  # fmt: skip
ERASURE, SHEET, REPORT = range(3)


def receipt(g: Graph, erasure: Link, *, judged: bool = True, **widgets) -> Node:
    demo = g.add("ErasureLoadDemo")
    inputs = {"model": demo[0], "clip": demo[1], "vae": demo[2], "erasure": erasure, **QUICK, **widgets}
    return g.add("ErasureReceipt", **inputs, **({"judge": demo[3]} if judged else {}))


def erased(g: Graph, concept: str = "bomb, explosive", keep: str = "rose, house") -> Link:
    model, clip, _ = g.demo()
    return g.erase(model, clip, concept, keep=keep)[1]


def name() -> str:
    return f"receipt-{uuid.uuid4().hex[:8]}"


@pytest.fixture(scope="module")
def saved(server: ComfyServer) -> Path:
    """A file with a receipt, its JSON and its picture beside it."""
    g, stem = Graph(), name()
    made = receipt(g, erased(g), int8=True)
    g.save(made[ERASURE], stem)
    server.run(g.api)
    return server.models / "loras" / f"{stem}.safetensors"


def reported(server: ComfyServer, file: str, model: Link | None = None, g: Graph | None = None) -> str:
    g = g or Graph()
    loaded = g.load(file)
    if model is not None:
        g.api[loaded]["inputs"]["model"] = model
    text = g.show(loaded[1])
    return shown(server.run(g.api), text)


def altered(file: Path, change) -> str:
    """A copy whose tensors and metadata ``change`` has been at, as Load Erasure names it."""
    with safe_open(file, framework="pt") as f:
        metadata = f.metadata()
    tensors = load_file(file)
    change(tensors, metadata)
    copy = file.with_name(f"{name()}.safetensors")
    save_file(tensors, copy, metadata)
    return f"loras/{copy.name}"


def test_it_is_saved_and_read_in_another_graph(server: ComfyServer, saved: Path) -> None:
    beside = saved.with_name(f"{saved.stem}.receipt.json")
    raw = json.loads(beside.read_text())
    assert [c["word"] for c in raw["words"]] == ["bomb", "explosive"] and raw["words"][1]["asked"] == "bomb"
    assert raw["pooled"]["before"]["n"] == 4 and raw["drawn"]["seeds"] == [5000, 5001]
    assert (raw["drawn"]["width"], raw["drawn"]["height"]) == (128, 128)
    assert raw["pooled"]["after"]["hits"] < raw["pooled"]["before"]["hits"]
    assert "bomb" in raw["judge"]["labels"] and raw["judge"]["error"]["alarms"]["n"] and raw["carried"] == []
    for counted in (*raw["words"], *raw["kept"]):
        assert dict(counted["curve"])[0.5] == counted["after"]["hits"] and counted["after"]["corrected"]["high"] <= 1
    assert raw["survival"][0]["after"]["corrected"] and raw["pooled"]["kept_after"]["corrected"]
    picture = Image.open(saved.with_name(f"{saved.stem}.receipt.png"))
    assert picture.width > 500 and picture.height > 500
    erasure = load(saved)
    assert erasure.receipt is not None and erasure.receipt.digest == raw["digest"]
    said = reported(server, f"loras/{saved.name}")
    assert erasure.receipt.summary() in said and "WARNING" not in said
    assert "stored in int8" in said and "attacks: none was run" in said

    g = Graph()
    model, _, _ = g.demo()
    assert "WARNING" not in reported(server, f"loras/{saved.name}", model, g)


def test_what_is_on_the_model_besides_is_named(server: ComfyServer) -> None:
    """And the word's place may be written as in prompts of attacks."""
    g = Graph()
    model, clip, _ = g.demo()
    before = g.erase(model, clip, "tulip", method=("uce", {}))[0]
    said = g.show(receipt(g, erased(g), model=before, pictures=1, prompt="a {concept}")[REPORT])
    text = shown(server.run(g.api), said)
    assert "the model also carried: an erasure of tulip by uce" in text and 'pictures of "a {}"' in text


def test_another_model_is_named(server: ComfyServer, saved: Path) -> None:
    for other in ("ProbeFluxModel", "ProbeTinyXL"):
        g = Graph()
        said = reported(server, f"loras/{saved.name}", g.add(other)[0], g)
        assert "WARNING: this is not the model that the receipt was made on" in said


def test_other_weights_of_the_same_model_are_named(server: ComfyServer, saved: Path) -> None:
    """An erasure in front of the loaded one is a finetune of the base: the fingerprint doesn't mind."""
    assert len(json.loads(saved.with_name(f"{saved.stem}.receipt.json").read_text())["weights"]) == 64
    g = Graph()
    model, clip, _ = g.demo()
    said = reported(server, f"loras/{saved.name}", g.erase(model, clip, "tulip", method=("uce", {}))[0], g)
    assert "note: the receipt was made on the same base with other weights" in said and "WARNING" not in said
    g = Graph()
    assert "with other weights" not in reported(server, f"loras/{saved.name}", g.demo()[0], g)


def test_changed_tensors_are_named(server: ComfyServer, saved: Path) -> None:
    def half(tensors, _):
        first = next(k for k in tensors if k.endswith("lora_up.weight"))
        tensors[first] = tensors[first] / 2

    said = reported(server, altered(saved, half))
    assert "WARNING: the receipt in this file is not that of this erasure: the numbers were changed" in said
    assert "seen in" not in said


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("<script>alert(1)</script>", "not valid JSON"),
        ('{"format":1,"method":"<img src=x onerror=alert(1)>"}', "receipt: erase must be a list"),
        ("[" * 50_000, "not valid JSON"),
        ('{"x":"' + "y" * (1 << 20) + '"}', "at most 1048576 are read"),
        ('{"format":99}', "format 99 is not 1. Update"),
    ],
    ids=["html", "fields", "deep", "megabytes", "newer"],
)
def test_a_hostile_receipt_is_a_sentence_and_the_erasure_still_loads(
    server: ComfyServer, saved: Path, text: str, why: str
) -> None:
    def change(_, metadata):
        metadata["erasure_receipt"] = text

    said = reported(server, altered(saved, change))
    assert "suppressed: bomb, explosive" in said and "receipt: it can't be read" in said and why in said
    assert "<" not in said.split("receipt:", 1)[1]


def test_markup_in_a_receipt_stays_text(server: ComfyServer, saved: Path) -> None:
    def change(_, metadata):
        raw = json.loads(metadata["erasure_receipt"])
        raw["judge"]["name"] = "<b onclick=x>\x1b[31m judge"
        metadata["erasure_receipt"] = json.dumps(raw)

    said = reported(server, altered(saved, change))
    assert "judge <b onclick=x> [31m judge" in said and "\x1b" not in said


def test_an_erasure_without_one_says_so(server: ComfyServer) -> None:
    g, stem = Graph(), name()
    g.save(erased(g, "tulip"), stem)
    server.run(g.api)
    assert "no receipt: nothing was measured" in reported(server, f"loras/{stem}.safetensors")
    assert not (server.models / "loras" / f"{stem}.receipt.json").exists()


def test_half_precision_and_other_layouts_keep_it(server: ComfyServer, saved: Path) -> None:
    stem = name()
    g = Graph()
    loaded = g.load(f"loras/{saved.name}")
    g.save(loaded[0], stem, layout=DIFFUSERS, precision="half (float16)")
    server.run(g.api)
    said = reported(server, f"loras/{stem}.safetensors")
    assert "receipt: bomb suppressed by" in said and "stores the numbers in float16" in said
    assert not (server.models / "loras" / f"{stem}.receipt.png").exists(), "the pictures stayed with the first file"


def test_an_erasure_saved_over_itself_keeps_its_picture(server: ComfyServer, saved: Path) -> None:
    stem = name()
    kinds = ("safetensors", "receipt.json", "receipt.png")
    for kind in kinds:
        (saved.with_name(f"{stem}.{kind}")).write_bytes(saved.with_name(f"{saved.stem}.{kind}").read_bytes())
    picture = saved.with_name(f"{stem}.receipt.png").read_bytes()
    g = Graph()
    g.save(g.load(f"loras/{stem}.safetensors")[0], stem, overwrite=True)
    server.run(g.api)
    assert saved.with_name(f"{stem}.receipt.png").read_bytes() == picture
    assert "receipt: bomb suppressed by" in reported(server, f"loras/{stem}.safetensors")


def test_what_is_overwritten_takes_its_receipt_with_it(server: ComfyServer) -> None:
    g, stem = Graph(), name()
    g.save(receipt(g, erased(g))[ERASURE], stem)
    server.run(g.api)
    beside = [server.models / "loras" / f"{stem}.receipt.{kind}" for kind in ("json", "png")]
    assert all(path.exists() for path in beside)
    for overwrite in (False, True):
        g = Graph()
        g.save(erased(g, "tulip"), stem, overwrite=overwrite)
        if overwrite:
            server.run(g.api)
        else:
            with pytest.raises(ComfyError, match="is already in models/loras"):
                server.run(g.api)
    assert not any(path.exists() for path in beside)


def test_merged_and_gated_erasures_lose_it(server: ComfyServer) -> None:
    g, stem = Graph(), name()
    model, clip, _ = g.demo()
    merged = g.merge(model, clip, receipt(g, erased(g))[ERASURE], erased(g, "tulip"))
    g.save(merged[1], stem)
    server.run(g.api)
    assert "no receipt" in reported(server, f"loras/{stem}.safetensors")


def test_no_judge_counts_nothing_but_compares(server: ComfyServer) -> None:
    g = Graph()
    made = receipt(g, erased(g), judged=False, fp8_e4m3=True)
    said, pictures = g.show(made[REPORT]), g.add("PreviewImage", images=made[SHEET])
    run = server.run(g.api)
    text = shown(run, said)
    assert "no judge: pictures were compared, not counted" in text and "pixels moved by 0." in text
    assert "stored in fp8_e4m3" in text and "seen in" not in text
    assert len(run.outputs[pictures]["images"]) == 1
    assert run.previews and Image.open(io.BytesIO(run.previews[-1])).width > 400


def test_a_clip_judge_says_how_well_pictures_fit(server: ComfyServer) -> None:
    g, stem = Graph(), name()
    vision = g.add("ProbeTinyVision", width=128)[0]
    judge = g.add(
        "ErasureJudgeCLIP", clip_vision=vision, clip=g.add("ProbeAgreeingText", clip_vision=vision)[0],
        contrasts="blue\ngreen", threshold=0.5,
    )  # fmt: skip
    made = receipt(g, erased(g), judged=False, judge=judge[0])
    g.save(made[ERASURE], stem)
    server.run(g.api)
    kept = load(server.models / "loras" / f"{stem}.safetensors").receipt.kept
    assert all(0 <= c.clip_score_before <= 100 and 0 <= c.clip_score_after <= 100 for c in kept)
    assert kept[0].clip_score_before != kept[0].clip_score_after, "pictures moved"


def test_rounded_weights_are_what_is_drawn_with(server: ComfyServer) -> None:
    """fp16 keeps nearly all of a closed-form change; its pictures count like the erased model's."""
    g = Graph()
    said = g.show(receipt(g, erased(g), fp16=True, bf16=True, fp8_e4m3=True, int8=True)[REPORT])
    text = shown(server.run(g.api), said)
    lines = [line for line in text.splitlines() if line.startswith("stored in")]
    assert [line.split()[2].rstrip(":") for line in lines] == ["fp16", "bf16", "fp8_e4m3", "int8"]
    assert "100 % of the change left" in lines[0]
    assert all("concept seen in" in line for line in lines)


def test_an_erasure_of_other_layers_can_be_measured(server: ComfyServer) -> None:
    """What a method trains outside cross-attention is rounded too."""
    g = Graph()
    model, clip, _ = g.demo()
    trained = g.erase(model, clip, "bomb", keep="rose", method=("esd", {"iterations": 2, "layers": "all"}))[1]
    said = g.show(receipt(g, trained, int8=True)[REPORT])
    assert "stored in int8" in shown(server.run(g.api), said)


def test_an_erasure_from_elsewhere_is_noted(server: ComfyServer, saved: Path) -> None:
    def change(_, metadata):
        metadata["erasure"] = json.dumps({**json.loads(metadata["erasure"]), "base": "0123456789abcdef"})

    g = Graph()
    made = receipt(g, g.load(altered(saved, change))[0])
    said = g.show(made[REPORT])
    assert "computed on another model than this one" in shown(server.run(g.api), said)


def attacked(g: Graph, **widgets) -> Link:
    return g.add("ProbeAttackRecord", **{"concept": "bomb", "base": "", "erased": "", "exact": True, **widgets})[0]


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"concept": "tulip"}, "attacks: Probe attacked 'tulip', which this erasure does not suppress"),
        ({"base": "0" * 16}, "attacks: Probe was run on an erasure of another base model"),
        ({"erased": "0" * 16}, "attacks: Probe attacked another erasure, or this one at another strength"),
    ],
)
def test_attacks_on_something_else_are_refused(server: ComfyServer, record: dict, sentence: str) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    one = g.erase(model, clip, "bomb")
    receipt(g, one[1], attacks=attacked(g, model=model, erased_model=one[0], **record))
    with pytest.raises(ComfyError, match=sentence):
        server.run(g.api)


def test_an_attack_beside_another_base_is_refused(server: ComfyServer) -> None:
    """The base's fingerprint is that of the model, as after a small change to it: an erasure, say."""
    g = Graph()
    model, clip, vae = g.demo()
    one = g.erase(model, clip, "bomb")
    before = g.apply(model, g.erase(model, clip, "tulip", method=("uce", {}))[1], 0.05)
    how = {"concept": "bomb", "attack": "rece_residual", "effort": 0.1, "prompts": "a {}", "pictures": 1, "steps": 2,
           "cfg": 4.0, "seed": 5, "synonyms": ""}  # fmt: skip
    named = {"model": one[0], "base_model": before, "clip": clip, "vae": vae, "judge": [model[0], 3]}
    receipt(g, one[1], attacks=g.add("ErasureAttack", **named, **how)[0])
    with pytest.raises(
        ComfyError, match="attacks: RECE Residual was run beside a base_model that is not the receipt's model"
    ):
        server.run(g.api)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_attacks_on_it_are_written_down(server: ComfyServer, strength: float) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    one = g.erase(model, clip, "bomb")
    record = attacked(g, model=model, erased_model=g.apply(model, one[1], strength))
    said = g.show(receipt(g, one[1], attacks=record)[REPORT])
    if strength == 1:
        assert "Probe: bomb in 50 %" in shown(server.run(g.api), said)
    else:
        with pytest.raises(ComfyError, match="another erasure, or this one at another strength"):
            server.run(g.api)


def test_an_attack_on_the_erasure_and_a_memory_is_no_attack_on_the_erasure(server: ComfyServer) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    one = g.erase(model, clip, "bomb")
    learned = {"concept": "bomb", "replace_with": "", "keep": "rose", "mode": "suppress", "rows": 2, "seed": 1,
               "placement": "all blocks", "iterations": 2, "learning_rate": 0.05, "weights_rate": 1e-3}  # fmt: skip
    memory = g.add("ErasureLearnSafePromptMemory", model=model, clip=clip, **learned)[1]

    def attack(to: Link) -> Link:
        how = {"concept": "bomb", "attack": "synonyms", "effort": 0.1, "prompts": "a {}", "pictures": 1, "steps": 2,
               "cfg": 4.0, "seed": 5, "synonyms": "grenade"}  # fmt: skip
        named = {"model": to, "base_model": model, "clip": clip, "vae": vae, "judge": [model[0], 3]}
        return g.add("ErasureAttack", **named, **how)[0]

    def applied(to: Link) -> Link:
        return g.add("ErasureApplySafePromptMemory", model=to, memory=memory, strength=1.0, read_by="both")[0]

    both = g.show(receipt(g, one[1], model=applied(model), attacks=attack(applied(one[0])))[REPORT])
    assert "Synonyms: bomb in" in shown(server.run(g.api), both), "the memory is on the receipt's model, too"
    receipt(g, one[1], attacks=attack(applied(one[0])))
    with pytest.raises(ComfyError, match=r"attacks: Synonyms attacked the erased model with a prompt memory that"):
        server.run(g.api)


@pytest.mark.parametrize(
    ("widgets", "sentence"),
    [
        ({"prompt": "a picture"}, "has no {}, the place of the word"),
        ({"strength": 0.0}, "changes nothing has no receipt"),
        ({"sampler_name": "verse"}, "sampler_name: 'verse' is not one|Value not in list"),
    ],
)
def test_what_can_not_be_measured_is_said(server: ComfyServer, widgets: dict, sentence: str) -> None:
    g = Graph()
    receipt(g, erased(g), **widgets)
    with pytest.raises((ComfyError, PromptRejected), match=sentence):
        server.run(g.api)


def test_a_judge_that_does_not_know_the_concept(server: ComfyServer) -> None:
    g = Graph()
    receipt(g, erased(g, "zeppelin", "rose"))
    with pytest.raises(ComfyError, match=r"does not know 'zeppelin'. .* Connect another judge, or none"):
        server.run(g.api)


def test_every_concept_is_measured_or_named(server: ComfyServer) -> None:
    """The judge counts those that it knows."""
    g = Graph()
    erasure = erased(g, "bomb\nzeppelin\nrose", "house")
    every, one = (g.show(receipt(g, erasure, pictures=1, erased_words=n)[REPORT]) for n in (0, 1))
    run = server.run(g.api)
    said = shown(run, every)
    assert "suppressed bomb: seen in" in said and "suppressed zeppelin: pixels moved" in said
    assert "suppressed, these 3 together: seen in" in said and "(of the 2 that the judge knows)" in said
    assert "not drawn" not in said
    assert "not drawn, so nothing is said about zeppelin, rose" in shown(run, one)


def test_where_nothing_was_named_to_keep_everyday_words_are_looked_at(server: ComfyServer) -> None:
    g = Graph()
    model, clip, _ = g.demo()
    said = []
    for held in (True, False):
        erasure = g.erase(model, clip, "bomb", keep_everyday=held)[1]
        said.append(g.show(receipt(g, erasure, pictures=1, kept_words=3)[REPORT]))
    run = server.run(g.api)
    with_them, without = (shown(run, node) for node in said)
    drawn = re.findall(r"^  kept (\w+): ", with_them, re.M)
    assert len(drawn) == 3 and set(drawn) <= set(VOCABULARY) - {"bomb"} and "with kept words by" in with_them
    assert "no kept word was looked at" in without and "with kept words by" not in without


def test_cancel(server: ComfyServer) -> None:
    g, stem = Graph(), name()
    made = receipt(g, erased(g), pictures=8, steps=60)
    g.save(made[ERASURE], stem)

    def stop(event: dict) -> None:
        if event["type"] == "progress" and event["data"].get("node") == made and event["data"]["value"] > 20:
            server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.run(g.api, on_event=stop)
    assert not list((server.models / "loras").glob(f"{stem}*"))


def test_strength_0_after_it_is_the_base(server: ComfyServer) -> None:
    """Measuring leaves the model as it was."""
    g = Graph()
    model, _, _ = g.demo()
    before = g.weights(model)
    server.run(g.api)
    again = Graph()
    receipt(again, erased(again), int8=True)
    model, _, _ = again.demo()
    after = again.weights(model)
    server.run(again.api)
    one, two = (load_file(server.output / x.api[n]["inputs"]["name"]) for x, n in ((g, before), (again, after)))
    assert all(torch.equal(one[k], two[k]) for k in one)
