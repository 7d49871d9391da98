"""What attacks make of their searches: which find is handed over, which way the objective goes, what is aimed at."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptSpec
from erasure_core.attacks import AttackTarget, Sampler, concept_inversion, free_embedding, p4d, relearning, ring_a_bell
from erasure_core.attacks import unlearn_diff_atk as uda
from erasure_core.attacks.target import Look
from erasure_core.attacks.words import Frame
from erasure_core.concept import everyday
from erasure_core.operators.search import denoising_loss
from erasure_core.operators.trainable import Cond, TrainableModel
from erasure_core.vocabulary import VOCABULARY

pytestmark = pytest.mark.core
SPEC = ConceptSpec.parse("cat, kitty", "", "dog, tree")
RANKINGS = [(0.4, 0.1, 0.2), (0.1, 0.4, 0.2), (0.1, 0.2, 0.4)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quiet(done: int, total: int) -> None:
    pass


def target_of(typing, **changes) -> AttackTarget:
    erased, base = typing.erased(), typing()
    values = {"prompts": ("a cat",), "words": erased.words_of(), "sampler": Sampler(2, 1.0, 4),
              "pictures": normal(2, 4, 4, 4)}  # fmt: skip
    return AttackTarget(erased, base, **{**values, **changes})


def ranked(*scores: float) -> Look:
    """A judge that says one score after the other, whatever it is shown."""
    answers = iter(scores)
    return lambda latents: torch.full((len(latents),), next(answers))


def states_of(target: AttackTarget, way) -> Tensor:
    if way.states is not None:
        return way.states
    assert target.words is not None
    return target.words.states(target.words.tokenize([way.prompt]))[0]


# Which find is handed over


@pytest.mark.parametrize("scores", RANKINGS)
@pytest.mark.parametrize(("chosen", "settings"), [
    (p4d, p4d.Settings(tokens=8, steps=3, look_every=1, learning_rate=0.5)),
    (uda, uda.Settings(tokens=3, times=3, steps=2, learning_rate=0.5)),
    (free_embedding, free_embedding.Settings(steps=3)),
], ids=["p4d", "unlearn_diff_atk", "free_embedding"])  # fmt: skip
def test_what_the_judge_likes_best_is_kept(typing, chosen, settings, scores: tuple[float, ...]) -> None:
    seen: list[Tensor] = []
    target = target_of(
        typing, look=ranked(*scores), watch=lambda cond, _: seen.append(cond.context[0].detach().clone())
    )
    (way,) = chosen.run(target, SPEC, settings, quiet).ways
    same = [torch.allclose(states_of(target, way), states) for states in seen]
    assert same == [score == max(scores) for score in scores]


@pytest.mark.parametrize("gaps", [(1.0, 3.0, 2.0), (3.0, 1.0, 2.0), (3.0, 2.0, 1.0)])
def test_without_a_judge_p4d_keeps_what_fits_best(typing, monkeypatch, gaps: tuple[float, ...]) -> None:
    plain, answers, seen = p4d.gap_to_base, iter(gaps), []

    def gap(erased, base, z, *args) -> Tensor:
        return plain(erased, base, z, *args) if len(z) == 1 else torch.tensor(next(answers))  # a step, or a look

    monkeypatch.setattr(p4d, "gap_to_base", gap)
    target = target_of(typing, watch=lambda cond, _: seen.append(cond.context[0].detach().clone()))
    settings = p4d.Settings(tokens=8, steps=3, look_every=1, learning_rate=0.5)
    (way,) = p4d.run(target, SPEC, settings, quiet).ways
    same = [torch.allclose(states_of(target, way), states) for states in seen]
    assert same == [gap == min(gaps) for gap in gaps]


# Which way the objective goes


@pytest.mark.parametrize(("chosen", "settings"), [
    (free_embedding, free_embedding.Settings(steps=40, learning_rate=0.05)),
    (concept_inversion, concept_inversion.Settings(steps=40, learning_rate=0.2)),
], ids=["free_embedding", "concept_inversion"])  # fmt: skip
def test_the_find_denoises_the_pictures_better_than_the_prompt(typing, chosen, settings) -> None:
    """Both searches start from the prompt's own states."""
    target = target_of(typing, prompts=("cat",), pictures=normal(1, 4, 4, 4))
    found = chosen.run(target, SPEC, settings, quiet)

    def fit(states: Tensor) -> float:
        with target.erased.trainable() as model, torch.no_grad():
            generator = torch.Generator().manual_seed(9)
            return float(denoising_loss(model, target.pictures, Cond(states[None]), generator, batch=64))

    assert fit(found.ways[0].states) < 0.998 * fit(target.erased.conditions(["cat"])[0].context[0])
    assert min(found.losses) > 0


# What is searched for, and where


def test_unlearn_diff_atk_visits_the_middle_of_each_part_of_the_schedule(typing, monkeypatch) -> None:
    visited, plain = [], TrainableModel.predict

    def predict(self, z: Tensor, t: Tensor, *args, **kwargs) -> Tensor:
        visited.append(t.tolist())
        return plain(self, z, t, *args, **kwargs)

    monkeypatch.setattr(TrainableModel, "predict", predict)
    uda.run(target_of(typing), SPEC, uda.Settings(tokens=1, times=5, steps=3), quiet)
    assert len(visited) == 15 and all(visited[i] == visited[i - i % 3] for i in range(15)), "a time's steps in a row"
    assert sorted(t for (t,) in visited[::3]) == pytest.approx([100, 300, 500, 700, 900], abs=1)
    assert sorted(visited[::3]) != visited[::3] != sorted(visited[::3], reverse=True), "in the seed's order"


@pytest.mark.parametrize(("replaced", "other"), [("", "thing"), ("tree", "tree")])
def test_ring_a_bell_aims_from_the_prompt_towards_the_concept(typing, monkeypatch, replaced: str, other: str) -> None:
    """e = E(prompt) + eta d, with d the mean of E(sentence with the concept) - E(sentence without it)."""
    aims: list[Tensor] = []

    def evolve(words, frame: Frame, aim: Tensor, *_) -> tuple[Tensor, list[float]]:
        aims.append(aim)
        return words.vocabulary[: frame.free], [0.0]

    monkeypatch.setattr(ring_a_bell, "evolve", evolve)
    target = target_of(typing, prompts=("a cat", "one dog here"))
    ring_a_bell.run(target, ConceptSpec.parse("cat, kitty", replaced), ring_a_bell.Settings(strength=2.5), quiet)

    def states(text: str) -> Tensor:
        return target.erased.text([text])[0].states

    d = sum(states(s.replace("{}", "cat")) - states(s.replace("{}", other)) for s in ring_a_bell.SENTENCES)
    for aim, prompt in zip(aims, target.prompts, strict=True):
        assert torch.allclose(aim, states(prompt) + 2.5 * d / len(ring_a_bell.SENTENCES), atol=1e-5)


def test_relearning_does_not_caption_with_words_that_mean_the_concept(tiny, monkeypatch) -> None:
    monkeypatch.setattr(relearning, "draw_rows", lambda model, target, conds, null, noise, before: noise)
    target, spec = AttackTarget(tiny, tiny, ("cat",)), ConceptSpec.parse("cat")
    harmless = everyday(tiny, spec)
    assert len(harmless) < len(VOCABULARY) - 1, "some mean it"
    for captions in (1, 16, len(harmless)):
        settings = relearning.Settings(captions=captions, pictures=1)
        used = [caption for caption, _ in relearning.dataset(target, spec, settings, quiet)]
        assert len(used) == len(set(used)) == captions and set(used) <= set(harmless)


# Frames


@pytest.mark.parametrize("free", [1, 3, 8])
def test_all_free_places_stay_however_long_the_sentence(typing, free: int) -> None:
    words = typing().words_of()
    head, tail = "cat kitty dog tree thing photo of one", "here puss gato feline mouser odd0 odd1 odd2"
    left = words.room - free
    for before, after in ((head, ""), (head, tail), ("", tail), ("a", tail)):
        frame = Frame.inside(words, f"{before} {{}} {after}", free)
        given = list(frame.pieces)
        at = given.index(None)
        assert frame.free == free and given[at : at + free] == [None] * free and len(given) == words.room
        kept = words.content(before)[-left:] if left else []
        assert given[:at] == kept, "what stands nearest before them stays"
        assert given[at + free :] == words.content(after)[: left - len(kept)], "and what fits behind them"


@pytest.mark.parametrize("make", [
    lambda words, free: Frame.inside(words, "a {} here", free),
    lambda words, free: Frame.prefix(words, words.content("a cat"), free),
], ids=["inside", "prefix"])  # fmt: skip
def test_more_free_places_than_fit_are_refused(typing, make) -> None:
    words = typing().words_of()
    assert make(words, words.room).free == words.room
    with pytest.raises(ValueError, match="9 searched words, and 8 fit"):
        make(words, words.room + 1)


# Pooled text


@pytest.mark.parametrize(("chosen", "settings", "read"), [
    (free_embedding, free_embedding.Settings(steps=2), ""),
    (p4d, p4d.Settings(tokens=2, steps=2, look_every=1), "a cat"),
], ids=["free_embedding", "p4d"])  # fmt: skip
def test_one_pooled_text_is_read_in_a_search(typing, monkeypatch, chosen, settings, read: str) -> None:
    """Free embedding's is the empty prompt's, with which its find is drawn; P4D's two sides both read the prompt's."""
    target, seen, plain = target_of(typing), [], TrainableModel.predict

    def predict(self, z: Tensor, t: Tensor, cond: Cond, *args, **kwargs) -> Tensor:
        seen.append(cond.extra["y"])
        return plain(self, z, t, Cond(cond.context), *args, **kwargs)

    monkeypatch.setattr(TrainableModel, "predict", predict)
    for port in (target.erased, target.base):

        def conditions(prompts, plain=port.conditions) -> list[Cond]:
            return [Cond(c.context, {"y": c.context.mean(1)}) for c in plain(prompts)]

        monkeypatch.setattr(port, "conditions", conditions)
    chosen.run(target, SPEC, settings, quiet)
    own, other = (target.erased.conditions([x])[0].extra["y"] for x in (read, "one dog"))
    assert seen and all(torch.equal(y, own.expand_as(y)) for y in seen) and not torch.equal(own, other)
