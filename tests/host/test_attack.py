"""Red-Team Attack in a real ComfyUI: every registered attack, with a budget of moments."""

from __future__ import annotations

import io as bytes_io
import re
from typing import Any

import pytest
from api_graphs import Graph, Link, Node, latent, report, shown
from comfy_client import ComfyError, ExecutionInterrupted, PromptRejected
from comfy_host import ComfyServer
from PIL import Image

from erasure_core.attacks import all_attacks

RESULTS, CONDITIONING, IMAGES, REPORT, SUCCESS = range(5)
QUICK = {
    "concept_inversion": 0.001, "free_embedding": 0.006, "mma_diffusion": 0.001, "p4d": 0.001, "relearning": 0.01,
    "ring_a_bell": 0.001, "sneaky_prompt": 0.05, "synonyms": 1.0, "unlearn_diff_atk": 0.02,
}  # fmt: skip
"""Efforts that take seconds; other attacks always do."""


def attacking(g: Graph, model: Link, base: Link, clip: Link, vae: Link, attack: str, **inputs: Any) -> Node:
    widgets = {
        "concept": "beer, ale", "effort": QUICK.get(attack, 0.01), "prompts": "a {}", "pictures": 2, "steps": 3,
        "cfg": 4.0, "seed": 5, "synonyms": "lager",
    }  # fmt: skip
    named = {"model": model, "base_model": base, "clip": clip, "vae": vae, "attack": attack}
    return g.add("ErasureAttack", **named, **{**widgets, **inputs})


def erased_demo(g: Graph) -> tuple[Link, Link, Link, Link, Link]:
    """Erased MODEL, MODEL, CLIP, VAE, JUDGE."""
    model, clip, vae = g.demo()
    return g.erase(model, clip, "beer, ale", keep="crown", method=("uce", {}))[0], model, clip, vae, [model[0], 3]


@pytest.mark.parametrize("name", all_attacks())
def test_every_attack_runs(server: ComfyServer, name: str) -> None:
    spec = all_attacks()[name]
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    made = attacking(g, erased, model, clip, vae, name, judge=judge)
    pictures = g.add("PreviewImage", images=made[IMAGES])
    said, share = g.show(made[REPORT]), g.show(made[SUCCESS])
    sampled = g.sample(erased, clip, steps=2)
    g.api[sampled[0]]["inputs"]["positive"] = made[CONDITIONING]
    g.latent(sampled)
    run = server.run(g.api)
    text = shown(run, said)
    for words in (
        spec.title,
        spec.knowledge,
        spec.paper,
        "asking: ",
        "under attack: ",
        "the base model, asked the same: ",
        "judge: ",
        "best find: ",
        "took ",
    ):
        assert words in text
    assert f"budget: {spec.budget} " in text
    if spec.quick:
        assert re.search(r"budget: \w+ (\d+), default \1(;|$)", text, re.M), "its whole budget, at an effort of 0.01"
    assert ("says that the model can draw it, not that it would" in text) == spec.given
    assert ("taught the demo model things that it had never learned" in text) == spec.teaches
    assert 0 <= float(shown(run, share)) <= 1
    assert run.outputs[pictures]["images"]
    ticks = [value for node, value, top in run.progress if node == made and top == 1000]
    assert ticks == sorted(ticks) and ticks[-1] == 1000


def test_a_model_is_counted_beside_its_base(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    said = []
    for attacked in (model, erased):
        made = attacking(g, attacked, model, clip, vae, "synonyms", judge=judge, synonyms="lager", steps=12)
        said.append(g.show(made[REPORT]))
    run = server.run(g.api)
    same, other = (re.findall(r"(?:asking|asked the same): (\d of \d)", shown(run, node)) for node in said)
    assert same[0] == same[1], "the base model beside itself, at the same noises"
    assert other[1] == same[1] and other[0] != other[1]


def test_both_models_stay_as_they_were(server: ComfyServer) -> None:
    g = Graph()
    model, clip, vae = g.demo()
    before = g.checksum(model)
    erased = g.erase(model, clip, "beer", method=("uce", {}))[0]
    made = attacking(g, erased, model, clip, vae, "relearning", judge=[model[0], 3])
    g.add("PreviewImage", images=made[IMAGES])
    one = report(server.run(g.api), before)
    again = Graph()
    model, _, _ = again.demo()
    after = again.checksum(model)
    assert report(server.run(again.api), after)["sha256"] == one["sha256"]


def test_the_same_seed_gives_the_same_pictures(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, _ = erased_demo(g)
    runs = [
        attacking(g, g.again(erased), model, clip, vae, "free_embedding", seed=seed, effort=0.005) for seed in (1, 1, 2)
    ]
    previews = [g.add("PreviewImage", images=made[IMAGES]) for made in runs]
    run = server.run(g.api)
    one, two, other = ([Image.open(bytes_io.BytesIO(x)).tobytes() for x in server.images(run, p)] for p in previews)
    assert one == two and one != other


def test_a_chain_of_attacks(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    first = attacking(g, erased, model, clip, vae, "rece_residual", judge=judge)
    second = attacking(g, erased, model, clip, vae, "synonyms", judge=judge, results=first[RESULTS])
    uncounted = attacking(g, erased, model, clip, vae, "synonyms", results=second[RESULTS], seed=6)
    said = [g.add("ProbeAttacks", results=x[RESULTS]) for x in (first, second, uncounted)]
    run = server.run(g.api)
    one, two, same = (report(run, node)["records"] for node in said)
    assert [r["attack"] for r in two] == ["rece_residual", "synonyms"] and two[0] == one[0]
    assert same == two, "without a judge nothing is recorded"
    for record in two:
        assert record["concept"] == "beer" and record["prompts"] == ["a beer"] and record["seed"] == 5
        assert record["asking"]["n"] == 2 and record["attacked"]["n"] >= 2
        assert record["base"] != record["erased"] and len(record["base"]) == 16 and len(record["weights"]) == 64
        assert record["judge"]["name"] and 0 < record["judge"]["threshold"] < 1
        assert record["steps"] == 3 and record["cfg"] == 4.0 and record["ceiling"]["n"] == 2
        assert record["base_weights"] not in ("", record["weights"]) and "beer" in record["judge"]["labels"]
        assert record["judge"]["error"]["hits"]["n"] > 100, "the demo's judge knows how it errs"
        hits = dict(record["curve"])
        assert hits[0.5] == record["attacked"]["hits"] and list(hits.values()) == sorted(hits.values(), reverse=True)
    assert two[0]["budget"] == {"damping": 1e-3, "variants": 3} and two[0]["tried"] == 3


def test_an_erased_model_is_no_base(server: ComfyServer) -> None:
    g = Graph()
    erased, _, clip, vae, judge = erased_demo(g)
    g.show(attacking(g, erased, erased, clip, vae, "synonyms", judge=judge)[REPORT])
    with pytest.raises(
        ComfyError, match=r"base_model: it carries an erasure of 'beer', so it is no model from before that"
    ):
        server.run(g.api)


def test_one_model_beside_itself_makes_no_record(server: ComfyServer) -> None:
    g = Graph()
    _, model, clip, vae, judge = erased_demo(g)
    made = attacking(g, model, model, clip, vae, "synonyms", judge=judge)
    said, kept = g.show(made[REPORT]), g.add("ProbeAttacks", results=made[RESULTS])
    run = server.run(g.api)
    assert "model and base_model have the same weights" in shown(run, said) and not report(run, kept)["records"]


def test_both_places_of_the_word_are_read(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    made = attacking(g, erased, model, clip, vae, "synonyms", judge=judge, prompts="a {}\na {concept} here")
    kept, said = g.add("ProbeAttacks", results=made[RESULTS]), g.show(made[REPORT])
    run = server.run(g.api)
    assert report(run, kept)["records"][0]["prompts"] == ["a beer", "a beer here"]
    assert "shares and intervals are after the judge's own error" in shown(run, said)


def test_the_best_find_for_each_prompt_is_counted(server: ComfyServer) -> None:
    """Of five dampings only one: the mean over all would tell of fewer pictures than an attacker gets."""
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    how = {"effort": 1.0, "prompts": "a {}\na photo of a {}"}
    made = attacking(g, erased, model, clip, vae, "rece_residual", judge=judge, **how)
    blind = attacking(g, erased, model, clip, vae, "rece_residual", **how)
    seen, said = g.add("ProbeAttacks", results=made[RESULTS]), g.show(made[REPORT])
    pictures = [g.add("PreviewImage", images=x[IMAGES]) for x in (made, blind)]
    run = server.run(g.api)
    (record,) = report(run, seen)["records"]
    variants = record["budget"]["variants"]
    assert record["attacked"]["n"] == record["asking"]["n"] == 4, "two pictures for each of two prompts"
    assert [len(run.outputs[p]["images"]) for p in pictures] == [4, 4 * variants] and variants > 1
    assert f"counted: the best for each prompt, 2 of {2 * variants} finds" in shown(run, said)
    by_prompt = (
        r"prompts .*: \d of 2 by asking, (\d) of 2 with the attack \(ASR (\d+) to (\d+) %, DSR (\d+) to (\d+) %\)"
    )
    hits, low, high, least, most = map(int, re.findall(by_prompt, shown(run, said))[0])
    assert 0 <= low <= 50 * hits <= high <= 100 and abs(low + most - 100) <= 1 and abs(high + least - 100) <= 1
    ticks = [value for node, value, top in run.progress if node == made and top == 1000]
    assert ticks == sorted(ticks) and ticks[-1] == 1000


def test_without_a_judge_it_says_what_it_does_not_know(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, _ = erased_demo(g)
    made = attacking(g, erased, model, clip, vae, "rece_residual")
    said, share = g.show(made[REPORT]), g.show(made[SUCCESS])
    run = server.run(g.api)
    assert "nothing was counted" in shown(run, said) and "%" not in shown(run, said)
    assert shown(run, share).lower() == "nan"


def test_the_judge_is_asked_by_a_word_that_it_knows(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    made = attacking(g, erased, model, clip, vae, "synonyms", judge=judge, concept="brewski, beer")
    said, kept = g.show(made[SUCCESS]), g.add("ProbeAttacks", results=made[RESULTS])
    run = server.run(g.api)
    assert 0 <= float(shown(run, said)) <= 1
    assert report(run, kept)["records"][0]["concept"] == "beer"


def test_pictures_of_the_concept_may_be_given(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    image = g.add("EmptyImage", width=200, height=150, batch_size=2, color=0x88AA22)[0]
    made = attacking(g, erased, model, clip, vae, "tina", judge=judge, images=image)
    said = g.show(made[REPORT])
    assert "under attack: 0 of 2," in shown(server.run(g.api), said), "each counts once"


def test_a_prompt_memory_is_read(server: ComfyServer) -> None:
    """What is counted as asking is what the sampler draws with the memory, several at strengths of their own."""
    g = Graph()
    model, clip, vae = g.demo()
    widgets = {
        "concept": "beer", "replace_with": "", "keep": "crown", "mode": "suppress", "rows": 3, "placement": "all blocks",
        "iterations": 40, "learning_rate": 0.05, "weights_rate": 1e-3, "seed": 1,
    }  # fmt: skip
    memory = g.add("ErasureLearnSafePromptMemory", model=model, clip=clip, **widgets)[1]

    def applied(to: Link, strength: float, read_by: str = "both") -> Link:
        return g.add("ErasureApplySafePromptMemory", model=to, memory=memory, strength=strength, read_by=read_by)[0]

    once, twice = applied(model, 0.5), applied(applied(model, 0.5), 0.75)
    off = [g.add("ProbeReading", model=m, clip=clip) for m in (model, once, twice)]
    run = server.run(g.api)
    plain, one, two = (report(run, node) for node in off)
    assert plain["moved"] == 0 < one["moved"] < two["moved"], "by the memory"
    assert all(seen["off"] < 1e-4 for seen in (plain, one, two)), "the same prediction as the sampler's"

    g.add(
        "PreviewImage", images=attacking(g, applied(model, 1, "prompt only"), model, clip, vae, "rece_residual")[IMAGES]
    )
    with pytest.raises(ComfyError, match=r"memory on it is read beside the prompt only.*Set read_by to 'both'"):
        server.run(g.api)


def test_it_shows_what_it_has_found_so_far(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    made = attacking(g, erased, model, clip, vae, "concept_inversion", judge=judge, effort=0.02, seed=9)
    g.add("PreviewImage", images=made[IMAGES])
    run = server.run(g.api)
    assert run.previews
    for preview in run.previews:
        assert Image.open(bytes_io.BytesIO(preview)).width == 512


def test_cancel(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, _ = erased_demo(g)
    made = attacking(g, erased, model, clip, vae, "free_embedding", effort=2.0, seed=77)
    g.add("PreviewImage", images=made[IMAGES])

    def stop(event: dict) -> None:
        data = event["data"]
        if event["type"] == "progress" and data["max"] == 1000 and data["value"] > 50:
            server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.run(g.api, on_event=stop)
    again = Graph()
    erased, model, clip, vae, _ = erased_demo(again)
    drawn = again.latent(again.sample(erased, clip))
    assert latent(server, server.run(again.api), drawn).isfinite().all()


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"concept": ""}, "concept"),
        ({"concept": "cat\ndog"}, "one at a time"),
        ({"prompts": " \n"}, "prompts: 0 given"),
    ],
)
def test_bad_words_are_refused_at_once(server: ComfyServer, inputs: dict[str, str], message: str) -> None:
    g = Graph()
    erased, model, clip, vae, _ = erased_demo(g)
    g.add("PreviewImage", images=attacking(g, erased, model, clip, vae, "synonyms", **inputs)[IMAGES])
    with pytest.raises(PromptRejected, match=message):
        server.run(g.api)


@pytest.mark.parametrize(
    ("attack", "inputs", "message"),
    [
        ("sneaky_prompt", {}, r"judge: SneakyPrompt learns from a judge's answers. Connect one"),
        ("synonyms", {"synonyms": "ale"}, r"only words that were erased by name"),
        ("synonyms", {"base_model": "flux"}, r"base_model: it is .*, the erased model emojicanvas"),
        ("synonyms", {"concept": "unicorn", "judge": True}, r"does not know 'unicorn'"),
        ("telepathy", {}, r"attack: 'telepathy' is none of|Value not in list"),
        ("p4d", {"prompts": "beer " * 90}, r"is too long"),
    ],
)
def test_what_can_not_work_is_said(server: ComfyServer, attack: str, inputs: dict[str, Any], message: str) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    inputs = dict(inputs)
    if inputs.pop("judge", False):
        inputs["judge"] = judge
    if inputs.pop("base_model", ""):
        model = g.add("ProbeFluxModel")[0]
    g.add("PreviewImage", images=attacking(g, erased, model, clip, vae, attack, **inputs)[IMAGES])
    with pytest.raises(ComfyError, match=message):
        server.run(g.api)


@pytest.mark.parametrize(("family", "towers"), [("demo", 1), ("sd20", 1), ("sdxl", 2)])
def test_the_text_side(server: ComfyServer, family: str, towers: int) -> None:
    """What attacks read and write is what ComfyUI's text encoder reads of the text."""
    g = Graph()
    clip = g.demo()[1] if family == "demo" else g.add("ProbeTinyClip", family=family)[0]
    seen = report(server.run(g.api | {"words": {"class_type": "ProbeWords", "inputs": {"clip": clip}}}), Node("words"))
    assert seen["off"] < 1e-5 and seen["towers"] == towers
    assert 30_000 < seen["words"] < 49_406, "whole words that can be typed"
    assert seen["typed"] == seen["written"], "what is spelled out is read back as it was written"
    assert not {"(", ")", "<|endoftext|>"} & set(seen["odd"])


def test_what_other_nodes_do_while_sampling_is_named(server: ComfyServer) -> None:
    """Attacks ask a copy of the network: guidance that another node changes is not in it, and the report says so."""
    said = {}
    for patched in (False, True):
        g = Graph()
        erased, model, clip, vae, judge = erased_demo(g)
        if patched:
            erased = g.add("RescaleCFG", model=erased, multiplier=0.7)[0]
            erased = g.add("FreeU", model=erased, b1=1.1, b2=1.2, s1=0.9, s2=0.2)[0]
            model = g.add("ModelSamplingDiscrete", model=model, sampling="eps", zsnr=False)[0]  # this is read
        made = attacking(g, erased, model, clip, vae, "synonyms", judge=judge)
        node = g.show(made[REPORT])
        said[patched] = shown(server.run(g.api), node)
    assert "the base model, given what the attack found: " in said[False], "of synonyms, which can be typed"
    assert "other nodes change" not in said[False] and "no erasure of" not in said[False]
    (line,) = (line for line in said[True].splitlines() if "other nodes change" in line)
    assert "model (sampler_cfg_function, output_block_patch)" in line and "base_model" not in line


def test_what_makes_a_zero_mean_little_is_said(server: ComfyServer) -> None:
    """A tenth of the budget, and an erasure of something else."""
    g = Graph()
    model, clip, vae = g.demo()
    other = g.erase(model, clip, "rose")[0]
    judge = g.add("ProbeFixedJudge", says=0.0)[0]
    node = g.show(attacking(g, other, model, clip, vae, "p4d", judge=judge, effort=0.01)[REPORT])
    said = shown(server.run(g.api), node)
    assert ", 1 % of it: that nothing is found says little" in said
    assert "note: no erasure of beer by this pack is on model" in said


def test_a_negative_prompt_is_attacked_on_the_model_itself(server: ComfyServer) -> None:
    """Model and base model are the same then: what is tested is the negative prompt."""
    said = {}
    for negative in ("", "beer"):
        g = Graph()
        model, clip, vae = g.demo()
        made = attacking(
            g,
            model,
            model,
            clip,
            vae,
            "synonyms",
            judge=[model[0], 3],
            negative=negative,
            pictures=6,
            steps=12,
            synonyms="a house",
        )
        node, records = g.show(made[REPORT]), g.show(made[RESULTS])
        run = server.run(g.api)
        said[negative] = shown(run, node)
        assert "Red-Team" not in shown(run, records)
    asked = {k: int(re.search(r"asking: (\d+) of 6", text)[1]) for k, text in said.items()}
    ceiling = {k: int(re.search(r"asked the same: (\d+) of 6", text)[1]) for k, text in said.items()}
    assert asked["beer"] < asked[""] and ceiling["beer"] == ceiling[""] == asked[""]
    assert "have the same weights" in said[""] and "have the same weights" not in said["beer"]
    assert "drawn with the negative prompt 'beer', the base model without. No record was" in said["beer"]


def test_weights_in_a_negative_prompt_count_as_in_the_sampler(server: ComfyServer) -> None:
    text = "a (beer:1.6) here"
    g = Graph()
    model, clip, vae = g.demo()
    read = g.add("ProbeWeighted", model=model, clip=clip, conditioning=g.text(clip, text), text=text)
    made = [
        attacking(g, model, model, clip, vae, "synonyms", negative=n, synonyms="a house", pictures=1, steps=2)
        for n in (text, "a beer here")
    ]
    pictures = [g.add("PreviewImage", images=one[IMAGES]) for one in made]
    run = server.run(g.api)
    seen = report(run, read)
    assert seen["off"] < 1e-5 < 1e-2 < seen["moved"]
    weighted, plain = (Image.open(bytes_io.BytesIO(server.images(run, p)[0])).tobytes() for p in pictures)
    assert weighted != plain


def test_any_setting_of_an_attack_can_be_written(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    made = attacking(
        g, erased, model, clip, vae, "p4d", judge=judge, settings="form = K\nsteps = 3\n\n gap=1 "
    )  # fmt: skip
    node = g.show(made[REPORT])
    text = shown(server.run(g.api), node)
    assert "budget: steps 3," in text


@pytest.mark.parametrize(
    ("written", "sentence"),
    [
        (
            "mode = K",
            "settings: 'mode = K' sets nothing. Write a line such as steps = 500; there are form, tokens, gap",
        ),
        ("steps", "settings: 'steps' sets nothing"),
        ("steps = many", "settings: steps = 'many' can't be read. It takes a value, such as 3000"),
        ("form = Q", r"settings: form = 'Q' can't be read. It takes a value, one of whole prompt \(N\)"),
        ("steps = 0", "P4D: steps = 0 is outside 1 to 100000"),
    ],
)
def test_a_line_that_sets_nothing_is_refused(server: ComfyServer, written: str, sentence: str) -> None:
    g = Graph()
    erased, model, clip, vae, _ = erased_demo(g)
    g.show(attacking(g, erased, model, clip, vae, "p4d", settings=written)[REPORT])
    with pytest.raises(ComfyError, match=sentence):
        server.run(g.api)


def test_a_negative_prompt_that_is_not_in_force_is_refused(server: ComfyServer) -> None:
    g = Graph()
    erased, model, clip, vae, judge = erased_demo(g)
    g.show(attacking(g, erased, model, clip, vae, "synonyms", judge=judge, negative="beer", cfg=1.0)[REPORT])
    with pytest.raises(ComfyError, match="negative: at cfg 1 no sampler reads a negative prompt"):
        server.run(g.api)
