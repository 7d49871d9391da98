"""Files: what is written comes back in every layout, and nothing hostile gets further than a sentence."""

from __future__ import annotations

import errno
import json
import os
import struct
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from erasure_core import (
    Concept,
    ConceptSpec,
    Delta,
    Erasure,
    Family,
    FileError,
    Header,
    Layout,
    formats,
    load,
    read_header,
    save,
)
from erasure_core.api import erase
from erasure_core.formats import check_file_name, parse_header

pytestmark = pytest.mark.core
SITES = [
    "input_blocks.1.1.transformer_blocks.0.attn2.to_k",
    "input_blocks.1.1.transformer_blocks.0.attn2.to_v",
    "middle_block.1.transformer_blocks.0.attn2.to_v",
    "output_blocks.11.1.transformer_blocks.0.attn2.to_k",
]
OTHERS = [
    "input_blocks.1.1.transformer_blocks.0.attn1.to_out.0",
    "middle_block.1.transformer_blocks.1.ff.net.0.proj",
    "output_blocks.11.1.transformer_blocks.0.ff.net.2",
]
SPEC = ConceptSpec(
    (Concept(("cat", "猫", "👨\u200d👩\u200d👧"), "dog"), Concept(("Van Gogh <b>",))), ("bird & co", "می\u200cخواهم")
)


def erasure(family: str = "sd15", ranks: tuple[int, ...] = (3, 2, 3, 1), scale: float = 0.1) -> Erasure:
    g = torch.Generator().manual_seed(1)
    header = Header(
        "uce",
        {"ridge": 1e-3, "rows": "last", "n": 3, "on": True},
        SPEC,
        Family(family, 16, 2, 4),
        "0123abcd",
        "0.1.0",
        0.8,
    )
    deltas = {
        s: Delta(scale * torch.randn(8, r, generator=g), scale * torch.randn(r, 16, generator=g))
        for s, r in zip(SITES, ranks, strict=True)
    }
    return Erasure(header, deltas)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save(erasure(), tmp_path / "good.safetensors")


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("family", ["sd15", "sdxl", "analytic"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_round_trip(tmp_path: Path, layout: Layout, family: str, dtype: torch.dtype, tolerance: float) -> None:
    before = erasure(family)
    path = save(before, tmp_path / "x.safetensors", layout=layout, dtype=dtype)
    after = load(path)
    assert after.header == before.header == read_header(path)
    assert list(after.deltas) == list(before.deltas)
    for name, delta in before.deltas.items():
        got = after.deltas[name].dense()
        assert got.dtype == torch.float32
        assert (got - delta.dense()).norm() < tolerance * delta.dense().norm()
    assert os.listdir(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize("layout", list(Layout))
@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_any_linear_layer_round_trips(tmp_path: Path, layout: Layout, family: str) -> None:
    """Low-rank or dense, scaled or not, under the names that each reader has for it."""
    g = torch.Generator().manual_seed(2)
    shapes = [(16, 16), (64, 8), (8, 32)]
    changes = [Delta(torch.randn(o, 2, generator=g), torch.randn(2, i, generator=g)) for o, i in shapes]
    changes[2] = Delta(changes[2].dense())
    before = Erasure(erasure(family).header, dict(zip(OTHERS, changes, strict=True))).scaled(0.5)
    path = save(before, tmp_path / "x.safetensors", layout=layout)
    after = load(path)
    assert list(after.deltas) == OTHERS and after.header == before.header
    for name, delta in before.deltas.items():
        assert torch.allclose(after.deltas[name].dense(), delta.dense(), atol=1e-6)
    names = {
        Layout.FULL: "diffusion_model.middle_block.1.transformer_blocks.1.ff.net.0.proj.diff",
        Layout.DIFFUSERS: "unet.mid_block.attentions.0.transformer_blocks.1.ff.net.0.proj.lora_A.weight",
        Layout.LORA: "lora_unet_mid_block_attentions_0_transformer_blocks_1_ff_net_0_proj.lora_down.weight"
        if family == "sd15"
        else "lora_unet_middle_block_1_transformer_blocks_1_ff_net_0_proj.lora_down.weight",
    }
    stored = load_file(path)
    assert names[layout] in stored
    if layout is Layout.DIFFUSERS:
        assert all(".lora_" in name for name in stored), "its readers know nothing else"


def test_a_dense_change_is_stored_dense(tmp_path: Path) -> None:
    dense = Erasure(erasure().header, {SITES[0]: Delta(torch.randn(8, 16)), SITES[1]: erasure().deltas[SITES[1]]})
    after = load(save(dense, tmp_path / "x.safetensors"))
    assert torch.equal(after.deltas[SITES[0]].dense(), dense.deltas[SITES[0]].dense())
    assert after.deltas[SITES[0]].down is None and after.deltas[SITES[1]].rank == 2


def test_names_and_scale_in_the_lora_layout(tmp_path: Path) -> None:
    """What Load LoRA computes from the file, up @ down * alpha / rank, is the change."""
    stored = load_file(save(erasure(), tmp_path / "x.safetensors"))
    base = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    up, down, alpha = (stored[f"{base}.{k}"] for k in ("lora_up.weight", "lora_down.weight", "alpha"))
    assert (up @ down * (alpha / down.shape[0]) - erasure().deltas[SITES[0]].dense()).abs().max() < 1e-6
    assert alpha.shape == ()
    assert all(k.startswith("lora_unet_") for k in stored) and len(stored) == 12
    xl = load_file(save(erasure("sdxl"), tmp_path / "xl.safetensors"))
    assert "lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_k.alpha" in xl


def test_names_and_one_rank_in_the_diffusers_layout(tmp_path: Path) -> None:
    stored = load_file(save(erasure(), tmp_path / "x.safetensors", layout=Layout.DIFFUSERS))
    base = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    product = stored[base + ".lora_B.weight"] @ stored[base + ".lora_A.weight"]
    assert (product - erasure().deltas[SITES[2]].dense()).abs().max() < 1e-6
    assert {t.shape[0] for k, t in stored.items() if "lora_A" in k} == {3}, "diffusers before 0.36 misreads mixed ranks"


def test_a_layer_without_change_is_left_out(tmp_path: Path) -> None:
    before = erasure(ranks=(3, 0, 0, 1))
    for layout in Layout:
        after = load(save(before, tmp_path / "x.safetensors", layout=layout))
        assert list(after.deltas) == [SITES[0], SITES[3]]
    with pytest.raises(FileError, match=r"changes nothing"):
        save(erasure(ranks=(0, 0, 0, 0)), tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_values_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"float16 cannot hold. Save in full precision"):
        save(erasure(scale=1e6), tmp_path / "x.safetensors", dtype=torch.float16)
    assert not list(tmp_path.iterdir())


def test_what_could_not_be_read_is_neither_trained_nor_written(tmp_path: Path, port) -> None:
    made = erasure()
    vocabulary = ", ".join(f"word{i}" for i in range(5000))
    kept = replace(made, header=replace(made.header, method="merge of " * 30, settings={"vocabulary": vocabulary}))
    assert load(save(kept, tmp_path / "x.safetensors")).header == kept.header
    crowd = tuple(f"{i:020d}" for i in range(60_000))
    spec = replace(made.header.spec, keep=crowd)
    with pytest.raises(FileError, match="at most 1048576 are read"):
        save(replace(made, header=replace(made.header, spec=spec)), tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()
    with pytest.raises(FileError, match="Name fewer words"):
        erase(port, spec, "uce", progress=lambda *_: pytest.fail("it began"))


def test_what_is_loaded_does_not_change_with_its_file(file: Path) -> None:
    made = load(file)
    before = {site: delta.dense() for site, delta in made.deltas.items()}
    with file.open("r+b") as f:
        f.seek(-64, os.SEEK_END)
        f.write(bytes(64))
    assert all(torch.equal(delta.dense(), before[site]) for site, delta in made.deltas.items())


@pytest.mark.parametrize("where", ["save_file", "replace", "touch"])
def test_a_full_disk_leaves_the_old_file_and_no_other(file: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    old = file.read_bytes()

    def full(tensors=None, target=None, *_, **__):
        if where == "save_file":
            Path(target).write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr({"save_file": formats, "replace": os, "touch": Path}[where], where, full)
    with pytest.raises(FileError, match=r"good.safetensors: could not be written .*No space left.*Free some space"):
        save(erasure(ranks=(1, 1, 1, 1)), file)
    monkeypatch.undo()
    assert file.read_bytes() == old
    assert os.listdir(file.parent) == [file.name]


def test_a_file_that_another_program_has_open(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows refuses to replace what is mapped into memory."""

    def refuse(*_):
        raise PermissionError(errno.EACCES, "Access is denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(
        FileError, match=r"Load LoRA, or another program has it open: save under another name or restart"
    ):
        save(erasure(), file)
    with pytest.raises(FileError, match=r"Free some space or choose another folder"):
        save(erasure(), file.with_name("new.safetensors"))
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    ("family", "architecture", "kohya"),
    [
        ("sd15", "stable-diffusion-v1/lora", {"ss_base_model_version": "sd_v1"}),
        ("sd20", "sd20/lora", {"ss_base_model_version": "sd_v2", "ss_v2": "True"}),
        ("sdxl", "stable-diffusion-xl-v1-base/lora", {"ss_base_model_version": "sdxl_base_v1-0"}),
        ("sdxl-refiner", "stable-diffusion-xl-v1-refiner/lora", {}),
        ("emojicanvas", "emojicanvas/lora", {}),
    ],
)
def test_others_can_tell_the_family(tmp_path: Path, family: str, architecture: str, kohya: dict) -> None:
    with safe_open(save(erasure(family), tmp_path / "x.safetensors"), framework="pt") as f:
        said = f.metadata()
    assert said["modelspec.architecture"] == architecture
    assert {k: v for k, v in said.items() if k.startswith("ss_")} == kohya


def test_a_missing_folder_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(FileError, match=r"could not be written"):
        save(erasure(), tmp_path / "no" / "x.safetensors")


@given(st.data())
def test_a_file_cut_off_anywhere(file: Path, data: st.DataObject) -> None:
    whole = file.read_bytes()
    short = file.with_name("short.safetensors")
    short.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    for read in (load, read_header):
        with pytest.raises(FileError, match=r"^short.safetensors: .*(cut off|damaged)"):
            read(short)


@given(st.binary(max_size=300))
def test_random_bytes(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError):
        load(path)


@given(st.data())
def test_flipped_bytes_load_or_are_refused(file: Path, data: st.DataObject) -> None:
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    bad = file.with_name("bad.safetensors")
    bad.write_bytes(bytes(content))
    try:
        result = load(bad)
    except FileError:
        return
    assert all(torch.isfinite(d.up).all() for d in result.deltas.values())


@pytest.mark.parametrize("claim", [1 << 23, (1 << 23) + 1, 1 << 40, (1 << 64) - 1])
def test_an_oversized_header_claim_reads_nothing(tmp_path: Path, claim: int) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", claim) + b'{"a":1}' + b" " * 100)
    with pytest.raises(FileError, match=r"claims|cut off"):
        load(path)


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580, 0x4B50])
def test_a_header_length_that_looks_like_a_pickle_is_no_pickle(file: Path, length: int) -> None:
    """640 = b'\\x80\\x02', 19280 = b'PK': a good file whose header happens to be that long still loads."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    header, rest = content[8 : 8 + size].rstrip(), content[8 + size :]
    if len(header) > length:
        length += 1 << 16
    file.write_bytes(struct.pack("<Q", length) + header.ljust(length) + rest)
    assert load(file).header.spec == SPEC


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_are_named_as_such_and_never_opened(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "x.safetensors"
    torch.save({"a": torch.zeros(2)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(FileError, match=r"pickled file .*can run code"):
        load(path)


def test_a_foreign_lora_and_missing_files(tmp_path: Path) -> None:
    save_file({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, tmp_path / "lora.safetensors", {"ss_tag": "1"})
    with pytest.raises(FileError, match=r"not an erasure. If it is a LoRA, use the Load LoRA node"):
        load(tmp_path / "lora.safetensors")
    for missing in (tmp_path / "no.safetensors", tmp_path, tmp_path / "a\0b"):
        with pytest.raises(FileError, match=r"no such file"):
            load(missing)


def tampered(file: Path, change) -> Path:
    with safe_open(file, framework="pt") as f:
        metadata = f.metadata()
    stored = load_file(file)
    change(stored)
    save_file(stored, file, metadata)
    return file


K = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: t[K + ".lora_up.weight"].fill_(float("nan")), "not numbers"),
        (lambda t: t[K + ".lora_down.weight"].fill_(float("-inf")), "not numbers"),
        (lambda t: t.update({K + ".alpha": torch.tensor(float("inf"))}), "not numbers"),
        (
            lambda t: t.update({K + ".alpha": torch.tensor(3e38), K + ".lora_up.weight": torch.full((8, 3), 3e38)}),
            "too large",
        ),
        (lambda t: t.update({K + ".lora_up.weight": torch.zeros(8, 3, dtype=torch.int64)}), "type I64"),
        (lambda t: t.update({K + ".lora_up.weight": torch.zeros(8, 3, dtype=torch.float64)}), "type F64"),
        (lambda t: t.update({K + ".lora_up.weight": torch.zeros(8, 3, 1, 1)}), "shape"),
        (lambda t: t.update({K + ".lora_up.weight": torch.zeros(8, 0)}), "shape"),
        (lambda t: t.update({K + ".lora_up.weight": torch.zeros(8, 4)}), "two factors .* do not fit"),
        (lambda t: t.update({K + ".alpha": torch.zeros(1)}), "shape"),
        (lambda t: t.pop(K + ".alpha"), "is missing; the file is incomplete"),
        (lambda t: t.pop(K + ".lora_down.weight"), "is missing"),
        (lambda t: t.update({"extra": torch.zeros(1)}), "holds 1 tensors that its header does not name, first 'extra'"),
    ],
)
def test_tensors_that_contradict_the_header(file: Path, change, sentence: str) -> None:
    with pytest.raises(FileError, match=sentence):
        load(tampered(file, change))


def header(**changes: object) -> str:
    good = json.loads(formats.header_json(erasure().header, SITES, Layout.LORA))
    return json.dumps({k: v for k, v in {**good, **changes}.items() if v is not ...})


def test_everyday_words_are_noted() -> None:
    made = erasure()
    spec = replace(made.header.spec, everyday=True)
    text = formats.header_json(replace(made.header, spec=spec), SITES, Layout.LORA)
    assert (
        parse_header(text)[0].spec == spec and "everyday words" in replace(made, header=parse_header(text)[0]).summary()
    )
    assert not parse_header(header(everyday=...))[0].spec.everyday  # of files from before there were any


@pytest.mark.parametrize("field", ["format", "method", "erase", "family", "sites"])
def test_a_field_that_is_missing(field: str) -> None:
    with pytest.raises(FileError, match=f"header: {field}"):
        parse_header(header(**{field: ...}))


JUNK = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
)


@given(
    st.sampled_from(
        [
            "format",
            "layout",
            "method",
            "settings",
            "erase",
            "keep",
            "everyday",
            "family",
            "base",
            "version",
            "strength",
            "sites",
        ]
    ),
    JUNK,
)
def test_wrong_types_in_every_field(field: str, value: object) -> None:
    try:
        parsed, sites, layout = parse_header(header(**{field: value}))
    except FileError as error:
        assert str(error).startswith("header: ") and len(str(error)) < 400
        return
    assert isinstance(parsed.strength, float) and isinstance(layout, Layout) and all(isinstance(s, str) for s in sites)


@given(st.sampled_from(["name", "context_dim", "num_res_blocks", "levels"]), JUNK)
def test_wrong_types_in_the_family(field: str, value: object) -> None:
    family = {"name": "sd15", "context_dim": 768, "num_res_blocks": 2, "levels": 4, field: value}
    try:
        parsed = parse_header(header(family=family))[0].family
    except FileError:
        return
    assert isinstance(parsed.name, str) and 1 <= parsed.levels <= 64 and 1 <= parsed.num_res_blocks <= 64


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "null",
        "{",
        "[" * 100_000,
        '{"a":' * 50_000,
        '{"format":' + "9" * 5000 + "}",
        " " * (1 << 20) + "{}",
        '{"x":"' + "y" * (3 << 20) + '"}',
    ],
    ids=["empty", "list", "null", "open", "deep list", "deep object", "long number", "spaces", "megabytes"],
)
def test_broken_deep_and_huge_json(text: str) -> None:
    with pytest.raises(FileError, match=r"^header: "):
        parse_header(text)


@pytest.mark.parametrize(
    "site",
    [
        "../../etc/passwd",
        "input_blocks/../x",
        "input_blocks.1.1..x",
        "a.b",
        "input_blocks",
        "middle_block.1.a\n",
        "output_blocks.1.ü",
        "diffusion_model.input_blocks.1",
        "input_blocks" + ".a" * 13,
        "C:\\x",
        "",
    ],
)
def test_sites_are_names_of_weights(site: str) -> None:
    with pytest.raises(FileError, match=r"a UNet weight. The file is damaged, or newer: update|site must be text"):
        parse_header(header(sites=[site]))


def test_values_of_later_versions_are_said_to_be() -> None:
    with pytest.raises(
        FileError, match=r"layout 'x' is unknown. The file is damaged, or newer: update Concept Erasure"
    ):
        parse_header(header(layout="x"))
    with pytest.raises(FileError, match=r"format 2 is not 1. Update Concept Erasure"):
        parse_header(header(format=2))


def test_sites_twice_and_too_many() -> None:
    with pytest.raises(FileError, match=r"twice"):
        parse_header(header(sites=[SITES[0], SITES[0]]))
    with pytest.raises(FileError, match=r"at most 5000"):
        parse_header(header(sites=[f"input_blocks.{i}.x" for i in range(5001)]))


def test_strings_lose_control_characters_and_keep_markup_as_text() -> None:
    erase = [{"words": ["<script>\x1b[31mcat\u202e"], "to": "a\x00b"}]
    parsed = parse_header(
        header(erase=erase, keep=["x\ny"], method="m\x07", version="1\u2028", settings={"k\x1b": "v\x1b"})
    )[0]
    assert parsed.spec.erase[0] == Concept(("<script> [31mcat ",), "a b")
    assert parsed.spec.keep == ("x y",)
    assert parsed.method == "m " and parsed.version == "1 " and parsed.settings == {"k ": "v "}


def test_a_contradictory_spec_in_a_file() -> None:
    with pytest.raises(FileError, match=r"header: concept: 'cat' is listed twice"):
        parse_header(header(erase=[{"words": ["cat", "cat"], "to": ""}]))
    with pytest.raises(FileError, match=r"empty"):
        parse_header(header(erase=[{"words": [], "to": "dog"}]))


@pytest.mark.parametrize(
    "name", ["cat", " my erasure 2 ", "猫", "👨\u200d👩\u200d👧", "v1.2", "x" * 150, "console", "a.safetensors"]
)
def test_plain_names_are_fine(name: str) -> None:
    assert (
        check_file_name(name)
        == check_file_name(name.strip() + ".safetensors")
        == name.strip().removesuffix(".safetensors")
    )


@pytest.mark.parametrize(
    "name",
    [
        "",
        "  ",
        ".safetensors",
        "..",
        "../x",
        "a/b",
        "a\\b",
        "C:x",
        "/etc/x",
        "~/../x",
        "a\0b",
        "a\nb",
        "a\x7f",
        "CON",
        "con.txt",
        "con .x",
        "nul.safetensors",
        "Lpt1",
        "com¹",
        ".hidden",
        "x.",
        "x ..",
        "é" * 76,
        "y" * 151,
        "a\u202eb",
        "a*b",
        "a?b",
        'a"b',
        "a|b",
        "a<b",
        "\ud800",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(FileError, match=r"^name: "):
        check_file_name(name)


def test_the_length_of_a_name_counts_bytes() -> None:
    assert check_file_name("é" * 75)
    with pytest.raises(FileError, match=r"must have 1 to 150 bytes"):
        check_file_name("é" * 76)


@given(
    st.text(alphabet=st.characters() | st.sampled_from("./\\: \0~"), max_size=170)
    | st.sampled_from(["..", "...", "aux.x"])
)
def test_a_name_that_passes_stays_in_its_folder(tmp_path: Path, name: str) -> None:
    try:
        stem = check_file_name(name)
    except FileError:
        return
    path = tmp_path / (stem + ".safetensors")
    assert path.parent == tmp_path and path.name == stem + ".safetensors" and not stem.startswith(".")
    assert check_file_name(stem) == stem and len(path.name.encode()) < 255
    path.write_bytes(b"")
    assert path.resolve().parent == tmp_path.resolve()
    path.unlink()
