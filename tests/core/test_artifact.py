"""The Erasure: strength, fit, summary, and the fingerprint of the weights it was made on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erasure_core import ConceptSpec, Delta, Erasure, Family, Header, Role, Site, WrongModelError, erase
from erasure_core.analytic import AnalyticPort
from erasure_core.artifact import Fingerprint, same_base

pytestmark = pytest.mark.core


@pytest.fixture
def made(port, spec) -> Erasure:
    return erase(port, spec, settings={"energy": 1.0})


def test_strength_zero_changes_nothing(made) -> None:
    nothing = made.scaled(0.0)
    assert all(torch.count_nonzero(d.dense()) == 0 for d in nothing.deltas.values())
    assert nothing.header.strength == 0


@given(st.floats(-5, 5), st.floats(-5, 5))
def test_strength_is_linear_and_multiplies(made, a: float, b: float) -> None:
    both = made.scaled(a).scaled(b)
    assert both.header.strength == pytest.approx(a * b)
    for name, delta in made.deltas.items():
        assert torch.allclose(both.deltas[name].dense(), a * b * delta.dense(), rtol=1e-10, atol=1e-10)
    assert made.header.strength == 1.0, "the original stays"


def test_shape_and_rank() -> None:
    low, dense = Delta(torch.zeros(8, 3), torch.zeros(3, 5)), Delta(torch.zeros(8, 5))
    assert low.shape == dense.shape == (8, 5)
    assert (low.rank, dense.rank) == (3, 5)


def test_it_fits_the_model_it_was_made_for(made, port) -> None:
    made.check_fits(port.sites())
    made.check_fits({s.name: s for s in port.sites()})


@pytest.mark.parametrize("other", [AnalyticPort(width=40), AnalyticPort(outputs=(16,)), AnalyticPort(blocks=2)])
def test_another_model_is_refused_with_both_named(made, other) -> None:
    with pytest.raises(WrongModelError) as caught:
        made.check_fits(other.sites())
    message = str(caught.value)
    assert "analytic (text width 48)" in message
    assert f"a model with text width {other.family.context_dim}" in message
    assert "Erase the concept on this model instead" in message
    assert ("whose layers are others" in message) == (other.family.context_dim == 48), (
        "the width alone says nothing then"
    )


def test_a_model_without_cross_attention_is_refused(made) -> None:
    with pytest.raises(WrongModelError, match="this is a model without text cross-attention: 8 of 8 weights"):
        made.check_fits([])


def test_the_summary_says_what_how_and_on_what(made) -> None:
    text = made.scaled(0.5).summary()
    for part in (
        "red apple, apple -> pear",
        "furry cat -> pear",
        "kept: dog, green tree",
        "method: uce",
        "analytic",
        "8 weights",
        "strength 0.5",
    ):
        assert part in text
    empty = Erasure(Header("x", {}, ConceptSpec.parse("cat"), Family("f", 1, 1, 1), "", ""), {})
    assert "suppressed: cat\n" in empty.summary() and "rank 0" in empty.summary()


def test_the_summary_claims_nothing_of_words_that_may_be_unknown() -> None:
    spec = ConceptSpec.parse("cat, katze\nwalrus", "dog")
    some = Erasure(Header("x", {}, spec, Family("f", 1, 1, 1), "", ""), {})
    said = (
        "suppressed: cat, katze (if the text encoder knows it) -> dog; walrus (if the text encoder knows it) -> dog\n"
    )
    assert said in some.summary({"katze", "walrus"})


def print_of(weights: list[torch.Tensor]) -> str:
    seen = Fingerprint()
    for i, w in enumerate(weights):
        seen.update(Site(f"input_blocks.{i}.1.x", Role.TEXT_KEY, w.shape[1], w.shape[0]), w)
    return seen.hexdigest()


def weights(seed: int, offset: float = 0.0) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [offset + 0.03 * torch.randn(rows, 256, generator=g) for rows in [64, 128, 256] * 8]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_fingerprint_survives_storage_precision(dtype: torch.dtype) -> None:
    for seed in range(25):
        model = weights(seed)
        assert same_base(print_of(model), print_of([w.to(dtype) for w in model]))


@pytest.mark.parametrize("offset", [0.0, 0.05])
def test_the_fingerprint_tells_models_apart(offset: float) -> None:
    prints = [print_of(weights(seed, offset)) for seed in range(25)]
    assert not any(same_base(a, b) for i, a in enumerate(prints) for b in prints[:i])
    changed = weights(0)
    changed[3::4] = [torch.randn_like(w) for w in changed[3::4]]
    assert not same_base(print_of(weights(0)), print_of(changed))


def test_the_fingerprint_is_the_methods_common_word_for_the_model(port) -> None:
    spec = ConceptSpec.parse("cat", "dog", "bird")
    bases = {erase(port, spec, method).header.base for method in ("uce", "rece", "speed")}
    assert len(bases) == 1 and all(len(b) == 16 for b in bases)
    assert not same_base(bases.pop(), erase(AnalyticPort(seed=1), spec).header.base)


@pytest.mark.parametrize("text", ["", "not hex", "猫"])
def test_a_foreign_fingerprint_matches_nothing(text: str) -> None:
    assert not same_base(text, "0123456789abcdef")


def test_odd_tensors_have_a_fingerprint() -> None:
    assert len(print_of([torch.zeros(4, 4), torch.ones(1, 3), torch.randn(70, 1)])) == 16
