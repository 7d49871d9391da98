"""Mining on its own: what it draws, searches, scores and hands over; and that it brings an erased concept back."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptSpec, erase
from erasure_core.emojicanvas.judge import Judge
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort
from erasure_core.emojicanvas.taesd import SD15_SCALE
from erasure_core.emojicanvas.text import TextConfig, TextEncoder, tokenize
from erasure_core.methods import Aids
from erasure_core.mining import PseudoWords, Settings, mine
from erasure_core.operators.cond import Cond
from erasure_core.operators.search import TokenSlot
from erasure_core.operators.train_loop import generator_for

pytestmark = pytest.mark.core
SPEC = ConceptSpec.parse("bomb, grenade\nknife")
SMALL = Settings(
    count=3, steps=3, learning_rate=0.1, batch=2, pictures=4, looks=2, guidance=2.0, sample_steps=2, seed=7
)


def test_the_best_find_comes_first(tiny) -> None:
    verdicts = iter([0.2, 0.9, 0.4])
    found = mine(
        tiny, SPEC, SMALL, pictures=torch.randn(3, 4, 4, 4), look=lambda z: torch.full((len(z),), next(verdicts))
    )
    dark = found.dark
    assert dark.scores == pytest.approx((0.9, 0.4, 0.2)) and dark.states.shape == (3, 6, 16)
    assert found.pictures.shape == (3, 2, 4, 4, 4) and not dark.words
    assert dark.header.spec == SPEC and dark.header.family == tiny.family and dark.header.method == "mine"
    assert dark.header.settings["seed"] == 7 and dark.header.settings["scored by"] == "judge"
    assert "its own error is not in them" in dark.summary()
    assert len({tuple(x.flatten().tolist()) for x in dark.states}) == 3, "starts are fresh"
    with tiny.trainable() as model:
        null = tiny.conditions([""])[0]
        assert torch.equal(dark.states[:, 0], null.context[:, 0].expand(3, -1)), "BOS stays"
        again = model.denoise_until(Cond(dark.states[:1]).expand(2), null, guidance=2.0, progress=1.0, steps=2,
            generator=generator_for(7, "look", 0))  # fmt: skip
    assert torch.equal(again, found.pictures[0]), "its pictures are drawn with it"
    assert tiny.untouched()


def test_the_same_seed_gives_the_same_finds(tiny) -> None:
    pictures = torch.randn(3, 4, 4, 4)
    torch.manual_seed(1)
    one = mine(tiny, SPEC, SMALL, pictures=pictures)
    torch.manual_seed(2)
    two = mine(tiny, SPEC, SMALL, pictures=pictures)
    other = mine(tiny, SPEC, Settings(**{**SMALL.__dict__, "seed": 8}), pictures=pictures)
    assert torch.equal(one.dark.states, two.dark.states) and one.dark.scores == two.dark.scores
    assert not torch.equal(one.dark.states, other.dark.states)


def test_without_a_judge_the_score_is_what_a_find_explains(tiny) -> None:
    """What the network itself draws for a conditioning is explained better after a longer search."""
    found = mine(tiny, SPEC, Settings(**{**SMALL.__dict__, "steps": 40, "count": 1}), pictures=torch.randn(2, 4, 4, 4))
    assert found.dark.header.settings["scored by"] == "explained share" and found.dark.scores[0] > 0
    assert "judge" not in found.dark.summary()


def test_pictures_come_from_the_base_and_pass_the_judge(tiny) -> None:
    asked: list[Tensor] = []

    def every_other(z: Tensor) -> Tensor:
        asked.append(z)
        return torch.arange(len(z)) % 2 * 1.0

    ticks: list[tuple[int, int]] = []
    found = mine(tiny, SPEC, SMALL, lambda *x: ticks.append(x), base=tiny, look=every_other)
    assert ticks == sorted(ticks)
    assert found.examples.shape == (4, 4, 4, 4)
    assert torch.equal(found.examples, torch.cat([asked[0][1::2], asked[1][1::2]]))
    assert not torch.equal(asked[0], asked[1]), "drawn again, not twice the same"
    assert len(tiny.replicas) == 2 and tiny.untouched()


def test_pictures_are_drawn_before_the_second_network_is_opened(tiny, read_late) -> None:
    """And all texts read before the first."""
    base, opened = type(tiny)(), []
    late = read_late(tiny, base)
    mine(tiny, SPEC, SMALL, base=base, look=lambda z: opened.append(len(tiny.replicas)) or torch.ones(len(z)))
    assert opened == [0, 1, 1, 1] and not late


def test_searches_aim_at_what_the_base_predicts(tiny) -> None:
    """Of the model itself: the words' own states are a solution, so hardly anything is left of the loss."""
    losses: dict[bool, list[float]] = {True: [], False: []}
    settings = Settings(**{**SMALL.__dict__, "steps": 60, "count": 1, "batch": 4})
    for aimed, kept in losses.items():
        found = mine(tiny, SPEC, settings, base=tiny if aimed else None, pictures=torch.randn(3, 4, 4, 4),
            searching=lambda model, cond, done, loss, kept=kept: kept.append(loss))  # fmt: skip
        assert found.dark.header.settings["aim"] == ("the base model's predictions" if aimed else "noise")
    assert losses[True][-1] < 0.5 * losses[True][0] < 0.1 * losses[False][0]
    assert tiny.untouched()


@pytest.mark.parametrize(
    ("base", "advice"), [(False, "Connect .* as base_model, or images"), (True, "Give images of it")]
)
def test_a_model_that_draws_none_is_told_so(tiny, base: bool, advice: str) -> None:
    with pytest.raises(ValueError, match=f"of 4 pictures that it drew, .* in 0. {advice}"):
        mine(tiny, SPEC, SMALL, base=tiny if base else None, look=lambda z: torch.zeros(len(z)))


def test_a_search_that_diverges_says_so(tiny) -> None:
    with pytest.raises(ValueError, match=r"learning_rate: .* Lower it"):
        mine(tiny, SPEC, SMALL, pictures=torch.full((2, 4, 4, 4), torch.nan))


def test_pictures_of_another_size_are_refused(tiny) -> None:
    with pytest.raises(ValueError, match=r"Scale the images"):
        mine(tiny, SPEC, SMALL, pictures=torch.randn(2, 4, 8, 8))


def test_words_are_split_between_the_towers(tiny) -> None:
    torch.manual_seed(4)
    encoder = TextEncoder(TextConfig(16, 1, 2)).requires_grad_(False)
    slot = TokenSlot(encoder, tokenize(["a picture of thing thing"]), [4, 5])
    found = mine(
        tiny, SPEC, SMALL, pictures=torch.randn(2, 4, 4, 4), words=PseudoWords(slot, {"clip_l": 10, "clip_g": 6})
    )
    dark = found.dark
    assert {k: tuple(v.shape) for k, v in dark.words.items()} == {"clip_l": (3, 2, 10), "clip_g": (3, 2, 6)}
    vectors = torch.cat([dark.words["clip_l"], dark.words["clip_g"]], dim=-1)
    assert torch.allclose(slot.states(vectors[1])[0], dark.states[1], atol=1e-6)
    assert dark.header.settings["form"] == "words"


def test_it_reports_and_can_be_cancelled(tiny) -> None:
    ticks: list[tuple[int, int]] = []
    seen: list[int] = []
    mine(tiny, SPEC, SMALL, lambda *x: ticks.append(x), searching=lambda model, cond, done, loss: seen.append(done))
    assert {total for _, total in ticks} == {12} and ticks == sorted(ticks) and ticks[-1] == (12, 12)
    assert seen == [1, 3] * 3

    class Stop(Exception): ...

    def cancel(done: int, _: int) -> None:
        if done >= 5:
            raise Stop

    with pytest.raises(Stop):
        mine(tiny, SPEC, SMALL, cancel)
    assert tiny.untouched()


def test_an_erasure_is_in_the_weights_of_the_port() -> None:
    model = EmojiCanvas.load()
    before = {k: v.clone() for k, v in model.unet.state_dict().items()}
    erasure = erase(EmojiCanvasPort(model), ConceptSpec.parse("tulip"), "uce")
    port = EmojiCanvasPort(model, erasure)
    z, t, context = torch.randn(1, 4, 16, 16), torch.tensor([500]), model.encode(["a tulip"])
    with port.trainable() as replica:
        for site in port.sites():
            expected = before[f"{site.name}.weight"] + erasure.deltas[site.name].dense()
            assert torch.allclose(port.weight(site), expected, atol=1e-6)
            assert torch.allclose(replica.net.get_submodule(site.name).weight, expected, atol=1e-6)
        assert torch.equal(replica.predict(z, t, Cond(context)), port.predict(z, t, context))
    assert not torch.equal(port.predict(z, t, context), EmojiCanvasPort(model).predict(z, t, context))
    assert all(torch.equal(v, before[k]) for k, v in model.unet.state_dict().items())


def test_it_brings_an_erased_concept_back() -> None:
    """One short search on EmojiCanvas without the tulip: from hardly any picture to most of them."""
    model, judge = EmojiCanvas.load(), Judge.load()
    spec = ConceptSpec.parse("tulip", keep="rose, cactus, house, frog")
    erased = EmojiCanvasPort(model, erase(EmojiCanvasPort(model), spec, "uce"))

    def look(latents: Tensor) -> Tensor:
        return judge.judge(model.vae.decode(latents / SD15_SCALE).clamp(-1, 1)).probability("tulip")

    words = erased.conditions(["a tulip", ""])
    with erased.trainable() as replica:
        z = replica.denoise_until(words[0].expand(4), words[1], guidance=4.0, progress=1.0, steps=10,
            generator=torch.Generator().manual_seed(1))  # fmt: skip
    assert float(look(z).mean()) < 0.3, "asking for it doesn't"
    settings = Settings(count=1, steps=60, pictures=8, looks=4, sample_steps=10, seed=5)
    found = mine(erased, spec, settings, base=EmojiCanvasPort(model), look=look)
    assert found.dark.scores[0] > 0.7
    assert Aids(dark=tuple(found.dark.states)).dark[0].shape == (77, 128)
