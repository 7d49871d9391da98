"""What each trained eraser asks of the shared training, against its paper: who samples which prompt up to where, optimiser
and rate, and which word each picture is learned with."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from watched_runs import (
    ALONE,
    IN_TURN,
    SPEC,
    TEXTS,
    Sampled,
    coloured,
    instead,
    named,
    numbers,
    quiet,
    reads,
    run,
    sampled,
)

from erasure_core import ConceptSpec, suppress
from erasure_core.methods import (
    Aids,
    _training,
    concept_ablation,
    cpe,
    dark_miner,
    duo,
    eap,
    esd,
    forget_me_not,
    kpop,
    leco,
    sdd,
    spm,
)
from erasure_core.methods._training import ERASE, NULL, TO
from erasure_core.operators.cond import Cond
from erasure_core.operators.regress import combine
from erasure_core.operators.train_loop import Trainer, generator_for
from erasure_core.operators.trainable import Weights

pytestmark = pytest.mark.core


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps_of(monkeypatch, port, method, settings, count: int = 1) -> list[Sampled]:
    """What pictures ``count`` steps of a method ask for; no loss is computed."""
    asked = sampled(monkeypatch)
    monkeypatch.setattr(_training, "regress", lambda *_: {})

    def look(trainer: Trainer) -> None:
        for i in range(count):
            trainer.phases[0].loss(i, generator_for(0, "look", i))

    instead(monkeypatch, look)
    method.run(port, SPEC, settings, quiet, Aids())
    assert len(asked) == count
    return asked


# Who samples, which prompt, up to where


@pytest.mark.parametrize(("method", "settings", "weights", "prompts"), [
    (esd, esd.Settings(form=esd.Form.CODE_2023, batch=3), Weights.STUDENT, {"cat", "red apple", "bomb"}),
    (esd, esd.Settings(form=esd.Form.CODE_2025, batch=3), Weights.FROZEN, {"cat", "red apple", "bomb"}),
    (esd, esd.Settings(erase_from="orchard"), Weights.FROZEN, {"orchard"}),
    (leco, leco.Settings(batch=3), Weights.STUDENT, {"cat", "red apple", "bomb"}),
    (spm, spm.Settings(batch=3, anchors=0), Weights.STUDENT, {"cat", "red apple", "bomb"}),
    (sdd, sdd.Settings(batch=3), Weights.AVERAGE, {"cat, red apple, bomb"}),
], ids=["esd 2023", "esd 2025", "esd inside", "leco", "spm", "sdd"])  # fmt: skip
def test_the_papers_network_samples_the_papers_prompt(tiny, monkeypatch, method, settings, weights, prompts) -> None:
    (asked,) = steps_of(monkeypatch, tiny, method, settings)
    assert asked.weights is weights and set(named(tiny, asked.context)) == prompts


def stops(monkeypatch, port, method, settings) -> Tensor:
    """How many of four sampler steps are done where 2000 training steps look."""
    settings = replace(settings, sample_steps=4)
    return 4 * torch.tensor([x.progress for x in steps_of(monkeypatch, port, method, settings, 2000)])


def shares(whole: Tensor) -> list[float]:
    return (torch.bincount(whole.long(), minlength=4) / len(whole)).tolist()


def test_esd_2025_stops_after_any_whole_number_of_steps(tiny, monkeypatch) -> None:
    done = stops(monkeypatch, tiny, esd, esd.Settings(form=esd.Form.CODE_2025))
    assert torch.equal(done, done.round()) and shares(done) == pytest.approx([0.25] * 4, abs=0.04)


def test_esd_2023_looks_anywhere_inside_each_step(tiny, monkeypatch) -> None:
    done = stops(monkeypatch, tiny, esd, esd.Settings(form=esd.Form.CODE_2023))
    assert shares(done.floor()) == pytest.approx([0.25] * 4, abs=0.04)
    tenths = torch.bincount(((done - done.floor()) * 10).long(), minlength=10) / len(done)
    assert tenths.tolist() == pytest.approx([0.1] * 10, abs=0.03)


@pytest.mark.parametrize(("method", "settings"), [
    (leco, leco.Settings()), (spm, spm.Settings(anchors=0)), (sdd, sdd.Settings()),
], ids=["leco", "spm", "sdd"])  # fmt: skip
def test_others_stop_after_one_step_at_least(tiny, monkeypatch, method, settings) -> None:
    done = stops(monkeypatch, tiny, method, settings)
    assert torch.equal(done, done.round()) and shares(done) == pytest.approx([0, 1 / 3, 1 / 3, 1 / 3], abs=0.04)


@pytest.mark.parametrize("eta", [0.5, 2.0, 3.0])
def test_esd_inside_something_puts_the_replacement_there(eta: float) -> None:
    term = esd.target(esd.Form.CODE_2025, eta, erase_from=True, replaced=True)
    concept, to, null, inside = (normal(2, 4, 4, 4, seed=i) for i in range(4))
    made = combine({ERASE: concept, TO: to, NULL: null, esd.FROM: inside}, term.combination)
    assert term.reads == esd.FROM
    assert torch.allclose(made, inside + to + (eta - 1) * null - eta * concept, atol=1e-5)


def test_esd_2023_cannot_erase_from_something(tiny) -> None:
    settings = esd.Settings(form=esd.Form.CODE_2023, erase_from="orchard", iterations=1, sample_steps=2)
    with pytest.raises(ValueError, match="erase_from: the 2023 form"):
        esd.run(tiny, SPEC, settings, quiet, Aids())
    esd.run(tiny, SPEC, replace(settings, erase_from="  "), quiet, Aids())


# Optimisers and rates


ADAM, ADAMW = torch.optim.Adam, torch.optim.AdamW


@pytest.mark.parametrize(("method", "steps", "optimisers"), [
    (esd, 200, [(ADAM, 5e-5, 0)]),
    (sdd, 1500, [(ADAMW, 1e-5, 1e-4)]),
    (leco, 500, [(ADAMW, 1e-4, 0.01)]),
    (spm, 3000, [(ADAMW, 1e-4, 0.01)]),
    (forget_me_not, 35, [(ADAMW, 2e-6, 0.01)]),
    (eap, 1000, [(ADAM, 1e-5, 0), (ADAM, 1e-2, 0)]),
    (concept_ablation, 400, [(ADAM, 1e-5, 0)]),
    (kpop, 1000, [(ADAM, 1e-2, 0), (ADAM, 1e-5, 0)]),  # the key, the weights
    (duo, 1000, [(ADAMW, 6e-5, 0.01)]),  # 3e-4 at beta 100, here it is 500
    (dark_miner, 200, [(ADAM, 1e-4, 0)] * 2),  # the words, then what a round found
    (cpe, 450, [(ADAMW, 3e-3, 0.01), (ADAMW, 1e-2, 0.01), (ADAMW, 3e-3, 0.01)]),  # erase, attack, erase
], ids=[
    "esd", "sdd", "leco", "spm", "forget-me-not", "eap", "ablation", "kpop", "duo", "dark miner", "cpe",
])  # fmt: skip
def test_the_papers_optimiser_at_its_rate(tiny, monkeypatch, method, steps: int, optimisers) -> None:
    """Of Concept Ablation and Dark Miner ours, of KPOP and CPE one of the two: see their docstrings."""
    trainers: list[Trainer] = []
    instead(monkeypatch, trainers.append)
    run(method, tiny, ALONE)
    assert {trainer.iterations for trainer in trainers} == {steps}
    phases = [phase for trainer in trainers for phase in trainer.phases]
    made = [(type(p.made), p.made.defaults["lr"], p.made.defaults["weight_decay"]) for p in phases]
    assert made == [(kind, pytest.approx(lr), decay) for kind, lr, decay in optimisers]
    assert [p.clip for p in phases] == ([1.0] if method is duo else [None] * len(phases))
    if method not in (spm, kpop, cpe):
        assert all(phase.rate(i) == 1 for phase in phases for i in (0, steps // 2, steps - 1))


@pytest.mark.parametrize(("iterations", "warmup"), [(3000, 500), (600, 100)])
def test_spm_warms_up_and_restarts_three_times(tiny, monkeypatch, iterations: int, warmup: int) -> None:
    """500 of the paper's 3000 steps, and the same share of a shorter training."""
    trainers: list[Trainer] = []
    instead(monkeypatch, trainers.append)
    spm.run(tiny, ALONE, spm.Settings(iterations=iterations), quiet, Aids())
    rate, length = trainers[0].phases[0].rate, (iterations - warmup) / 3
    for i in range(0, warmup, 7):
        assert rate(i) == pytest.approx((i + 1) / warmup)
    for i in range(warmup, iterations, 7):
        assert rate(i) == pytest.approx((1 + math.cos(math.pi * ((i - warmup) / length % 1))) / 2)


# Which word a picture is learned with


def test_every_concept_is_met_as_often_however_many_words_it_has(tiny) -> None:
    """Or a line without synonyms stays, beside lines that have many, or embeddings."""
    spec = ConceptSpec.parse("cat\nred apple, apple, fruit, orchard\nbomb", "\npear\nriver")
    states = torch.randn(2, 6, 16)
    prompts = _training.Prompts(tiny, spec, [(states[0], 2), (states[1], 2)])
    own = {word: n for n, concept in enumerate(prompts.concepts) for word, _ in concept}
    assert len(own) == 8 and [len(concept) for concept in prompts.concepts] == [1, 4, 3]
    met = [own[word] for word, _ in prompts.pairs]
    assert met == [0, 1, 2] * 4 and {word for word, _ in prompts.pairs} == set(own)
    assert {(own[word], to) for word, to in prompts.pairs} == {(0, ""), (1, "pear"), (2, "river")}
    for found, concept in zip(states, prompts.pairs[5::3], strict=False):
        assert torch.equal(prompts[concept[0]].context[0], found)


@pytest.mark.parametrize("given", [False, True], ids=["drawn", "given"])
def test_forget_me_not_steers_each_picture_from_its_own_word(tiny, monkeypatch, given: bool) -> None:
    """Pictures that are given show the first concept: no word of another one is read with them."""
    seen, marks, plain = reads(monkeypatch), [], forget_me_not.steering_loss

    def steering(attended, columns: Tensor) -> Tensor:
        marks.append(columns)
        return plain(attended, columns)

    monkeypatch.setattr(forget_me_not, "steering_loss", steering)
    monkeypatch.setattr(forget_me_not, "draw_pictures", lambda *_: coloured(6))
    instead(monkeypatch, lambda trainer: trainer.phases[0].loss(0, generator_for(0, "look", 0)))
    aids = Aids(pictures=coloured(6)) if given else Aids()
    forget_me_not.run(tiny, SPEC, forget_me_not.Settings(batch=40), quiet, aids)
    words = ["cat", "red apple"] if given else IN_TURN
    expected = [words[i % len(words)] for i in numbers(tiny, seen[0])]
    assert set(expected) == set(words) and named(tiny, seen[0].cond.context) == expected
    places = [columns.nonzero().flatten().tolist() for columns in marks[0]]
    assert places == [list(range(1, 1 + len(word.split()))) for word in expected]


def test_ablation_learns_each_picture_with_its_own_word_and_anchor(tiny, monkeypatch) -> None:
    seen = reads(monkeypatch)
    instead(monkeypatch, lambda trainer: trainer.phases[0].loss(0, generator_for(0, "look", 0)))
    settings = concept_ablation.Settings(batch=40)
    concept_ablation.run(tiny, SPEC, settings, quiet, Aids(), anchors=coloured(6))
    student, anchor = seen
    shown = numbers(tiny, student)
    assert student.weights is anchor.weights is Weights.STUDENT and {i % 4 for i in shown} == {0, 1, 2, 3}
    assert named(tiny, student.cond.context) == [IN_TURN[i % 4] for i in shown]
    assert named(tiny, anchor.cond.context) == [("pear", "river", "pear", "river")[i % 4] for i in shown]


VOCABULARY_OF_EAP = ("stone", "house", "sky", "tree", "boat", "lamp")


def nearest(port, word: str) -> str:
    here = port.conditions([word])[0].context
    return min(VOCABULARY_OF_EAP, key=lambda other: float((port.conditions([other])[0].context - here).norm()))


def test_eap_attacks_with_the_words_near_the_one_that_is_erased(tiny, monkeypatch) -> None:
    """With one word to choose from it is that one; its pooled text comes with it."""
    plain = tiny.conditions
    tiny.conditions = lambda prompts: [Cond(c.context, {"y": c.context.mean(1)}) for c in plain(prompts)]
    near = {word: nearest(tiny, word) for word in ("cat", "bomb")}
    assert near["cat"] != near["bomb"]
    asked, seen, turns = sampled(monkeypatch, eap), reads(monkeypatch), []

    def look(trainer: Trainer) -> None:
        for i in range(4):
            for phase in trainer.phases:
                asked.clear()
                phase.loss(i, generator_for(0, phase.name, i))
                assert all(x.weights is Weights.STUDENT for x in asked)
                turns.append([named(tiny, x.context, (*TEXTS, *VOCABULARY_OF_EAP)) for x in asked])

    instead(monkeypatch, look)
    settings = eap.Settings(nearest=1, vocabulary=", ".join(VOCABULARY_OF_EAP))
    eap.run(tiny, ConceptSpec.parse("cat\nbomb"), settings, quiet, Aids())
    assert turns == 2 * [turn for word, other in near.items() for turn in ([[word], [other]], [[other]])]
    for read in seen:
        assert torch.allclose(read.cond.extra["y"], read.cond.context.mean(1), atol=1e-5)


def test_suppress_looks_at_every_word_and_every_kept_word(tiny, monkeypatch) -> None:
    scenes: list[suppress.Scene] = []

    def draw(model, given, *_) -> list[suppress.Stop]:
        scenes.extend(given)
        raise KeyboardInterrupt

    monkeypatch.setattr(suppress, "draw", draw)
    keep = ("pear", "river", "orchard", "dog", "boat", "lamp")
    with pytest.raises(KeyboardInterrupt):
        spec = replace(ConceptSpec.parse("cat, red apple\nbomb"), keep=keep)
        suppress.suppress(tiny, spec, suppress.Settings(pictures=1, kept_pictures=2), quiet, Aids())
    erased, kept = ([s.cond.context[0] for s in scenes if (s.to is None) is held] for held in (False, True))
    assert sorted(named(tiny, torch.stack(erased))) == sorted(IN_TURN)
    assert sorted(named(tiny, torch.stack(kept), keep)) == sorted(keep)
