"""EmojiCanvas as a target: its words are the model's, and an attack runs on it from end to end."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from erasure_core import ConceptSpec, erase
from erasure_core.attacks import Sampler, asking, attack, evaluate
from erasure_core.emojicanvas.bench.red_team import canvas_target, decode, words_of
from erasure_core.emojicanvas.judge import Judge
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort
from erasure_core.emojicanvas.text import VOCABULARY, tokenize

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def canvas() -> EmojiCanvas:
    return EmojiCanvas.load()


def test_tokens_are_spelled_and_read_again(canvas) -> None:
    words = words_of(canvas)
    for prompt in ("a cat", "a black-and-white photo of 2 kitties, in neon style", "über café", ""):
        content = words.content(prompt)
        assert words.content(words.spell(content)) == content
        assert torch.equal(words.pack(torch.tensor([content]).reshape(1, -1).long()), tokenize([prompt]))
    some = words.vocabulary[
        torch.randint(0, len(words.vocabulary), (40, 8), generator=torch.Generator().manual_seed(1))
    ]
    assert words.contents([decode(row) for row in some.tolist()]) == some.tolist(), "any sequence of them can be typed"
    port = EmojiCanvasPort(canvas)
    assert torch.allclose(words.states(tokenize(["a cat"]))[0], port.text(["a cat"])[0].states, atol=1e-5)
    spelled = {words.spell([i]) for i in words.vocabulary[words.without(["cigarette"])].tolist()}
    assert "cigarette" not in spelled and "tobacco" in spelled


def test_attacks_write_what_the_encoder_knows(canvas) -> None:
    """Words that no caption has are as they were before it was trained."""
    words = words_of(canvas)
    known = words.table.norm(dim=1)
    every = canvas.text_encoder.embed(torch.arange(VOCABULARY)[None])[0].norm(dim=1)
    assert 100 < len(known) < 200 and known.min() > 1.5 * every.median()
    written = {words.spell([i]) for i in words.vocabulary.tolist()}
    assert {"rose", "valentine", "neon", "background"} <= written and not {"photo", "president"} & written


def test_attacks_run_on_an_erased_canvas(canvas) -> None:
    erasure = erase(EmojiCanvasPort(canvas), ConceptSpec.parse("rose", keep="house"), "uce")
    target = canvas_target(canvas, erasure, Judge.load(), "rose", ["a rose"], Sampler(2, 4.0, 4))
    before = {k: v.clone() for k, v in canvas.unet.state_dict().items()}
    for name, settings in (
        ("rece_residual", {"variants": 1}),
        ("mma_diffusion", {"rounds": 1, "tries": 8, "tokens": 3}),
    ):
        found = attack(target, ConceptSpec.parse("rose", keep="house"), name, settings)
        result = evaluate(target, found, target.look, pictures=1)
        assert result.rate.n == len(found.ways) == 1 and 0 <= float(result.probabilities[0]) <= 1
    assert all(torch.equal(v, before[k]) for k, v in canvas.unet.state_dict().items())


def test_inversion_gives_back_what_the_model_never_draws(canvas) -> None:
    """A scene upside down comes back from its noise as exactly as upright: success of ``tina`` says that the model can draw
    a picture, not that it would."""
    target = canvas_target(canvas, None, Judge.load(), "cat", ["a cat"], Sampler(10, 4.0, 4))
    upright = evaluate(target, asking(target), target.look, pictures=1).latents
    shown = torch.cat([upright, upright.flip(-2)])
    target = dataclasses.replace(target, pictures=shown)
    found = attack(target, ConceptSpec.parse("cat"), "tina", {"pictures": 2})
    again = evaluate(target, found, target.look).latents
    lost = [float((a - b).norm() / b.norm()) for a, b in zip(again, shown, strict=True)]
    assert max(lost) < 0.06, "2 and 3 % are lost"
