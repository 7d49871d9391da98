"""What attacks make of their searches: which find is handed over, which way the objective goes, what is aimed at."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erasure_core import ConceptSpec
from erasure_core.attacks import (
    AttackTarget,
    Sampler,
    attack,
    concept_inversion,
    free_embedding,
    p4d,
    relearning,
    ring_a_bell,
    sneaky_prompt,
    synonyms,
)
from erasure_core.attacks import unlearn_diff_atk as uda
from erasure_core.attacks.drawing import noises
from erasure_core.attacks.target import Look
from erasure_core.attacks.watched import Kept
from erasure_core.attacks.words import Frame
from erasure_core.concept import everyday
from erasure_core.operators.cond import Cond
from erasure_core.operators.search import TokenSlot, denoising_loss
from erasure_core.operators.trainable import TrainableModel
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
    return AttackTarget(**{"erased": erased, "base": base, **values, **changes})


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
    (free_embedding, free_embedding.Settings(steps=3, starts=1)),
    (concept_inversion, concept_inversion.Settings(steps=3, learning_rate=0.1)),
], ids=["p4d", "unlearn_diff_atk", "free_embedding", "concept_inversion"])  # fmt: skip
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


@pytest.mark.parametrize(("chosen", "settings"), [
    (free_embedding, free_embedding.Settings(steps=24, starts=3)),
    (concept_inversion, concept_inversion.Settings(steps=24)),
], ids=["free_embedding", "concept_inversion"])  # fmt: skip
def test_a_search_ends_when_nothing_is_left_to_search(typing, chosen, settings) -> None:
    """Where the mean of the pictures can hardly rise and each shows the concept; further starts are then spared too."""
    doubtful = torch.tensor([0.99, 0.99, 0.99, 0.69])
    assert doubtful.mean() > 0.9, "one alone is not recognised"
    for says, ends in ((torch.full((4,), 0.95), True), (torch.full((4,), 0.85), False), (doubtful, False)):
        answers = iter([torch.zeros(4), torch.zeros(4), *[says] * 99])
        found = chosen.run(target_of(typing, look=lambda _, a=answers: next(a), threshold=0.7), SPEC, settings, quiet)
        searches = 1 if ends or chosen is concept_inversion else 3
        assert len(found.ways) == searches and len(found.losses) == (17 if ends else 24 * searches)
        assert found.queries == 4 * (3 if ends else 4 * searches), "a short search is looked at less often"


def lucky(latents: Tensor) -> Tensor:
    """A judge that recognises the concept in one picture of four."""
    return torch.tensor([0.9, 0.0, 0.0, 0.0])[: len(latents)]


@pytest.mark.parametrize("look", [lucky, lambda z: torch.full((len(z),), 0.6)], ids=["lucky", "seen"])
def test_one_lucky_picture_ends_no_search(typing, look: Look) -> None:
    target, ends = target_of(typing, look=look), look is not lucky
    made = uda.run(target, SPEC, uda.Settings(tokens=2, times=3, steps=2), quiet)
    assert len(made.losses) == (2 if ends else 6) and made.queries == (4 if ends else 12)
    asked = sneaky_prompt.run(target, SPEC, sneaky_prompt.Settings(words=2, queries=3), quiet)
    assert len(asked.losses) == (1 if ends else 3) and asked.queries == (4 if ends else 12)


# Which way the objective goes


@pytest.mark.parametrize(("chosen", "settings"), [
    (free_embedding, free_embedding.Settings(steps=40, learning_rate=0.05)),
    (concept_inversion, concept_inversion.Settings(steps=40, learning_rate=0.003)),
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


@pytest.mark.parametrize(("chosen", "settings"), [
    (free_embedding, free_embedding.Settings(steps=1, starts=1, teacher=True)),
    (concept_inversion, concept_inversion.Settings(steps=1, teacher=True)),
], ids=["free_embedding", "concept_inversion"])  # fmt: skip
def test_a_teacher_is_the_base_model_that_reads_the_prompt(typing, chosen, settings) -> None:
    """Of an unchanged model that reads the same there is nothing to learn."""
    base = typing()
    for erased, same in ((base, True), (typing.erased(), False)):
        target = target_of(typing, erased=erased, base=base, prompts=("cat",))
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(concept_inversion, "SENTENCES", ("{}",))
            (loss,) = chosen.run(target, SPEC, settings, quiet).losses
        assert loss < 1e-10 if same else loss > 1e-4


# What is searched for, and where


def lessons(monkeypatch, target: AttackTarget, spec: ConceptSpec, steps: int) -> set[tuple[str, float]]:
    """(sentence, the value that fills the pictures) of each step of Concept Inversion."""
    made, read, plain = set(), [], TokenSlot.states
    words = target.words
    assert words is not None

    def states(self: TokenSlot, vectors: Tensor) -> Tensor:
        ids = self.ids.clone()
        ids[0, list(self.positions)] = words.content("odd0")[0]
        row = ids[0, 1:].tolist()
        read.append(words.spell(row[: row.index(words.eos)]).replace("odd0", "<v>"))
        return plain(self, vectors)

    def loss(model, pool: Tensor, *args, **kwargs) -> Tensor:
        made.add((read[-1], float(pool.mean())))
        return denoising_loss(model, pool, *args, **kwargs)

    monkeypatch.setattr(TokenSlot, "states", states)
    monkeypatch.setattr(concept_inversion, "denoising_loss", loss)
    concept_inversion.run(target, spec, concept_inversion.Settings(steps=steps, pictures=4), quiet)
    return made


def test_a_new_word_is_learned_in_the_prompts_with_their_own_pictures(typing, monkeypatch) -> None:
    """Else the word for a style would learn the things that are shown in it, and then be written beside them."""
    pictures = torch.stack([torch.full((4, 4, 4), float(i)) for i in (1, 1, 3, 3)])
    target = target_of(typing, prompts=("a cat of tree", "one dog tree here"), pictures=pictures)
    made = lessons(monkeypatch, target, ConceptSpec.parse("tree"), 12)
    assert made == {("a cat of <v>", 1.0), ("one dog <v> here", 3.0)}


def test_sentences_of_a_template_join_a_prompt_that_asks_for_nothing_else(typing, monkeypatch) -> None:
    assert concept_inversion.learned_in("The {}") == ["The {}", *concept_inversion.SENTENCES]
    assert concept_inversion.learned_in("{} on a mat") == ["{} on a mat"]
    pictures = torch.stack([torch.full((4, 4, 4), float(i)) for i in (1, 1, 3, 3)])
    target = target_of(typing, prompts=("a cat", "a dog cat"), pictures=pictures)
    made = lessons(monkeypatch, target, SPEC, 60)
    assert {s for s, of in made if of == 3} == {"a dog <v>"} and {"a <v>", "<v>", "one <v>"} < {
        s for s, of in made if of == 1
    }


def test_a_new_word_starts_from_the_mean_of_the_names(typing, monkeypatch) -> None:
    """And each entry's first step is the rate in their deviations: AdamW's first step is the rate itself."""
    words, seen, plain = typing().words_of(), [], TokenSlot.states

    def states(self: TokenSlot, vectors: Tensor) -> Tensor:
        seen.append(vectors.detach().clone())
        return plain(self, vectors)

    monkeypatch.setattr(TokenSlot, "states", states)
    rows = words.table[[words.vocabulary.tolist().index(i) for i in words.content("dog tree")]]
    target = target_of(typing, prompts=("a dog tree",))
    concept_inversion.run(target, ConceptSpec.parse("dog tree"), concept_inversion.Settings(steps=1, vectors=2), quiet)
    start = rows.mean(0).expand(2, -1)
    assert torch.allclose(seen[0], start, atol=1e-6)
    expected = 5e-3 / 0.014 * float(rows.std(1).mean())
    assert torch.allclose((seen[-1] - start).abs(), torch.full_like(start, expected), rtol=0.05)


def test_free_embedding_starts_from_prompts_and_from_near_nothing(typing, monkeypatch) -> None:
    target = target_of(typing, prompts=("a cat", "one dog"))
    null, cat, dog = (c.context for c in target.erased.conditions(["", *target.prompts]))
    made = []
    close = functools.partial(torch.allclose, atol=1e-6)  # encoded side by side with other prompts

    def search(model, target, start: Tensor, *_, steps: int, **kwargs) -> Kept:
        made.append(start)
        return Kept(start, [torch.zeros(())], sure=False, asked=0)

    monkeypatch.setattr(free_embedding, "search_watched", search)
    found = free_embedding.run(target, SPEC, free_embedding.Settings(steps=1, starts=5, pictures=2), quiet)
    assert [way.attacks for way in found.ways] == [target.prompts] * 5
    assert all(close(a, b) for a, b in zip(made, (cat, null, dog), strict=False))
    for near in made[3:]:
        assert close(near[:, :1], null[:, :1]) and 0.05 < float((near - null).std() / null.std()) < 0.2
    assert not torch.equal(made[3], made[4])
    assert len(free_embedding.run(target, SPEC, free_embedding.Settings(steps=1, pictures=2), quiet).ways) == 2


@pytest.mark.parametrize(("steps", "looked"), [(2, 2), (50, 6), (100, 11), (400, 14)])
def test_long_searches_are_looked_at_more_often(typing, steps: int, looked: int) -> None:
    target = target_of(typing, look=lambda z: torch.zeros(len(z)))
    found = free_embedding.run(target, SPEC, free_embedding.Settings(steps=steps, starts=1, batch=1), quiet)
    assert found.queries == 4 * looked


def test_of_a_long_list_the_words_that_explain_the_concept_are_drawn(typing) -> None:
    """Against the mean squared error of every prompt by itself, over the noised pictures that the attack makes."""
    listed = [w for w in typing.WORDS[4:] if w not in ("cat", "kitty")][:12]
    target = target_of(typing, pictures=normal(3, 4, 4, 4))
    found = synonyms.run(target, SPEC, synonyms.Settings(words=", ".join(listed), drawn=2), quiet)
    texts = [f"a {word}" for word in listed]
    with target.erased.trainable() as model, torch.no_grad():
        errors = []
        for text in texts:
            (cond,), gaps = target.erased.conditions([text]), []
            for k in range(16):
                t = torch.tensor([int((k + 0.5) / 16 * len(model.schedule))])
                noise = noises(model, 0, "synonyms fit", [k])
                x0 = target.pictures[k % 3][None]
                z = model.schedule.add_noise(x0, noise, t)
                gap = model.predict(z, t, cond) - model.schedule.target(model.space, x0, noise, t)
                gaps.append(float(gap.double().square().mean()))
            errors.append(sum(gaps) / 16)
    best = sorted(range(12), key=errors.__getitem__)[:2]
    assert {way.prompt for way in found.ways} == {texts[i] for i in best}
    whole = synonyms.run(target, SPEC, synonyms.Settings(words=", ".join(listed)), quiet)
    assert len(whole.ways) == 12, "all of them, as the paper has it"
    three = synonyms.run(target, SPEC, synonyms.Settings(words=", ".join(listed[:3]), drawn=3), quiet)
    assert len(three.ways) == 3, "none to leave out"


def test_the_vocabulary_of_p4d_is_normalised_once(typing, monkeypatch) -> None:
    target, sizes, plain = target_of(typing), [], F.normalize
    assert target.words is not None
    monkeypatch.setattr(F, "normalize", lambda x, *args, **kwargs: (sizes.append(len(x)), plain(x, *args, **kwargs))[1])
    p4d.run(target, SPEC, p4d.Settings(tokens=2, steps=4, look_every=1), quiet)
    assert sizes.count(len(target.words.table)) == 1


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


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("p4d", {"steps": 1, "pictures": 1}),
        ("free_embedding", {"steps": 1, "starts": 1, "pictures": 1, "teacher": True}),
        ("concept_inversion", {"steps": 1, "pictures": 1, "teacher": True}),
    ],
)
def test_the_network_with_gradients_is_opened_last(typing, monkeypatch, name: str, settings: dict[str, Any]) -> None:
    """A replica decides by the room that is left whether it keeps activations, which the other one has no use for."""
    target, opened = target_of(typing), []
    for which in ("erased", "base"):
        port = getattr(target, which)
        monkeypatch.setattr(port, "trainable", lambda o=port.trainable, w=which: (opened.append(w), o())[1])
    attack(target, ConceptSpec.parse("cat"), name, settings)
    assert opened[-2:] == ["base", "erased"]
