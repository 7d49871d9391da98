"""What an erasure does to pictures: the judge looks at EmojiCanvas before and after."""

from __future__ import annotations

import pytest

from erasure_core import ConceptSpec, erase
from erasure_core.emojicanvas.judge import Judge
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort

pytestmark = pytest.mark.core
SEEDS = [40, 41, 42, 43]
KEPT = ["strawberry", "house", "frog", "penguin"]


@pytest.fixture(scope="module")
def canvas() -> EmojiCanvas:
    return EmojiCanvas.load()


def shown(model: EmojiCanvas, words: list[str], erasure=None) -> int:
    """In how many pictures, one a word and seed, the judge sees what the word asks for."""
    prompts = [f"a {w}" for w in words]
    pictures = model.generate(prompts, SEEDS[: len(words)], steps=12, delta=erasure)
    verdict = Judge.load().judge(pictures)
    return sum(int(verdict.shows(w)[i]) for i, w in enumerate(words))


@pytest.mark.parametrize("method", ["uce", "rece"])
def test_the_concept_goes_and_the_others_stay(canvas, method: str) -> None:
    spec = ConceptSpec.parse("rose, briar", keep=", ".join(KEPT))
    erasure = erase(EmojiCanvasPort(canvas), spec, method)
    assert shown(canvas, ["rose"] * 4) >= 3
    assert shown(canvas, ["rose"] * 4, erasure) <= 1
    assert shown(canvas, KEPT, erasure) >= 3
