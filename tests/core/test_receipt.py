"""Receipts: they come back as written, nothing hostile gets further than a sentence, and they belong to their numbers."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erasure_core import Concept, ConceptSpec, Delta, Erasure, Family, FileError, Header, Layout, load, save
from erasure_core.artifact import digest, weights_digest
from erasure_core.attack_record import AttackRecord
from erasure_core.formats import read_receipt, receipt_of, write_bytes
from erasure_core.metrics.judge_error import JudgeError
from erasure_core.metrics.judged import JudgedBy
from erasure_core.metrics.rates import Rate
from erasure_core.metrics.rounding import ROUNDINGS, RoundingLoss, rounding_loss
from erasure_core.metrics.weights import TextMeasures
from erasure_core.receipt import Counted, Drawn, Receipt, Survival
from erasure_core.receipt_file import parse_receipt, receipt_json

pytestmark = pytest.mark.core
SITES = [
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "middle_block.1.transformer_blocks.0.attn2.to_v",
    "output_blocks.11.1.transformer_blocks.0.ff.net.2",
]
BASE, OTHER, ERASED = "0123456789abcdef", "fedcba9876543210", "0123456789abcdee"
SPEC = ConceptSpec((Concept(("cat", "猫"), "dog"), Concept(("Van Gogh <b>",))), ("bird & co", "fish"))
JUDGE = JudgedBy("judge <i>", "2", 0.5, ("cat", "dog"))
KNOWING = replace(JUDGE, error=JudgeError(Rate(90, 100), Rate(5, 100)))


def erasure(scale: float = 0.1) -> Erasure:
    g = torch.Generator().manual_seed(1)
    header = Header("uce", {"ridge": 1e-3, "rows": "last", "on": True}, SPEC, Family("sd15", 16, 2, 4), BASE, "0.1.0")
    deltas = {
        site: Delta(scale * torch.randn(8, r, generator=g), scale * torch.randn(r, 16, generator=g))
        for site, r in zip(SITES, (3, 1, 2), strict=True)
    }
    deltas[SITES[1]] = Delta(deltas[SITES[1]].dense())
    return Erasure(header, deltas)


ATTACK = AttackRecord(
    attack="p4d", title="P4D", concept="cat", budget={"steps": 30, "learning_rate": 0.1, "form": "x"}, prompts=("a cat",),
    judge=JUDGE, asking=Rate(0, 8), attacked=Rate(3, 8), found="a c@t", queries=12, seed=7, base=BASE, erased=ERASED,
    weights="ab" * 32, found_on_base=Rate(5, 8),
)  # fmt: skip
RECEIPT = Receipt(
    SPEC, "uce", {"ridge": 1e-3, "rows": "last", "on": True}, BASE, "0.1.0", digest(erasure().deltas), 0.8,
    TextMeasures(0.4, 0.01, 0.02, 0.001, 0.3), 0.05, Drawn("a {}", (1, 2, 3), 20, 7.5, "euler", "normal", 512, 512), JUDGE,
    (Counted("cat", "cat", Rate(8, 8), Rate(0, 8), 0.4), Counted("Van Gogh <b>", "Van Gogh <b>", Rate(7, 8), Rate(2, 8), 0.3)),
    (
        Counted("fish", "fish", Rate(8, 8), Rate(7, 8), 0.02, Rate(1, 8), 27.25, 26.5),
        Counted("bird & co", "", None, None, 0.03, Rate(0, 8)),
    ),
    (ATTACK,), (Survival("int8", RoundingLoss(0.004, 1.5, 0.98), Rate(1, 16)),),
)  # fmt: skip


def with_receipt(receipt: Receipt = RECEIPT) -> Erasure:
    return replace(erasure(), receipt=receipt)


# JSON

rates = st.tuples(st.integers(0, 99), st.integers(0, 99)).map(lambda x: Rate(min(x), max(x)))
numbers = st.floats(0, 1e6)
texts = st.text(st.characters(categories=("L", "N", "S", "P")), min_size=1, max_size=20)
counted = st.builds(
    Counted, texts, texts, st.none() | rates, st.none() | rates, st.floats(0, 1), st.none() | rates,
    st.none() | st.floats(0, 100), st.none() | st.floats(0, 100),
)  # fmt: skip
drawn = st.builds(
    Drawn, texts, st.lists(st.integers(0, (1 << 64) - 1), min_size=1, max_size=3).map(tuple), st.integers(1, 99), numbers,
    texts, texts, st.integers(1, 9999), st.integers(1, 9999),
)  # fmt: skip
attacks = st.builds(
    replace, st.just(ATTACK), attacked=rates, found=texts, budget=st.dictionaries(texts, texts | numbers | st.booleans()),
    queries=st.integers(0, 1 << 30), weights=st.just("") | texts,
    memory=st.just("") | texts, base_weights=st.just("") | texts, steps=st.integers(0, 99), cfg=numbers,
    ceiling=st.none() | rates, tried=st.integers(0, 99), version=st.integers(0, 9), share=numbers, given=st.booleans(),
    judge=st.sampled_from([JUDGE, KNOWING]),
)  # fmt: skip
judges = st.builds(
    JudgedBy, texts, texts, numbers, st.lists(texts, max_size=3).map(tuple), st.none() | st.builds(JudgeError, rates, rates)
)  # fmt: skip
survivals = st.builds(
    Survival, st.sampled_from(list(ROUNDINGS)), st.builds(RoundingLoss, numbers, numbers, st.floats(-2, 2)), st.none() | rates
)  # fmt: skip
receipts = st.builds(
    replace, st.just(RECEIPT), judge=st.none() | judges, drawn=drawn, drift=numbers,
    carried=st.lists(texts, max_size=2).map(tuple),
    words=st.lists(counted, max_size=3).map(tuple), kept=st.lists(counted, max_size=3).map(tuple),
    attacks=st.lists(attacks, max_size=2).map(tuple), survival=st.lists(survivals, max_size=2).map(tuple),
    text=st.builds(TextMeasures, numbers, st.none() | numbers, st.none() | numbers, numbers, numbers),
    rounded=st.sampled_from(["", "float16"]), weights=st.just("") | texts, strength=st.floats(-2, 3),
)  # fmt: skip


def test_what_is_not_known_of_kept_words_is_not_said() -> None:
    assert "with kept words by 1 % (worst 2 %)" in RECEIPT.summary()
    unknown = replace(RECEIPT, text=replace(RECEIPT.text, kept=None, kept_worst=None))
    assert "kept words by" not in unknown.summary() and parse_receipt(receipt_json(unknown)) == unknown


def test_an_attack_says_what_it_spent_and_what_it_begins_with() -> None:
    said = replace(ATTACK, share=0.1, given=True, version=2).summary()
    assert "10 % of its default budget" in said and "not that it would" in said
    assert "of its default budget" not in ATTACK.summary() and "not that it would" not in ATTACK.summary()


@given(receipts)
def test_it_comes_back_as_written(receipt: Receipt) -> None:
    for indent in (None, 1):
        assert parse_receipt(receipt_json(receipt, indent)) == receipt
    assert receipt.summary()


def test_the_picture_stays_out_of_the_json() -> None:
    assert receipt_json(replace(RECEIPT, sheet=b"x" * 100)) == receipt_json(RECEIPT)


def changed(**fields: object) -> str:
    return json.dumps({k: v for k, v in {**json.loads(receipt_json(RECEIPT)), **fields}.items() if v is not ...})


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(st.sampled_from(sorted(json.loads(receipt_json(RECEIPT)))), JUNK)
def test_wrong_types_in_every_field(field: str, value: object) -> None:
    try:
        receipt = parse_receipt(changed(**{field: value}))
    except FileError as error:
        assert str(error).startswith("receipt: ") and len(str(error)) < 400
        return
    assert receipt.summary() and parse_receipt(receipt_json(receipt)) == receipt


@given(st.data())
def test_wrong_types_deeper_down(data: st.DataObject) -> None:
    raw = json.loads(receipt_json(RECEIPT))
    inner = data.draw(st.sampled_from(["drawn", "judge", "text", "words", "kept", "attacks", "survival"]))
    place = raw[inner][0] if isinstance(raw[inner], list) else raw[inner]
    field = data.draw(st.sampled_from(sorted(place)))
    place[field] = data.draw(JUNK)
    try:
        receipt = parse_receipt(json.dumps(raw))
    except FileError as error:
        assert str(error).startswith("receipt: ")
        return
    assert receipt.summary() and parse_receipt(receipt_json(receipt)) == receipt


REQUIRED = sorted(
    set(json.loads(receipt_json(RECEIPT))) - {"pooled", "keep", "everyday", "judge", "carried", "weights"}
)


@pytest.mark.parametrize("field", REQUIRED)
def test_a_field_that_is_missing_is_named(field: str) -> None:
    with pytest.raises(FileError, match=f"receipt: {field}"):
        parse_receipt(changed(**{field: ...}))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "not valid JSON"),
        ("<html><script>alert(1)</script>", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a":' * 50_000, "not valid JSON"),
        ('{"format":' + "9" * 5000 + "}", "not valid JSON"),
        ("[]", "it must be an object"),
        ('{"x":"' + "y" * (3 << 20) + '"}', "at most 1048576 are read"),
        (changed(format=2), "format 2 is not 1. Update"),
        (changed(drift=math.nan), "drift must be a number"),
        (changed(drift=math.inf), "drift must be a number"),
        (changed(drift=-1), "drift must be a number"),
        (changed(drift=True), "drift must be a number"),
        (changed(drift=10**30), "drift must be a number"),
        (changed(strength="1"), "strength must be a number"),
        (changed(settings={"a": 10**40}), "settings must be short plain values"),
        (changed(settings={"a": [1]}), "settings must be short plain values"),
        (changed(settings={"a": math.inf}), "settings must be short plain values"),
        (changed(settings={str(i): i for i in range(200)}), "settings must be an object"),
        (changed(words=[{"word": "x"}] * 1001), "words must be a list of at most 1000"),
        (changed(digest="0" * 65), "digest must be text of at most 64"),
        (changed(words=[{"word": "a", "asked": "", "before": {"hits": 3, "n": 2}, "after": None}]), "before.hits must be"),
        (changed(words=[{"word": "a", "asked": "", "before": {"hits": 0.5, "n": 2}}]), "before.hits must be"),
        (changed(words=[{"word": "a", "asked": "", "before": {"hits": 0, "n": -1}}]), "before.n must be"),
        (changed(survival=[{"stored": "int2"}]), "stored: 'int2' is none of fp16, .*, or newer: update Concept Erasure"),
        (changed(erase=[{"words": ["cat", "cat"], "to": ""}]), "listed twice"),
    ],
)  # fmt: skip
def test_what_is_refused(text: str, sentence: str) -> None:
    with pytest.raises(FileError, match=sentence) as caught:
        parse_receipt(text)
    assert str(caught.value).startswith("receipt: ")


def test_text_loses_control_characters_and_keeps_markup_as_text() -> None:
    raw = json.loads(receipt_json(RECEIPT))
    raw["method"] = "\x1b[31muce\u202e"
    raw["attacks"][0]["found"] = "<img src=x>\n\x00"
    receipt = parse_receipt(json.dumps(raw))
    assert receipt.method == " [31muce " and receipt.attacks[0].found == "<img src=x>  "
    assert "\x1b" not in receipt.summary()


# In a file


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_belongs_to_what_is_read_back(tmp_path: Path, layout: Layout, dtype: torch.dtype) -> None:
    path = save(with_receipt(), tmp_path / "x.safetensors", layout=layout, dtype=dtype)
    back = load(path)
    assert back.receipt is not None and not back.receipt.mismatch(back)
    assert back.receipt == read_receipt(path) == receipt_of(with_receipt(), layout, dtype)
    half = "" if dtype is torch.float32 else str(dtype).removeprefix("torch.")
    assert back.receipt.rounded == half
    assert replace(back.receipt, digest=RECEIPT.digest, rounded="") == RECEIPT
    again = load(save(back, tmp_path / "y.safetensors", layout=Layout.DIFFUSERS))
    assert again.receipt is not None and again.receipt.rounded == half, "the rounding isn't forgotten"


def rewritten(path: Path, tensors=lambda t: t, metadata=lambda m: m) -> Path:
    with safe_open(path, framework="pt") as f:
        found = f.metadata()
    save_file(tensors(load_file(path)), path, metadata(found))
    return path


def test_changed_tensors_lose_it(tmp_path: Path) -> None:
    path = save(with_receipt(), tmp_path / "x.safetensors")

    def nudge(stored):
        name = next(k for k in stored if k.endswith("lora_up.weight"))
        stored[name][0, 0] += 1e-6
        return stored

    back = load(rewritten(path, tensors=nudge))
    found = read_receipt(path)
    assert back.receipt is None and found is not None and "numbers were changed" in found.mismatch(back)


@pytest.mark.parametrize("field", [{"method": "esd"}, {"settings": {"ridge": 1}}, {"keep": ["nothing"]}])
def test_a_header_that_says_something_else_loses_it(tmp_path: Path, field: dict) -> None:
    path = save(with_receipt(), tmp_path / "x.safetensors")
    back = load(rewritten(path, metadata=lambda m: m | {"erasure": json.dumps({**json.loads(m["erasure"]), **field})}))
    found = read_receipt(path)
    assert back.receipt is None and found is not None and "other words or another method" in found.mismatch(back)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "<b>", '{"format":1}', "y" * (2 << 20)])
def test_a_broken_receipt_takes_nothing_with_it(tmp_path: Path, text: str) -> None:
    path = rewritten(save(with_receipt(), tmp_path / "x.safetensors"), metadata=lambda m: m | {"erasure_receipt": text})
    back = load(path)
    assert back.receipt is None and list(back.deltas) == SITES
    with pytest.raises(FileError, match=r"^receipt: "):
        read_receipt(path)


def test_no_receipt_is_none(tmp_path: Path) -> None:
    path = save(erasure(), tmp_path / "x.safetensors")
    assert read_receipt(path) is None and load(path).receipt is None


def test_another_erasure_does_not_inherit_it(tmp_path: Path) -> None:
    assert with_receipt().scaled(0.5).receipt is None
    with pytest.raises(FileError, match=r"^receipt: it belongs to another erasure: the numbers.*Make a new one"):
        save(replace(erasure(0.2), receipt=RECEIPT), tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_files_beside_are_whole_or_not_there(tmp_path: Path) -> None:
    write_bytes(tmp_path / "x.receipt.json", b"{}")
    with pytest.raises(FileError, match="could not be written"):
        write_bytes(tmp_path / "no" / "x.receipt.json", b"{}")
    assert [p.name for p in tmp_path.iterdir()] == ["x.receipt.json"]


def test_the_digest_sees_names_numbers_and_shapes() -> None:
    good = erasure().deltas
    one = good[SITES[0]]
    others = [
        {**good, SITES[0]: Delta(one.up * (1 + 1e-6), one.down)},
        {**good, SITES[0]: Delta(one.up.reshape(3, 8).T.contiguous().reshape(8, 3), one.down)},
        {("middle" + k if k == SITES[0] else k): v for k, v in good.items()},
        {k: v for k, v in good.items() if k != SITES[0]},
    ]
    assert len({digest(x) for x in (good, *others)}) == 5
    assert digest(good) == digest(dict(reversed(good.items())))
    assert digest(good) == digest({**good, "empty": Delta(torch.zeros(8, 0), torch.zeros(0, 16))})
    strided = {k: Delta(d.up.mT.contiguous().mT, d.down) for k, d in good.items()}
    assert digest(strided) == digest(good)


def test_the_weights_digest_sees_small_changes(tiny) -> None:
    before = weights_digest(tiny)
    assert before == weights_digest(tiny)
    site = tiny.linears()[-1]
    tiny.unet.get_submodule(site.name).weight.mul_(1 + 1e-4)
    assert weights_digest(tiny) != before


# What it says


def test_rates_are_pooled_and_corrected() -> None:
    assert (RECEIPT.before, RECEIPT.after) == (Rate(15, 16), Rate(2, 16))
    assert (RECEIPT.kept_before, RECEIPT.kept_after, RECEIPT.alarms) == (Rate(8, 8), Rate(7, 8), Rate(1, 16))
    best = RECEIPT.after_corrected
    assert best is not None and best.share == pytest.approx((2 / 16 - 1 / 16) / (15 / 16 - 1 / 16))
    assert replace(RECEIPT, kept=()).after_corrected is None, "no false alarms were counted"
    assert replace(RECEIPT, judge=None, words=(Counted("cat", "", None, None, 0.1),)).after_corrected is None


def test_the_summary_says_it_in_plain_words() -> None:
    text = RECEIPT.summary()
    assert "cat, Van Gogh <b> suppressed by uce, measured at strength 0.8" in text
    assert "suppressed cat: seen in 100 % [68, 100] before, 0 % [0, 32] after" in text
    assert "kept bird & co: pixels moved by 0.030" in text
    assert "CLIP score 27.2 before, 26.5 after; pixels moved by 0.020" in text and text.count("CLIP score") == 2
    assert (
        "P4D: cat in 38 % [14, 69] of pictures (asking: 0 % [0, 32]; "
        "on the base model, given what was found: 62 % [31, 86]); steps 30"
        in text
        and "12 queries" in text
    )
    assert "judge judge <i> 2, threshold 0.5, knows cat, dog\n" in text and text.count("threshold 0.5") == 1
    assert "the judge's own error is not known and not counted" in text
    assert "stored in int8: 98 % of the change left under noise of 150 % of it" in text
    assert "removed" not in text and len(text.splitlines()) < 30
    assert "none was run" in replace(RECEIPT, attacks=()).summary()
    assert "no judge" in replace(RECEIPT, judge=None).summary()
    many = replace(RECEIPT, words=RECEIPT.words * 50, kept=RECEIPT.kept * 50, attacks=RECEIPT.attacks * 50)
    assert len(many.summary().splitlines()) < 40 and "and 44 more" in many.summary()


def test_the_judges_own_error_is_in_every_share() -> None:
    receipt = replace(RECEIPT, judge=KNOWING, attacks=(replace(ATTACK, judge=KNOWING, ceiling=Rate(8, 8)),))
    text = receipt.summary()
    for seen in (
        Rate(7, 8), Rate(2, 8), receipt.kept_before, receipt.kept_after, receipt.after, Rate(3, 8), Rate(0, 8), Rate(1, 16),
    ):  # fmt: skip
        assert str(KNOWING.counted(seen)) in text
    assert "12 % [" not in text.split("still there")[0].replace(str(KNOWING.counted(Rate(2, 8))), "")
    assert (
        f"after the judge's own error: it sees {Rate(90, 100)} of what is there, and {Rate(5, 100)} of what isn't"
        in text
    )
    raw = json.loads(receipt_json(receipt))
    true = KNOWING.counted(Rate(2, 8))
    wanted = {"share": round(true.share, 4), "low": round(true.low, 4), "high": round(true.high, 4)}
    assert raw["words"][1]["after"]["corrected"] == wanted
    assert {"corrected"} <= set(raw["attacks"][0]["attacked"]) & set(raw["survival"][0]["after"])
    assert raw["judge"]["note"] == raw["attacks"][0]["judge"]["note"] == KNOWING.note
    assert json.loads(receipt_json(RECEIPT))["judge"]["note"] == "the judge's own error is not known and not counted"
    blind = replace(JUDGE, error=JudgeError(Rate(1, 2), Rate(1, 2)))
    assert blind.counted(Rate(2, 8)) == Rate(2, 8) and "this judge says nothing" in blind.note


def test_two_judges_are_told_apart() -> None:
    other = replace(JUDGE, version="3")
    text = replace(RECEIPT, attacks=(replace(ATTACK, judge=other),)).summary()
    assert "judge judge <i> 3, threshold 0.5, knows cat, dog" in text


def test_what_the_model_also_carried() -> None:
    assert "also carried" not in RECEIPT.summary()
    text = replace(RECEIPT, carried=("an erasure of tulip by uce", "a prompt memory (suppress) of beer")).summary()
    assert "the model also carried: an erasure of tulip by uce; a prompt memory (suppress) of beer" in text


def test_an_attack_is_read_beside_the_base_model() -> None:
    told = replace(ATTACK, steps=20, cfg=7.5, ceiling=Rate(0, 8), tried=5).summary(JUDGE)
    assert "on the base model, asked the same: 0 % [0, 32], which shows none either" in told
    nowhere = replace(ATTACK, found_on_base=Rate(0, 8)).summary()
    assert "given what was found: 0 % [0, 32], so nothing follows from a zero" in nowhere
    assert "on the base model, given what was found: 62 %" in ATTACK.summary() and "follows" not in ATTACK.summary()
    assert "drawn in 20 steps, cfg 7.5; 5 finds tried" in told
    assert "none either" not in replace(ATTACK, ceiling=Rate(8, 8)).summary(JUDGE)


def test_curves_are_kept_and_pooled() -> None:
    curve = ((0.3, 3), (0.5, 1))
    words = tuple(replace(c, curve=curve) for c in RECEIPT.words)
    receipt = replace(RECEIPT, words=words, attacks=(replace(ATTACK, curve=curve),))
    assert parse_receipt(receipt_json(receipt)) == receipt
    assert receipt.curve == ((0.3, Rate(6, 16)), (0.5, Rate(2, 16))) and RECEIPT.curve == ()
    assert "seen after at other thresholds: 0.3: 6 of 16, 0.5: 2 of 16" in receipt.summary()
    assert replace(receipt, words=(words[0], RECEIPT.words[1])).curve == (), "one without"
    for bad in ([[0.3]], [[0.3, 9]], [[2, 1]], [3], "x"):
        with pytest.raises(FileError, match=r"^receipt: curve must be"):
            parse_receipt(changed(attacks=[{**json.loads(receipt_json(receipt))["attacks"][0], "curve": bad}]))


def test_receipts_of_older_versions_are_read() -> None:
    raw = json.loads(receipt_json(RECEIPT))
    del raw["carried"]
    for judge in (raw["judge"], raw["attacks"][0]["judge"]):
        del judge["labels"], judge["error"]
    del raw["weights"]
    for name in ("base_weights", "steps", "cfg", "ceiling", "tried", "curve"):
        del raw["attacks"][0][name]
    for counted in (*raw["words"], *raw["kept"]):
        del counted["curve"]
    old = replace(JUDGE, labels=())
    assert parse_receipt(json.dumps(raw)) == replace(RECEIPT, judge=old, attacks=(replace(ATTACK, judge=old),))


def test_another_base_is_named() -> None:
    assert not RECEIPT.other_base(BASE) and not RECEIPT.other_base("0123456789abcdee"), "stored in another precision"
    assert "not the model that the receipt was made on" in RECEIPT.other_base(OTHER)
    assert RECEIPT.other_base("not hex")


def test_other_weights_of_the_same_base_are_named() -> None:
    assert not RECEIPT.other_weights("cd" * 32), "an older receipt says nothing of them"
    exact = replace(RECEIPT, weights="ab" * 32)
    assert not exact.other_weights("ab" * 32) and "sha256 abababababababab..." in exact.summary()
    assert "the same base with other weights (sha256 cdcd" in exact.other_weights("cd" * 32)


@pytest.mark.parametrize(
    ("changes", "marks", "sentence"),
    [
        ({}, (BASE, ERASED, "ab" * 32), ""),
        ({"weights": ""}, (BASE, ERASED, "cd" * 32), ""),
        ({"concept": "CAT"}, (BASE, ERASED, "ab" * 32), ""),
        ({"base_weights": "cd" * 32}, (BASE, ERASED, "ab" * 32), ""),
        ({"base_weights": "cd" * 32}, (BASE, ERASED, "ab" * 32, "", "cd" * 32), ""),
        ({"base_weights": "ab" * 32}, (BASE, ERASED, "ab" * 32, "", "cd" * 32), "beside a base_model that is not the"),
        ({"concept": "fish"}, (BASE, ERASED, "ab" * 32), "attacked 'fish', which this erasure does not suppress"),
        ({}, (OTHER, ERASED, "ab" * 32), "another base model"),
        ({}, (BASE, OTHER, "ab" * 32), "at another strength"),
        ({}, (BASE, ERASED, "cd" * 32), "at another strength"),
        ({"memory": "ef" * 32}, (BASE, ERASED, "ab" * 32, "ef" * 32), ""),
        (
            {"memory": "ef" * 32},
            (BASE, ERASED, "ab" * 32),
            "with a prompt memory that the receipt's model doesn't have",
        ),
        ({"memory": "ef" * 32}, (BASE, ERASED, "ab" * 32, "12" * 32), "with a prompt memory that the receipt's model"),
        ({}, (BASE, ERASED, "ab" * 32, "12" * 32), "without the prompt memory of the receipt's model"),
    ],
)
def test_whose_attack_it_was(changes: dict, marks: tuple[str, ...], sentence: str) -> None:
    fault = replace(ATTACK, **changes).fault(SPEC, *marks)
    assert sentence in fault and bool(fault) == bool(sentence)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, ""),
        ({"concept": "fish"}, "P4D attacked 'fish', which this erasure does not suppress"),
        ({"base": OTHER}, "P4D was run on an erasure of another base model"),
        ({"base_weights": "cd" * 32}, "beside a base_model that is not the receipt's model"),
    ],
)
def test_a_receipt_with_an_attack_on_something_else_is_not_of_this_erasure(changes: dict, sentence: str) -> None:
    """Written by hand into a file that is otherwise in order."""
    receipt = replace(RECEIPT, weights="12" * 32, attacks=(ATTACK, replace(ATTACK, **changes)))
    why = receipt.mismatch(erasure())
    assert sentence in why and bool(why) == bool(sentence)


# Rounding, against numpy and hand-written grids


def fp8_grid() -> np.ndarray:
    """All finite values of e4m3fn: sign, four bits of exponent with bias 7, three of mantissa; 1111.111 is NaN."""
    values = [
        (m / 8 if e == 0 else 1 + m / 8) * 2.0 ** (max(e, 1) - 7)
        for e in range(16)
        for m in range(8)
        if (e, m) != (15, 7)
    ]
    return np.array(sorted({s * v for v in values for s in (1, -1)}))


def oracle(name: str, x: np.ndarray) -> np.ndarray:
    if name == "fp16":
        return np.clip(x, -65504, 65504).astype(np.float16).astype(np.float32)
    if name == "int8":
        scale = np.abs(x).max() / np.float32(127)
        return np.rint(x / scale).astype(np.int32) * scale
    if name == "bf16":  # eight bits of significand
        mantissa, exponent = np.frexp(x)
        return np.ldexp(np.rint(mantissa * 256) / 256, exponent).astype(np.float32)
    grid = fp8_grid()
    return grid[np.abs(x[..., None] - grid).argmin(-1)].astype(np.float32)


@pytest.mark.parametrize("name", list(ROUNDINGS))
@pytest.mark.parametrize("scale", [1e-2, 1.0, 300.0])
def test_rounding_is_what_the_type_says(name: str, scale: float) -> None:
    g = torch.Generator().manual_seed(3)
    x = scale * torch.randn(40, 50, generator=g)
    assert np.allclose(ROUNDINGS[name](x).numpy(), oracle(name, x.numpy()), rtol=1e-6, atol=1e-12)
    assert torch.equal(ROUNDINGS[name](ROUNDINGS[name](x)), ROUNDINGS[name](x)) or name == "int8"
    assert not ROUNDINGS[name](torch.zeros(3, 3)).any()
    assert torch.isfinite(ROUNDINGS[name](torch.tensor([[1e6, -1e6]]))).all()


def test_what_is_left_of_a_change() -> None:
    """By hand: one matrix, int8 with the scale 1."""
    weight = torch.tensor([[127.0, 10.2], [0.0, -3.4]])
    change = torch.tensor([[0.0, 0.4], [2.3, 0.0]])
    loss = rounding_loss([(weight, change)], ROUNDINGS["int8"])
    # W + dW = 127, 10.6, 2.3, -3.4 -> 127, 11, 2, -3; W -> 127, 10, 0, -3
    assert loss.worst == pytest.approx(0.4 / 127, rel=1e-4)
    assert loss.noise == pytest.approx(math.sqrt((0.4**2 + 0.3**2 + 0.4**2) / (0.4**2 + 2.3**2)), rel=1e-4)
    assert loss.left == pytest.approx((0.4 * 1 + 2.3 * 2) / (0.4**2 + 2.3**2), rel=1e-4)


def test_small_changes_come_through_on_average_and_exact_types_lose_nothing() -> None:
    g = torch.Generator().manual_seed(4)
    weight, change = torch.randn(300, 300, generator=g), 1e-3 * torch.randn(300, 300, generator=g)
    loss = rounding_loss([(weight, change)], ROUNDINGS["int8"])
    assert loss.noise > 4 and loss.left == pytest.approx(1, abs=0.15)
    exact = rounding_loss([(torch.ones(4, 4), torch.ones(4, 4))], ROUNDINGS["fp16"])
    assert exact == RoundingLoss(0.0, 0.0, 1.0)
    with pytest.raises(ValueError, match="changes no weight"):
        rounding_loss([(weight, torch.zeros_like(weight))], ROUNDINGS["fp16"])
