"""Merging: each erasure keeps doing on its own words what it did, and the sum would not."""

from __future__ import annotations

import itertools

import pytest
import torch

from erasure_core import Aids, ConceptError, ConceptSpec, Delta, Erasure, WrongModelError, erase, merge
from erasure_core.analytic import AnalyticPort
from erasure_core.concept import Rows, edit_rows
from erasure_core.fusion import beyond_words

pytestmark = pytest.mark.core
SENTENCES = ("{}", "a {}", "a picture of {}")


@pytest.fixture
def port() -> AnalyticPort:
    return AnalyticPort(width=256, blocks=1)


def made(port: AnalyticPort, concept: str, to: str = "", keep: str = "bird", method: str = "uce") -> Erasure:
    return erase(port, ConceptSpec.parse(concept, to, keep), method, {"energy": 1.0})


def rows(port: AnalyticPort, erasure: Erasure) -> torch.Tensor:
    return edit_rows(port, erasure.header.spec, rule=Rows.SUMMARY, templates=SENTENCES).source


def difference(on: torch.Tensor, one: Erasure, other: Erasure) -> float:
    """Between what two erasures add to the outputs for these rows, relative to what the first adds."""
    names = one.deltas.keys()
    apart = sum((on @ (one.deltas[n].dense() - other.deltas[n].dense()).T).square().sum() for n in names)
    return float((apart / sum((on @ one.deltas[n].dense().T).square().sum() for n in names)).sqrt())


def added(one: Erasure, *others: Erasure) -> Erasure:
    return Erasure(
        one.header, {n: Delta(sum((o.deltas[n].dense() for o in others), d.dense())) for n, d in one.deltas.items()}
    )


def test_each_does_on_its_own_words_what_it_did(port) -> None:
    """To a third in this small model, whose prompts share most of their padding; adding them misses by over a half."""
    parts = [made(port, "red cat", "dog"), made(port, "big house", "tent"), made(port, "old car", "")]
    merged, summed = merge(port, parts), added(*parts)
    for part in parts:
        assert difference(rows(port, part), part, merged) < 0.35
        assert difference(rows(port, part), part, merged) < 0.7 * difference(rows(port, part), part, summed)
    assert {c.name for c in merged.header.spec.erase} == {"red cat", "big house", "old car"}
    assert merged.header.settings == {"merged": 3}


def test_where_words_are_related_merging_disturbs_less_than_adding(port) -> None:
    one, two = made(port, "red cat", "dog"), made(port, "blue cat", "tent")
    merged, summed = merge(port, [one, two]), added(one, two)
    for part in (one, two):
        assert difference(rows(port, part), part, merged) < 0.5 * difference(rows(port, part), part, summed)


def test_kept_words_and_the_empty_prompt_stay(port) -> None:
    parts = [made(port, "red cat", "dog"), made(port, "big house", "tent", "green tree")]
    merged = merge(port, parts)
    assert merged.header.spec.keep == ("bird", "green tree")

    def moved(erasure: Erasure, spec: ConceptSpec) -> float:
        keep = edit_rows(port, spec, rule=Rows.SUMMARY, templates=SENTENCES).held
        changes = [(erasure.deltas[s.name].dense(), port.weight(s)) for s in port.sites()]
        return max(float((keep @ d.T).norm() / (keep @ w.T).norm()) for d, w in changes)

    alone = max(moved(part, part.header.spec) for part in parts)
    assert moved(merged, merged.header.spec) < 1.1 * alone, "no worse than the worse of both on its own kept words"
    assert moved(merged, merged.header.spec) < 0.5 * moved(added(*parts), merged.header.spec)


def test_the_printed_solution(port) -> None:
    """D = sum_i D_i E_i E_i^T B^-1, B = sum_i E_i E_i^T + P P^T + ridge I, with columns, dense."""
    parts = [made(port, "red cat", "dog"), made(port, "big house", "tent")]
    merged = merge(port, parts)
    columns = [rows(port, p).T for p in parts]
    p = edit_rows(port, merged.header.spec, rule=Rows.SUMMARY, templates=SENTENCES).held.T
    ridge = 1e-3 * float(torch.cat(columns, 1).square().sum()) / sum(c.shape[1] for c in columns)
    b = sum(c @ c.T for c in columns) + p @ p.T + ridge * torch.eye(256, dtype=torch.float64)
    for name in parts[0].deltas:
        value = sum(part.deltas[name].dense() @ c @ c.T for part, c in zip(parts, columns, strict=True))
        expected = torch.linalg.solve(b, value, left=False)
        assert (merged.deltas[name].dense() - expected).norm() < 1e-8 * expected.norm()


def test_the_order_does_not_matter(port) -> None:
    parts = [made(port, "red cat", "dog"), made(port, "big house", "tent"), made(port, "old car", "")]
    first = merge(port, parts)
    for order in itertools.permutations(parts):
        other = merge(port, order)
        for name, delta in first.deltas.items():
            assert (delta.dense() - other.deltas[name].dense()).norm() < 1e-9 * delta.dense().norm()


def test_one_is_itself_and_none_is_refused(port) -> None:
    one = made(port, "cat")
    assert merge(port, [one]) is one
    with pytest.raises(ValueError, match=r"connect at least one"):
        merge(port, [])


def test_twice_the_same_does_it_once(port) -> None:
    one = made(port, "red cat", "dog")
    assert difference(rows(port, one), one, merge(port, [one, one])) < 0.15


def test_methods_that_edit_other_weights_merge(port) -> None:
    uce, speed = made(port, "red cat", "dog"), made(port, "big house", "tent", method="speed")
    merged = merge(port, [speed, uce])
    assert set(merged.deltas) == set(uce.deltas) > set(speed.deltas)
    assert merged.header.method == "speed + uce"
    dense = Erasure(speed.header, {n: Delta(d.dense()) for n, d in speed.deltas.items()})
    same = merge(port, [dense, uce])
    for name, delta in merged.deltas.items():
        assert torch.allclose(delta.dense(), same.deltas[name].dense(), atol=1e-10)


def test_a_strength_is_kept(port) -> None:
    one, two = made(port, "red cat", "dog"), made(port, "big house", "tent")
    merged = merge(port, [one.scaled(0.5), two])
    assert difference(rows(port, one), one.scaled(0.5), merged) < 0.3 < difference(rows(port, one), one, merged)
    assert merged.header.strength == 1.0


def test_what_does_not_read_text_is_added_up(tiny) -> None:
    """And the summary says so; text weights are fitted as ever."""
    g = torch.Generator().manual_seed(1)
    shapes = {s.name: (s.d_out, s.d_in) for s in tiny.linears()}
    inner = [n for n in shapes if ".attn2.to_q" in n or ".ff." in n]

    def with_others(concept: str, dense: bool) -> Erasure:
        text = erase(tiny, ConceptSpec.parse(concept, "dog", "bird"), "uce", {"energy": 1.0})
        more = {
            n: Delta(torch.randn(o, 2, generator=g), torch.randn(2, i, generator=g)) for n, (o, i) in shapes.items()
        }
        more = {n: Delta(d.dense()) if dense else d for n, d in more.items() if n in inner}
        return Erasure(text.header, {**text.deltas, **more})

    one, two = with_others("cat", False), with_others("house", True)
    plain = [Erasure(e.header, {n: d for n, d in e.deltas.items() if n not in inner}) for e in (one, two)]
    merged, text = merge(tiny, [one, two]), merge(tiny, plain)
    assert merged.header.settings == {"merged": 2, "summed": len(inner)} and text.header.settings == {"merged": 2}
    for name, delta in merged.deltas.items():
        parts = [e.deltas[name].dense() for e in (one, two)]
        expected = parts[0] + parts[1] if name in inner else text.deltas[name].dense()
        assert torch.allclose(delta.dense(), expected, atol=1e-6)
    again = merge(tiny, [one, one])
    assert all(again.deltas[n].rank == 4 for n in inner)
    assert f"{len(inner)} of them, which do not read text, added up" in merged.summary()
    assert "added up" not in text.summary()
    with pytest.raises(WrongModelError, match="first middle_block"):
        merge(
            tiny, [one, Erasure(two.header, {"middle_block.1.transformer_blocks.0.ff.net.2": Delta(torch.zeros(3, 4))})]
        )


def test_contradictions_and_strangers_are_refused(port) -> None:
    car, dog, house = made(port, "cat", "Dog"), made(port, "hound, dog", "bird", ""), made(port, "house", "tree")
    for order, sentence in (
        ([car, dog], "merge: erasure 1 replaces 'cat' with 'Dog', which erasure 2 erases"),
        ([dog, house, car], "merge: erasure 3 replaces 'cat' with 'Dog', which erasure 1 erases"),
    ):
        with pytest.raises(ConceptError, match=sentence):
            merge(port, order)
    with pytest.raises(WrongModelError, match=r"text width 48.*text width 256"):
        merge(port, [made(port, "cat"), made(AnalyticPort(), "house")])


@pytest.mark.parametrize(
    ("one", "other", "concepts"),
    [("cat", "CAT, kitty", ["cat", "kitty"]), ("cat, kitty", "kitty", ["cat"]), ("cat", "dog", ["cat", "dog"])],
)
def test_what_is_too_much_is_the_concepts_of_the_union(port, monkeypatch, one: str, other: str, concepts) -> None:
    parts = [made(port, one), made(port, other)]
    monkeypatch.setattr("erasure_core.concept.MAX_CONCEPTS", len(concepts))
    assert [c.name for c in merge(port, parts).header.spec.erase] == concepts
    monkeypatch.setattr("erasure_core.concept.MAX_CONCEPTS", len(concepts) - 1)
    if len(concepts) > 1:
        said = f"^merge: {len(concepts)} concepts, at most 1 fit in one erasure. Merge fewer of them$"
        with pytest.raises(ConceptError, match=said):
            merge(port, parts)


def test_what_is_erased_beside_the_words_is_lost(port) -> None:
    """Why Merge Erasures warns of methods that hold against more than words: stacking keeps what merging can't know of."""
    states = torch.randn(1, 77, 256, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    aided = erase(
        port, ConceptSpec.parse("red cat", "dog", "bird"), "uce", {"energy": 1.0}, aids=Aids(dark=(states[0],))
    )
    other = made(port, "big house", "tent")
    assert difference(states[0, 1:], aided, merge(port, [aided, other])) > 0.8
    assert difference(states[0, 1:], aided, added(aided, other)) < 0.5
    assert beyond_words(made(port, "cat", method="rece")) and not beyond_words(other)
