"""Judges: the EmojiCanvas one in the words of prompts, and those that an image encoder makes, on features made by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erasure_core.emojicanvas.concepts import OBJECTS, STYLES
from erasure_core.emojicanvas.judge import Judge as Network
from erasure_core.emojicanvas.judging import CanvasJudge, label_of
from erasure_core.metrics.judge_error import JudgeError
from erasure_core.metrics.judged import MOST_LABELS, JudgedBy
from erasure_core.metrics.judges import ExampleJudge, Judge, ZeroShotJudge, agreement, look_through, word_for
from erasure_core.metrics.rates import Rate

pytestmark = pytest.mark.core


def pictures(n: int = 2, side: int = 128) -> Tensor:
    return torch.rand(n, 3, side, side, generator=torch.Generator().manual_seed(3))


# EmojiCanvas


@pytest.fixture(scope="module")
def canvas() -> CanvasJudge:
    torch.manual_seed(0)
    return CanvasJudge(Network().eval())


def test_every_word_of_the_testbed_is_known(canvas: CanvasJudge) -> None:
    for thing in OBJECTS:
        for word in thing.words:
            assert label_of(word) == label_of(f"  A {word.upper()} ") == thing.name
    for style in STYLES:
        assert label_of(style.name) == style.name
        if style.phrase:
            assert label_of(style.phrase) == label_of(f"in {style.phrase}") == style.name
    assert label_of("kitty") == "cat" and label_of("neon style") == "neon"
    assert canvas.labels is not None and all(label_of(label) for label in canvas.labels)


@pytest.mark.parametrize("word", ["zebra", "", "other", "style"])
def test_other_words_are_not(canvas: CanvasJudge, word: str) -> None:
    with pytest.raises(ValueError, match=r"does not know .* It knows: cat, dog, .*brindlewash"):
        canvas.probability(pictures(), word)


def test_it_says_what_the_network_says(canvas: CanvasJudge) -> None:
    x = pictures()
    verdict = canvas._network.judge(2 * x - 1)
    assert torch.equal(canvas.probability(x, "kitty"), verdict.probability("cat"))
    assert torch.equal(canvas.probability(x, "in neon style"), verdict.probability("neon"))
    assert canvas.probability(x[:0], "cat").shape == (0,)
    large = F.interpolate(x, (256, 256), mode="nearest")
    assert torch.allclose(canvas.probability(large, "cat"), canvas.probability(x, "cat"), atol=0.05)
    with pytest.raises(ValueError, match=r"expected pictures \[N, 3, H, W\]"):
        canvas.probability(x[0], "cat")


def test_the_bundled_one_loads() -> None:
    judge = CanvasJudge.load()
    assert isinstance(judge, Judge) and judge.probability(pictures(), "cat").shape == (2,)


# Encoders


AXES = {"cat": 0, "dog": 1, "car": 2}


def encode(x: Tensor) -> Tensor:
    """Features of a picture: its mean colour."""
    return x.mean((2, 3))


def encode_texts(texts) -> Tensor:
    return torch.stack([torch.eye(3)[AXES[t.removeprefix("a picture of ").casefold()]] for t in texts])


def coloured(*rgb: float, n: int = 1, spread: float = 0.0, seed: int = 0) -> Tensor:
    noise = spread * torch.randn(n, 3, generator=torch.Generator().manual_seed(seed))
    return (torch.tensor(rgb) + noise)[:, :, None, None].expand(n, 3, 8, 8)


def test_zero_shot_is_a_softmax_over_cosines() -> None:
    judge = ZeroShotJudge(encode, encode_texts, ["dog", "car", " CAT"])
    x = torch.cat([coloured(0.4, 0.4, 0.1), coloured(0.1, 0.9, 0.1)])
    cosines = 100 * F.normalize(x.double().mean((2, 3)), dim=-1)
    expected = cosines[:, 0].exp() / cosines.exp().sum(1)
    assert torch.allclose(judge.probability(x, "cat").double(), expected, atol=1e-5)
    assert isinstance(judge, Judge) and judge.labels is None


def test_the_version_tells_judges_of_one_kind_apart() -> None:
    def other(x: Tensor) -> Tensor:
        return encode(x).flip(-1)

    def made(pictures=encode, texts=encode_texts, contrasts=("dog", "car")) -> str:
        return ZeroShotJudge(pictures, texts, contrasts).version

    towers = (made(), made(other), made(texts=lambda t: encode_texts(t).flip(-1)))
    assert len({*towers, made(contrasts=["dog"]), made(contrasts=["dog", "cat"])}) == 5
    assert made() == made(lambda x: 1.0001 * encode(x)) and made().startswith("1-") and len(made()) == 10
    examples, others = coloured(0.8, 0.2, 0.2, n=3, spread=0.05), coloured(0.4, 0.4, 0.4, n=3, spread=0.05, seed=1)
    sets = [(examples, others), (examples.flip(0), others), (examples, others + 0.01)]
    found = [ExampleJudge(e, w, *s).version for s in sets for e in (encode, other) for w in (["cat"], ["cat", "kitty"])]
    assert len(set(found)) == 12 and found[0] == ExampleJudge(encode, ["cat"], *sets[0]).version


class Named:
    """A judge that knows 200 labels, and how it errs on some."""

    name, version, threshold = "named", "1", 0.4
    labels = tuple(f"label {i} " + "x" * 99 for i in range(200))

    def error(self, word: str) -> JudgeError | None:
        return {"cat": JudgeError(Rate(90, 100), Rate(0, 100)), "dog": JudgeError(Rate(80, 100), Rate(4, 100))}.get(
            word
        )


def test_a_result_names_its_judge() -> None:
    by = JudgedBy.of(Named(), ["cat"])
    assert len(by.labels) == MOST_LABELS and by.labels[-1] == "and 73 more" and max(map(len, by.labels)) <= 40
    assert str(by).startswith("named 1, threshold 0.4, knows label 0 x") and str(by).endswith(", ...")
    assert by.error == JudgeError(Rate(90, 100), Rate(0, 100))
    assert JudgedBy.of(Named(), ["cat", "dog"]).error == JudgeError(Rate(85, 100), Rate(2, 100))
    assert JudgedBy.of(Named(), ["cat", "rose"]).error is None and JudgedBy.of(Named()).error is None
    zero = JudgedBy.of(ZeroShotJudge(encode, encode_texts, ["dog"]), ["cat"])
    assert zero.labels == () and zero.error is None and zero.counted(Rate(1, 4)) == Rate(1, 4)


def test_the_bundled_one_knows_how_it_errs() -> None:
    judge = CanvasJudge.load()
    cat, neon = judge.error("kitty"), judge.error("in neon style")
    assert cat == JudgeError(Rate(698, 720), Rate(1, 690)) and neon == JudgeError(Rate(714, 720), Rate(1, 576))
    by = JudgedBy.of(judge, ["cat"])
    assert by.counted(Rate(5, 10)) == cat.behind(Rate(5, 10)) and "cat" in by.labels


def test_its_clip_score_is_a_cosine_with_the_prompt() -> None:
    judge = ZeroShotJudge(encode, encode_texts, ["dog"])
    x = torch.cat([coloured(0.4, 0.4, 0.1), coloured(0.0, 0.9, 0.1)])
    expected = 100 * F.normalize(x.double().mean((2, 3)), dim=-1)[:, AXES["cat"]]
    assert torch.allclose(judge.clip_score(x, "a picture of cat").double(), expected, atol=1e-4)


def test_zero_shot_needs_something_to_tell_from() -> None:
    with pytest.raises(ValueError, match="contrasts: name at least one"):
        ZeroShotJudge(encode, encode_texts, [])
    with pytest.raises(ValueError, match="is the only one"):
        ZeroShotJudge(encode, encode_texts, ["cat"]).probability(pictures(), "Cat")
    with pytest.raises(ValueError, match="concept: write"):
        ZeroShotJudge(encode, encode_texts, ["cat"]).probability(pictures(), " ")


def test_towers_that_belong_together_agree() -> None:
    colours = {
        "red": (1.0, 0, 0),
        "green": (0, 0.6, 0),
        "blue": (0, 0, 1.0),
        "yellow": (1.0, 1.0, 0),
        "black": (0, 0, 0),
    }
    colours |= {"white": (1.0, 1.0, 1.0), "orange": (1.0, 0.5, 0), "purple": (0.5, 0, 0.5)}

    def texts(words) -> Tensor:
        return torch.tensor([colours[w.rpartition(" ")[2]] for w in words])

    generator = torch.Generator().manual_seed(0)
    turn = torch.randn(3, 8, generator=generator)
    assert agreement(encode, texts) == 1.0
    chance = [
        agreement(lambda x: encode(x) @ turn, lambda w: torch.randn(8, 8, generator=generator)) for _ in range(50)
    ]
    assert max(chance) < 0.5 and sum(chance) / 50 == pytest.approx(1 / 8, abs=0.05)


def test_examples_make_a_judge() -> None:
    examples, others = coloured(0.8, 0.2, 0.2, n=6, spread=0.05), coloured(0.4, 0.4, 0.4, n=6, spread=0.05, seed=1)
    judge = ExampleJudge(encode, ["cat", "kitty"], examples, others)
    assert isinstance(judge, Judge) and judge.labels == ("cat", "kitty")
    fresh = judge.probability(coloured(0.8, 0.2, 0.2, n=20, spread=0.05, seed=7), "Kitty")
    plain = judge.probability(coloured(0.4, 0.4, 0.4, n=20, spread=0.05, seed=8), "cat")
    assert (fresh > 0.5).all() and float(fresh.mean()) > 0.8 and float(plain.mean()) < 0.3
    origin = others.mean((0, 2, 3))
    wanted = F.normalize(examples.mean((2, 3)) - origin, dim=-1)
    x = coloured(0.5, 0.3, 0.6)
    score = (wanted @ F.normalize(x.mean((2, 3)) - origin, dim=-1)[0]).mean()
    # Its own examples, each against the rest, score 0.95 on average behind the sigmoid's inverse, the others 0.05.
    middle, slope = (judge._likeness.with_it + judge._likeness.no_it) / 2, 2 * math.log(19) / judge._likeness.gap
    assert float(judge.probability(x, "cat")) == pytest.approx(float(torch.sigmoid(slope * (score - middle))))
    with pytest.raises(ValueError, match=r"examples does not know 'dog'. It knows: cat, kitty"):
        judge.probability(x, "dog")


def test_examples_tell_how_the_judge_errs() -> None:
    """As a judge that is made anew without each picture says."""
    examples, others = coloured(0.7, 0.4, 0.4, n=7, spread=0.15), coloured(0.4, 0.4, 0.4, n=6, spread=0.15, seed=3)
    judge = ExampleJudge(encode, ["cat"], examples, others)

    def without(pictures: Tensor, i: int) -> Tensor:
        return pictures[[k for k in range(len(pictures)) if k != i]]

    hits = sum(
        float(ExampleJudge(encode, ["cat"], without(examples, i), others).probability(examples[i : i + 1], "cat"))
        >= 0.5
        for i in range(7)
    )
    alarms = sum(
        float(ExampleJudge(encode, ["cat"], examples, without(others, i)).probability(others[i : i + 1], "cat")) >= 0.5
        for i in range(6)
    )
    assert judge.error("Cat") == JudgeError(Rate(hits, 7), Rate(alarms, 6)) and 0 < hits + alarms < 13
    by = JudgedBy.of(judge, ["cat"])
    assert by.error == judge.error("cat") and by.counted(Rate(3, 8)) == judge.error("cat").behind(Rate(3, 8))
    assert by.counted_prompts(Rate(3, 8), 4) == judge.error("cat").behind_prompts(Rate(3, 8), 4)
    worse = JudgedBy("x", "1", 0.5, error=JudgeError(Rate(2, 7), Rate(4, 6)))
    assert worse.note.startswith("WARNING: this judge says nothing") and worse.counted(Rate(1, 4)) == Rate(1, 4)
    few = ExampleJudge(encode, ["cat"], examples[:2], others)
    assert few.error("cat") is None and JudgedBy.of(few, ["cat"]).error is None
    assert JudgedBy.of(few, ["cat"]).counted_prompts(Rate(3, 8), 4) == Rate(3, 8).interval, "of the count alone"
    with pytest.raises(ValueError, match="does not know 'dog'"):
        judge.error("dog")


def test_examples_that_show_nothing() -> None:
    some, more = coloured(0.5, 0.5, 0.5, n=8, spread=0.1), coloured(0.5, 0.5, 0.5, n=8, spread=0.1, seed=4)
    for few in ((some[:1], more), (some, more[:1])):
        with pytest.raises(ValueError, match="1 pictures, at least 2"):
            ExampleJudge(encode, ["cat"], *few)
    with pytest.raises(ValueError, match="concept: write"):
        ExampleJudge(encode, [" "], some, more)
    with pytest.raises(ValueError, match="no more alike"):
        ExampleJudge(encode, ["cat"], some, some)


def test_a_judge_behind_a_decoder() -> None:
    judge = ZeroShotJudge(encode, encode_texts, ["dog", "car"])
    look = look_through(judge, lambda z: z / 2, "cat")
    z = 2 * coloured(0.9, 0.1, 0.1)
    assert torch.equal(look(z), judge.probability(z / 2, "cat"))
    with pytest.raises(ValueError, match="does not know"):
        look_through(CanvasJudge(Network().eval()), lambda z: z, "zebra")


def test_the_word_that_a_judge_knows() -> None:
    """By the judge's own matching, whatever is asked first."""
    canvas = CanvasJudge(Network().eval())
    assert word_for(canvas, ["A Cat"]) == "A Cat" and word_for(canvas, ["moggy", "kitty"]) == "kitty"
    assert word_for(canvas, ["brindlewash style"]) == "brindlewash style"
    assert word_for(ZeroShotJudge(encode, encode_texts, ["dog"]), ["car", "cat"]) == "car", "any text will do"
    only = ZeroShotJudge(encode, encode_texts, ["dog"])
    assert word_for(only, ["dog", "cat"]) == "cat", "it has nothing to tell a dog from"
    with pytest.raises(ValueError, match=r"contrasts: 'dog' is the only one"):
        word_for(only, ["dog"])
    with pytest.raises(ValueError, match=r"emojicanvas-judge knows none of 'zebra', 'okapi'. It knows: cat"):
        word_for(canvas, ["zebra", "okapi"])


def test_an_error_names_a_few_labels_only() -> None:
    pictures = coloured(0.8, 0.2, 0.2, n=6, spread=0.05), coloured(0.4, 0.4, 0.4, n=6, spread=0.05, seed=1)
    judge = ExampleJudge(encode, [f"word{n}" for n in range(1000)], *pictures)
    with pytest.raises(ValueError, match=r"does not know 'dog'. It knows: word0, .*, word19 and 980 more$"):
        judge.probability(pictures[0], "dog")
