"""Facilitated transport: a scalar on each product, by how much the prompt is about the concept."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
import torch.nn.functional as F

from erasure_core import (
    ConceptSpec,
    Delta,
    Erasure,
    TextStates,
    WrongModelError,
    erase,
    gate_strengths,
    gated,
    load,
    save,
)
from erasure_core.analytic import AnalyticPort
from erasure_core.concept import Rows, rows_of
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort
from erasure_core.vocabulary import VOCABULARY

pytestmark = pytest.mark.core


def made(port: AnalyticPort, concept: str, seed: int = 0, rank: int = 2) -> Erasure:
    g = torch.Generator().manual_seed(seed)
    header = erase(port, ConceptSpec.parse(concept, "dog"), "uce").header
    factors = [
        (s, torch.randn(s.d_out, rank, generator=g), torch.randn(rank, s.d_in, generator=g)) for s in port.sites()
    ]
    return Erasure(header, {s.name: Delta(up.double(), down.double()) for s, up, down in factors})


def test_the_strength_is_the_likest_words(port) -> None:
    """By hand: the cosine of summary rows' means without the vocabulary's, or the share of a word's parts in the prompt."""

    def pooled(text: str) -> torch.Tensor:
        return rows_of(port.text([text])[0], Rows.SUMMARY).mean(0)

    middle = torch.stack([pooled(word) for word in VOCABULARY]).mean(0)
    erasure = made(port, "red car, old bus")
    for prompt in ("a car", "tree", "red car", "Old, slow bus"):
        words = {x.strip(",").lower() for x in prompt.split()}
        expected = []
        for word in ("red car", "old bus"):
            shared = len(words & set(word.split())) / 2
            similar = float(torch.cosine_similarity(pooled(prompt) - middle, pooled(word) - middle, dim=0))
            expected.append(max(0.0, shared, similar))
        (strength,) = gate_strengths(port, [erasure], prompt)
        assert strength == pytest.approx(max(expected), abs=1e-9), prompt
    assert gate_strengths(port, [erasure], "an old bus at night") == [1.0]
    assert 0 <= gate_strengths(port, [erasure], "")[0] < 1


class Clip(AnalyticPort):
    """Like CLIP's encoder: a BOS row that every prompt shares, longer (43) than the others (28), and half of each other row
    shared as well. Rows behind the words hold what these mean together, and a little of their place."""

    def __init__(self) -> None:
        super().__init__(width=768, blocks=1)

    _word = cache(AnalyticPort._word)

    def _encode(self, prompt: str) -> TextStates:
        text = super()._encode(prompt)
        words = [self._word(x) for x in prompt.lower().split()]
        rows = [sum(words[: i + 1]) / (i + 1) for i in range(len(words))]
        behind = range(len(words), self.length - 1)
        rows += [(rows[-1] if rows else self._word("<nothing>")) + 0.3 * self._word(f"<place {i}>") for i in behind]
        states = F.normalize(self._word("<shared>"), dim=0) + F.normalize(torch.stack(rows))
        bos = 43 * F.normalize(self._word("<bos>"), dim=0)
        return TextStates(prompt, torch.cat([bos[None], 28 * F.normalize(states)]), text.kinds)


OTHERS = ("a house", "tree", "a red rose", "a photo of a beach at night", "an old bus, rain", "dog food", "")


def test_a_long_row_that_all_prompts_share_does_not_hold_the_gate_open() -> None:
    port = Clip()
    erasure = made(port, "cat, siamese kitten")
    states = {x.prompt: x.states for x in port.text(["cat", *OTHERS])}
    flat = [float(F.cosine_similarity(states["cat"].flatten(), states[x].flatten(), dim=0)) for x in OTHERS]
    assert min(flat) > 0.5, "the paper's similarity"
    for prompt in OTHERS:
        assert gate_strengths(port, [erasure], prompt)[0] < 0.3, prompt
    for prompt in ("cat", "a photo of a Cat on a sofa", "two siamese kitten at night"):
        assert gate_strengths(port, [erasure], prompt) == [1.0]


def test_other_words_for_it_open_the_gate_and_other_things_do_not() -> None:
    """On the demo model, whose encoder learned what these words mean from captions."""
    port = EmojiCanvasPort(EmojiCanvas.load())
    cat, bomb = made(port, "cat"), made(port, "bomb")
    for prompt in ("kitty", "a kitty", "a picture of one kitty"):
        assert gate_strengths(port, [cat], prompt)[0] > 0.9, prompt
    for prompt in ("a house", "a red rose", "a photo of a castle at night", "a beer", ""):
        assert max(gate_strengths(port, [cat, bomb], prompt)) < 0.3, prompt


def test_every_chunk_of_a_long_prompt_is_read(port, monkeypatch) -> None:
    """Two words for one thing, of which the encoder knows that; a prompt names it in its first chunk."""
    alone, encode = port._word, port._encode
    monkeypatch.setattr(port, "_word", lambda word: alone("cat" if word == "kitty" else word))

    def chunks(prompt: str) -> TextStates:
        parts = [encode(x) for x in prompt.split(" | ")]
        return TextStates(prompt, torch.cat([x.states for x in parts]), torch.cat([x.kinds for x in parts]))

    monkeypatch.setattr(port, "_encode", chunks)
    cat = made(port, "cat")
    assert gate_strengths(port, [cat], "kitty | a red bus")[0] == pytest.approx(1)
    assert gate_strengths(port, [cat], "a red bus | tree")[0] < 0.6


def test_the_product_is_scaled_once_and_no_factor_meets_anothers(port) -> None:
    parts = [made(port, "red car", 1), made(port, "old bus", 2, rank=3)]
    prompt = "a car"
    strengths = gate_strengths(port, parts, prompt)
    assert all(0 < m < 1 for m in strengths)
    whole = gated(port, parts, prompt)
    for name, delta in whole.deltas.items():
        expected = sum(m * p.deltas[name].up @ p.deltas[name].down for m, p in zip(strengths, parts, strict=True))
        assert torch.allclose(delta.dense(), expected) and delta.rank == 5
    assert {c.name for c in whole.header.spec.erase} == {"red car", "old bus"}
    assert whole.header.settings == {"gated": 2}


def test_one_may_erase_what_another_replaces_with(port) -> None:
    """Joined they would contradict each other; gates take them one at a time."""
    parts = [made(port, "car", 1), made(port, "bus", 2)]  # to dog
    header = replace(parts[1].header, spec=ConceptSpec.parse("dog"))
    whole = gated(port, [parts[0], replace(parts[1], header=header)], "a dog")
    assert [(c.name, c.to) for c in whole.header.spec.erase] == [("car", ""), ("dog", "")]


def test_it_works_from_a_file(port, tmp_path) -> None:
    erasure = made(port, "red car")
    again = load(save(erasure, tmp_path / "x.safetensors"))
    assert gate_strengths(port, [again], "a car") == gate_strengths(port, [erasure], "a car")


def test_none_and_strangers_are_refused(port) -> None:
    with pytest.raises(ValueError, match="at least one"):
        gated(port, [], "a car")
    with pytest.raises(WrongModelError):
        gated(AnalyticPort(width=40), [made(port, "red car")], "a car")
