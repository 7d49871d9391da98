"""What people type, every sentence they may get back, and which text rows stand for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from erasure_core import Concept, ConceptError, ConceptSpec, Rows, TextStates, TokenKind
from erasure_core.analytic import AnalyticPort
from erasure_core.concept import TEMPLATES, clean, edit_rows, everyday, expand, paired_rows, rows_of
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort

pytestmark = pytest.mark.core


def test_lines_are_concepts_and_commas_are_aliases() -> None:
    spec = ConceptSpec.parse(" cat, kitty ,\n\n  Van Gogh  \r\n", "dog", "bird, fish\nbird\n,\n green tree ")
    assert spec.erase == (Concept(("cat", "kitty"), "dog"), Concept(("Van Gogh",), "dog"))
    assert spec.keep == ("bird", "fish", "green tree")
    assert spec.erase[0].name == "cat"


@pytest.mark.parametrize(
    ("replace_with", "expected"),
    [
        ("", ["", ""]),
        ("dog", ["dog", "dog"]),
        ("dog\n", ["dog", "dog"]),
        ("\n", ["", ""]),
        ("dog\nbird", ["dog", "bird"]),
        ("dog\n bird \n\n", ["dog", "bird"]),
        ("\nbird", ["", "bird"]),
    ],
)
def test_one_replacement_for_all_or_one_each(replace_with: str, expected: list[str]) -> None:
    assert [c.to for c in ConceptSpec.parse("cat\nhorse", replace_with).erase] == expected


@pytest.mark.parametrize("lines", [["x", "", "z"], ["x", "", ""], ["", "y", ""], ["", "", "z"], ["x", "y", ""]])
def test_an_empty_line_among_three_replacements_means_nothing(lines: list[str]) -> None:
    assert [c.to for c in ConceptSpec.parse("a\nb\nc", "\n".join(lines)).erase] == lines
    assert [c.to for c in ConceptSpec.parse("a\nb\nc", "\r\n".join(lines)).erase] == lines


@pytest.mark.parametrize(
    ("concept", "replace_with", "keep", "sentence"),
    [
        ("", "", "", "concept: nothing to erase. Write at least one word"),
        (" \n , ,\n", "dog", "", "concept: nothing to erase"),
        ("cat\nCAT", "", "", "concept: 'CAT' is listed twice. Remove one"),
        ("cat, kitty,  Kitty", "", "", "concept: 'Kitty' is listed twice"),
        ("red  apple\nred apple", "", "", "concept: 'red apple' is listed twice"),
        ("caf\u00e9\ncafe\u0301", "", "", "is listed twice"),
        ("cat", "Cat", "", "replace_with: 'cat' would be replaced by itself. Name something else, or leave it empty"),
        ("cat, kitty", "kitty", "", "replace_with: 'cat' would be replaced by itself"),
        (
            "cat\ndog",
            "bird\ncat",
            "",
            "replace_with: 'cat' is itself being erased (as 'cat'). Name something that stays",
        ),
        ("cat\ndog", "a\nb\nc", "", "replace_with: 3 lines for 2 concepts. Write one line for all, or one line each"),
        ("cat", "dog", "bird, CAT", "keep: 'CAT' is also in the concepts to erase. Remove it from one"),
        ("x" * 2001, "", "", "concept: 'xxxx"),
        ("cat", "y" * 2001, "", "has 2001 characters, at most 2000 fit"),
        ("cat", "", "z" * 2001, "keep: 'zzzz"),
        ("c\x00at", "", "", "concept: 'c\\x00at' contains control characters. Type it again"),
        ("cat", "d\x1bog", "", "replace_with: 'd\\x1bog' contains control characters"),
        ("cat", "", "b\x07ird", "keep: 'b\\x07ird' contains control characters"),
        ("c\x7fat", "", "", "contains control characters"),
        ("c\ud800at", "", "", "contains control characters"),
        ("\u00ad", "", "", "concept: one of the words to erase is empty"),
        ("\n".join(f"word{i}" for i in range(1001)), "", "", "concept: 1001 concepts, at most 1000 fit"),
    ],
)
def test_every_refusal_names_the_box_and_what_to_do(concept: str, replace_with: str, keep: str, sentence: str) -> None:
    with pytest.raises(ConceptError) as caught:
        ConceptSpec.parse(concept, replace_with, keep)
    assert sentence in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("words", [(), ("",), ("cat", "  ")])
def test_scripts_cannot_erase_nothing(words: tuple[str, ...]) -> None:
    with pytest.raises(ConceptError, match="empty"):
        ConceptSpec((Concept(words, "dog"),))


@pytest.mark.parametrize(
    "word",
    [
        "猫",
        "кошка",
        "قطة",
        "می\u200cخواهم",
        "🚬",
        "👨\u200d👩\u200d👧",
        "🏴\U000e0067\U000e0062\U000e007f",
        "naïve café",
    ],
)
def test_any_script_is_a_word(word: str) -> None:
    spec = ConceptSpec.parse(word, keep="дерево")
    assert spec.erase[0].name == word
    assert clean(word) == word


def test_words_with_braces_stay_as_they_are() -> None:
    assert expand(["{0}", "a}b"], TEMPLATES["few"]) == [
        "{0}",
        "a {0}",
        "a picture of {0}",
        "a}b",
        "a a}b",
        "a picture of a}b",
    ]


@given(st.text(max_size=60), st.text(max_size=20), st.text(max_size=40))
def test_parse_gives_a_consistent_spec_or_a_sentence(concept: str, replace_with: str, keep: str) -> None:
    try:
        spec = ConceptSpec.parse(concept, replace_with, keep)
    except ConceptError as error:
        assert str(error).startswith(("concept: ", "replace_with: ", "keep: "))
        return
    words = [w for c in spec.erase for w in c.words]
    assert words and all(w == w.strip() and w for w in words)
    assert not {w.casefold() for w in words} & {w.casefold() for w in (*spec.keep, *(c.to for c in spec.erase))}


NAMES = st.sampled_from(["cat", "dog", "bird", "fish", "tree", "house"])


@given(
    st.lists(NAMES, min_size=1, max_size=4, unique=True),
    st.lists(NAMES, min_size=1, max_size=4, unique=True),
    st.lists(NAMES, max_size=3),
)
def test_union_erases_both_and_keeps_what_neither_erases(one: list[str], two: list[str], keep: list[str]) -> None:
    a = ConceptSpec(tuple(Concept((w,)) for w in one), tuple(k for k in dict.fromkeys(keep) if k not in one))
    b = ConceptSpec((Concept(tuple(two)),))
    both = a.union(b)
    assert {w for c in both.erase for w in c.words} == {*one, *two}
    assert set(both.keep) == set(keep) - {*one, *two}
    assert a.union(a) == a


@pytest.mark.parametrize(
    ("concept", "gone", "held"),
    [
        ("kitty", {"cat"}, {"dog", "tiger", "house"}),
        ("automobile\nale", {"car", "beer"}, {"rocket", "bread"}),
        ("pencil sketch style", {"sketch", "pencil"}, {"pixel", "cat"}),
        ("cigarette", set(), {"knife", "key"}),
        ("CAT\nHouse", {"cat", "house"}, {"dog", "church"}),
    ],
)
def test_everyday_words_leave_out_what_means_the_concept(concept: str, gone: set[str], held: set[str]) -> None:
    """Of the demo model's text encoder, which learned what these words mean from captions."""
    words = set(everyday(EmojiCanvasPort(EmojiCanvas.load()), ConceptSpec.parse(concept)))
    assert not gone & words and held <= words and len(words) > 200


def test_everyday_words_are_held_as_they_stand() -> None:
    port, spec = AnalyticPort(width=8, blocks=1), ConceptSpec.parse("cat", "", "dog, cat food", everyday=True)
    assert spec.kept == "dog, cat food, everyday words" and not ConceptSpec.parse("cat").kept
    words = everyday(port, spec)
    assert "cat" not in words and len(words) > 100
    rows = edit_rows(port, spec, rule=Rows.SUMMARY, templates=TEMPLATES["few"]).keep
    named = edit_rows(port, replace(spec, everyday=False), rule=Rows.SUMMARY, templates=TEMPLATES["few"]).keep
    assert torch.equal(rows[: len(named)], named)
    new = [word for word in words if word != "dog"]
    assert len(new) == len(words) - 1, "what is named is not held twice"
    assert torch.equal(rows[len(named) :], torch.cat([rows_of(text, Rows.SUMMARY) for text in port.text(new)]))
    assert spec.union(ConceptSpec.parse("dog")).everyday and ConceptSpec.parse("dog").union(spec).everyday


def states(kinds: str) -> TextStates:
    """Rows that hold their own number; kinds as letters of B(os) C(ontent) E(os) P(ad)."""
    numbers = torch.arange(len(kinds), dtype=torch.float32)[:, None].repeat(1, 3)
    return TextStates("x", numbers, torch.tensor(["BCEP".index(k) for k in kinds], dtype=torch.int8))


@pytest.mark.parametrize(
    ("kinds", "rule", "expected"),
    [
        ("BCCCEPPP", Rows.LAST, [3]),
        ("BCCCEPPP", Rows.LAST_TO_END, [3, 4, 5, 6, 7]),
        ("BCCCEPPP", Rows.SUMMARY, [3, 4, 5, 6, 7]),
        ("BCEPPPPPPP", Rows.SUMMARY, [1, 2, 3, 5, 7, 9]),
        ("BCCCEPPP", Rows.ALL, [1, 2, 3, 4, 5, 6, 7]),
        ("BEPPPPPP", Rows.LAST, [1]),  # the empty prompt: never row 0
        ("BEPPPPPP", Rows.LAST_TO_END, [1, 2, 3, 4, 5, 6, 7]),
        ("BEPPPPPP", Rows.SUMMARY, [1, 1, 2, 4, 5, 7]),
        ("BEPPPPPP", Rows.ALL, [1, 2, 3, 4, 5, 6, 7]),
        ("BCCCCCCE", Rows.SUMMARY, [6, 7]),  # no padding
        ("BCCCCCCC", Rows.SUMMARY, [7]),  # cut off without end-of-text
        ("CCEP", Rows.LAST, [1]),  # no BOS (T5)
        ("CCEP", Rows.ALL, [0, 1, 2, 3]),
        ("EPPP", Rows.LAST, [0]),
        ("BCCEBCCEBEPP", Rows.LAST, [6]),  # three chunks, the last one without content
        ("BCCEBCCEBEPP", Rows.ALL, [5, 6, 7]),
        ("BCCEBCEP", Rows.LAST_TO_END, [5, 6, 7]),
        ("BCCEBCEP", Rows.SUMMARY, [5, 6, 7]),
        ("BEPPBEPP", Rows.LAST, [1]),
    ],
)
def test_which_rows_stand_for_a_prompt(kinds: str, rule: Rows, expected: list[float]) -> None:
    got = rows_of(states(kinds), rule)
    assert got.dtype == torch.float64
    assert got[:, 0].tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 4)), min_size=1, max_size=4), st.sampled_from(list(Rows)))
def test_bos_never_stands_for_a_prompt(chunks: list[tuple[int, int]], rule: Rows) -> None:
    kinds = "".join("B" + "C" * content + "E" + "P" * pad for content, pad in chunks)
    got = rows_of(states(kinds), rule)[:, 0].tolist()
    assert got
    assert not {float(i) for i, k in enumerate(kinds) if k == "B"} & set(got)
    last = rows_of(states(kinds), Rows.LAST)[:, 0].tolist()
    assert len(last) == 1 and kinds[int(last[0])] in "CE"


def test_pairs_are_cut_to_the_shorter() -> None:
    c, to = paired_rows(*(rows_of(states(kinds), Rows.LAST_TO_END) for kinds in ("BCCCEP", "BEPPPP")))
    assert c[:, 0].tolist() == [3, 4, 5]
    assert to[:, 0].tolist() == [1, 2, 3]


@pytest.mark.parametrize("rule", list(Rows))
def test_a_request_in_numbers(rule: Rows) -> None:
    port = AnalyticPort(width=8)
    spec = ConceptSpec.parse("red apple, apple\ncat", "pear\n\n", "dog")
    rows = edit_rows(port, spec, rule=rule, templates=("{}", "a {}"))
    assert rows.source.shape == rows.target.shape
    empty = port.text([""])[0]
    assert torch.equal(rows.empty, empty.states.double()), "BOS and all"
    assert torch.equal(rows.held, torch.cat([rows.empty, rows.keep]))
    assert len(rows.keep) == sum(len(rows_of(text, rule)) for text in port.text(["dog", "a dog"]))
    for row in empty.states[:1]:
        assert not (rows.source == row).all(1).any()
    pear = rows_of(port.text(["a pear"])[0], rule)
    assert any((rows.target == row).all(1).any() for row in pear)
    assert torch.isfinite(rows.source).all()


def test_an_embedding_becomes_what_replaces_its_own_concept() -> None:
    port = AnalyticPort(width=8)
    spec = ConceptSpec.parse("apple\ncat", "pear\ndog")
    for owner, to in enumerate(("a pear", "a dog")):
        wanted = port.text([to])[0].states
        found = torch.randn(len(wanted), 8, generator=torch.Generator().manual_seed(1))
        rows = edit_rows(port, spec, rule=Rows.LAST, templates=("a {}",), dark=[(found, owner)])
        at = [(rows.source == row).all(1).nonzero().item() for row in found[1:].double()]
        assert torch.equal(rows.target[at], wanted[1 : len(found)].double())


def test_the_model_is_asked_once_for_everything() -> None:
    class Counting(AnalyticPort):
        calls: list[list[str]] = []

        def text(self, prompts):
            self.calls.append(list(prompts))
            return super().text(prompts)

    port = Counting(width=8)
    edit_rows(port, ConceptSpec.parse("cat, kitty", "dog", "dog"), rule=Rows.LAST, templates=("{}", "a {}"))
    assert len(port.calls) == 1
    assert len(port.calls[0]) == len(set(port.calls[0])) == 7  # cat, kitty, dog, each twice, and the empty prompt


def test_kinds_must_fit_the_states() -> None:
    with pytest.raises(ValueError, match=r"expected \[L, D\] and \[L\]"):
        TextStates("x", torch.zeros(3, 2), torch.zeros(4))
    assert TokenKind.BOS == 0


@pytest.mark.parametrize("same", ["a cat", "The Cat", "(cat:1.2)", "((cat))", "[ cat ]", "(a cat)"])
def test_what_stays_is_not_what_goes_in_other_clothes(same: str) -> None:
    with pytest.raises(ConceptError, match=r"^keep: .* says the same as 'cat', which is to be erased"):
        ConceptSpec.parse("cat", keep=f"dog, {same}")
    with pytest.raises(ConceptError, match=r"^replace_with: .* says the same as 'cat'"):
        ConceptSpec.parse("dog\ncat", replace_with=f"car\n{same}")


@pytest.mark.parametrize("other", ["cats", "the", "a", "cat house", "a black cat", "(cat) house", "cat (animal)"])
def test_what_only_looks_alike_may_stay(other: str) -> None:
    assert ConceptSpec.parse("cat", keep=other).keep == (other,)


def test_a_semicolon_ends_a_line() -> None:
    spec = ConceptSpec.parse("beer, ale; rose", "water; tulip", "wine; glass")
    assert [(c.words, c.to) for c in spec.erase] == [(("beer", "ale"), "water"), (("rose",), "tulip")]
    assert spec.keep == ("wine", "glass")
