"""Dark embeddings: what is mined, what a file gives back, and what no file gets past."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure_core import ConceptError, ConceptSpec, Family, FileError, Header, WrongModelError, formats
from erasure_core.dark import DarkEmbeddings, load_dark, read_dark_header, save_dark, save_words

pytestmark = pytest.mark.core
HEADER = Header("mine", {"steps": 150, "seed": 3, "form": "words"}, ConceptSpec.parse("cat, 猫"), Family("sdxl", 12, 2, 3),
    "0123abcd", "0.1.0")  # fmt: skip


def dark(words: bool = True) -> DarkEmbeddings:
    g = torch.Generator().manual_seed(1)
    vectors = {"clip_l": torch.randn(2, 3, 5, generator=g), "clip_g": torch.randn(2, 3, 7, generator=g)}
    return DarkEmbeddings(HEADER, torch.randn(2, 6, 12, generator=g), (0.75, 0.25), vectors if words else {})


@pytest.mark.parametrize("words", [True, False])
def test_round_trip(tmp_path: Path, words: bool) -> None:
    before = dark(words)
    after = load_dark(save_dark(before, tmp_path / "x.safetensors"))
    assert after.header == before.header == read_dark_header(tmp_path / "x.safetensors")
    assert after.scores == before.scores and after.concept == "cat"
    assert torch.equal(after.states, before.states)
    assert after.words.keys() == before.words.keys()
    assert all(torch.equal(after.words[k], v) for k, v in before.words.items())
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_words_become_textual_inversions(tmp_path: Path) -> None:
    before = dark()
    paths = save_words(before, tmp_path, "found")
    assert [p.name for p in paths] == ["found-1.safetensors", "found-2.safetensors"]
    for i, path in enumerate(paths):
        stored = load_file(path)
        assert set(stored) == {"clip_l", "clip_g"}
        assert all(torch.equal(stored[k], v[i]) for k, v in before.words.items())
    with pytest.raises(FileError, match=r"no words to write"):
        save_words(dark(words=False), tmp_path, "none")


def test_it_says_what_it_is() -> None:
    text = dark().summary()
    assert "2 dark embeddings for cat, 猫 (3 pseudo-words each), mined in sdxl" in text
    assert "1: 0.750" in text and "seed 3" in text
    dark().check_fits(HEADER.family)
    with pytest.raises(WrongModelError, match=r"mined in sdxl .text width 12., but this is sd15"):
        dark().check_fits(Family("sd15", 768, 2, 4))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"states": torch.zeros(0, 6, 12)}, "states must be"),
        ({"states": torch.zeros(6, 12)}, "states must be"),
        ({"scores": (1.0,)}, "1 scores for 2"),
        ({"words": {"t5": torch.zeros(2, 1, 4)}}, "words of 't5'"),
        ({"words": {"clip_l": torch.zeros(1, 1, 4)}}, "words of 'clip_l'"),
        ({"words": {"clip_l": torch.zeros(2, 1, 4), "clip_g": torch.zeros(2, 2, 4)}}, "different numbers of words"),
    ],
)
def test_parts_must_belong_together(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(dark(), **change)


def rewritten(path: Path, change) -> Path:
    """The file with its tensors and metadata passed through ``change``."""
    with safe_open(path, framework="pt") as f:
        metadata = dict(f.metadata())
    tensors: dict[str, Tensor] = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


def _nan(tensors: dict, _: dict) -> None:
    tensors["states"][1, 2, 3] = torch.nan


def _header(**fields):
    def change(_: dict, metadata: dict) -> None:
        metadata["dark_embeddings"] = json.dumps({**json.loads(metadata["dark_embeddings"]), **fields})

    return change


HOSTILE = {
    "nan": (_nan, "not numbers"),
    "foreign": (lambda t, m: m.clear(), "not a set of dark embeddings"),
    "other tensor": (lambda t, m: t.update(extra=torch.zeros(1)), "holds states, scores and words"),
    "no states": (lambda t, m: t.pop("states"), "holds states, scores and words"),
    "shape": (lambda t, m: t.update(states=torch.zeros(2, 6)), "shape"),
    "integers": (lambda t, m: t.update(scores=torch.zeros(2, dtype=torch.int64)), "type"),
    "counts": (lambda t, m: t.update(scores=torch.zeros(3)), "3 scores for 2"),
    "width": (lambda t, m: t.update(states=torch.zeros(2, 6, 13)), "width 13"),
    "broken json": (lambda t, m: m.update(dark_embeddings="{"), "not valid JSON"),
    "newer": (_header(format=99), "Update Concept Erasure"),
    "no concept": (_header(erase=[]), "concept"),
}


@pytest.mark.parametrize(("change", "message"), HOSTILE.values(), ids=HOSTILE)
def test_a_bad_file_gets_a_sentence(tmp_path: Path, change, message: str) -> None:
    path = rewritten(save_dark(dark(), tmp_path / "x.safetensors"), change)
    with pytest.raises(FileError, match=message) as error:
        load_dark(path)
    assert len(str(error.value)) < 400


def test_damaged_files(tmp_path: Path) -> None:
    path = save_dark(dark(), tmp_path / "x.safetensors")
    whole = path.read_bytes()
    for cut in (0, 9, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(FileError, match=r"x\.safetensors: "):
            load_dark(path)
    path.write_bytes(b"\x80\x04" + whole)
    with pytest.raises(FileError, match=r"pickled|not a safetensors"):
        load_dark(path)
    with pytest.raises(FileError, match=r"no such file"):
        load_dark(tmp_path / "missing.safetensors")


def test_an_oversized_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_dark(dark(), tmp_path / "x.safetensors")
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 100)
    with pytest.raises(FileError, match=r"too large"):
        load_dark(path)


def test_nothing_half_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_dark(dark(), tmp_path / "x.safetensors")
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(formats, "save_file", full)
    for write in (lambda: save_dark(dark(), path), lambda: save_words(dark(), tmp_path, "y")):
        with pytest.raises(FileError, match=r"could not be written"):
            write()
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["x.safetensors"]
    broken = dark()
    broken.states[0, 0, 0] = torch.inf
    with pytest.raises(FileError, match=r"states has values that are not numbers"):
        save_dark(broken, path)


def test_finds_of_several_concepts_stay_with_theirs(tmp_path) -> None:
    """From Dark Miner through a file into another request, whatever the order of its lines."""
    header = replace(HEADER, spec=ConceptSpec.parse("cat, kitty\ncar"))
    scores = (0.5, math.nan, math.nan)
    mined = DarkEmbeddings(header, torch.randn(3, 6, 12), scores, owners=(1, 0, 1))
    read = load_dark(save_dark(mined, tmp_path / "d.safetensors"))
    assert read.owners == (1, 0, 1) and read.scores[0] == 0.5 and all(map(math.isnan, read.scores[1:]))
    states, owners = read.for_request(ConceptSpec.parse("Car\nboat\nKitty"))
    assert owners == (0, 2, 0) and torch.equal(torch.stack(states), mined.states)
    states, owners = read.for_request(ConceptSpec.parse("kitty, cat"))
    assert owners == (0,) and torch.equal(states[0], mined.states[1]), "one concept has its own"
    assert read.for_request(ConceptSpec.parse("boat"))[1] == (0, 0, 0), "or all, where none is its own by name"
    with pytest.raises(ConceptError, match=r"dark: .* bring 'car' back, and no line of concept has that word"):
        read.for_request(ConceptSpec.parse("cat\nboat"))
    assert "3 dark embeddings for car (2), cat (1)" in read.summary() and "2: nobody looked (cat)" in read.summary()
    assert read.concept == "car, cat" and replace(mined, owners=(1, 1, 1)).concept == "car"
    for wrong in ((0, 1), (0, 1, 2), (0, 1, -1)):
        with pytest.raises(ValueError, match="owners"):
            replace(mined, owners=wrong)
    with pytest.raises(FileError, match="scores has values that are not numbers"):
        save_dark(replace(mined, scores=(0.5, math.inf, 0.1)), tmp_path / "e.safetensors")
