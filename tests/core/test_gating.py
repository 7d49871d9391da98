"""Facilitated transport: a scalar on each product, by how much the prompt is about the concept."""

from __future__ import annotations

import pytest
import torch

from erasure_core import ConceptSpec, Delta, Erasure, WrongModelError, erase, gate_strengths, gated, load, save
from erasure_core.analytic import AnalyticPort

pytestmark = pytest.mark.core


def made(port: AnalyticPort, concept: str, seed: int = 0, rank: int = 2) -> Erasure:
    g = torch.Generator().manual_seed(seed)
    header = erase(port, ConceptSpec.parse(concept, "dog"), "uce").header
    factors = [
        (s, torch.randn(s.d_out, rank, generator=g), torch.randn(rank, s.d_in, generator=g)) for s in port.sites()
    ]
    return Erasure(header, {s.name: Delta(up.double(), down.double()) for s, up, down in factors})


def test_the_strength_is_the_likest_words(port) -> None:
    """By hand: the cosine of mean content rows, taken from the BOS row, or the share of the word's parts in the prompt."""

    def pooled(text: str) -> torch.Tensor:
        states = port.text([text])[0].states
        return states[1 : 1 + len(text.split())].mean(0) - states[0]

    erasure = made(port, "red car, old bus")
    for prompt in ("a car", "tree", "red car", "Old, slow bus"):
        words = {x.strip(",").lower() for x in prompt.split()}
        expected = []
        for word in ("red car", "old bus"):
            shared = len(words & set(word.split())) / 2
            similar = float(torch.cosine_similarity(pooled(prompt), pooled(word), dim=0))
            expected.append(max(0.0, shared, similar))
        (strength,) = gate_strengths(port, [erasure], prompt)
        assert strength == pytest.approx(max(expected), abs=1e-9), prompt
    assert gate_strengths(port, [erasure], "an old bus at night") == [1.0]
    assert 0 <= gate_strengths(port, [erasure], "")[0] < 1


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


def test_it_works_from_a_file(port, tmp_path) -> None:
    erasure = made(port, "red car")
    again = load(save(erasure, tmp_path / "x.safetensors"))
    assert gate_strengths(port, [again], "a car") == gate_strengths(port, [erasure], "a car")


def test_none_and_strangers_are_refused(port) -> None:
    with pytest.raises(ValueError, match="at least one"):
        gated(port, [], "a car")
    with pytest.raises(WrongModelError):
        gated(AnalyticPort(width=40), [made(port, "red car")], "a car")
