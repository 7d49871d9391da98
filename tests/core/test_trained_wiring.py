"""What each method's ``run`` makes of its parts: the sign and weight of a loss, and whose words, pictures and network it is of.

The losses are tested on their own (test_trained_losses.py, test_adversarial.py, test_cpe.py, test_prefer.py,
test_search.py). Here numbers stand in for most of them.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from watched_runs import (
    ALONE,
    IN_TURN,
    KEPT,
    SPEC,
    answers,
    coloured,
    falling,
    instead,
    losses,
    named,
    quiet,
    reads,
    run,
    sampled,
)

from erasure_core.methods import Aids, adversarial, concept_ablation, cpe, dark_miner, duo, kpop
from erasure_core.methods._training import ERASE, KEEP, NULL, TO
from erasure_core.operators.changes import FullWeights, Init, Layers, LoRA
from erasure_core.operators.memory import Placement
from erasure_core.operators.search import Found
from erasure_core.operators.train_loop import Trainer, generator_for
from erasure_core.operators.trainable import TrainableModel, Weights
from erasure_core.pairs import ConceptPairs

pytestmark = pytest.mark.core
REPLACED = {"cat": "pear", "red apple": "pear", "bomb": "river"}
METHODS = (adversarial, concept_ablation, cpe, dark_miner, duo, kpop)
each = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.SPEC.name)


# All of them


@pytest.mark.parametrize(("method", "what"), [
    (adversarial, LoRA(Layers.ALL, 32)),
    (concept_ablation, FullWeights(Layers.CROSS)),
    (cpe, LoRA(Layers.TEXT, 2 * 4)),  # rank 4 for each of two concepts
    (dark_miner, LoRA(Layers.CROSS, 8)),
    (duo, LoRA(Layers.SELF, 32, init=Init.GAUSSIAN)),
    (kpop, FullWeights(Layers.CROSS)),
], ids=["adversarial", "ablation", "cpe", "dark miner", "duo", "kpop"])  # fmt: skip
def test_what_is_trained_is_the_documented_form_of_the_documented_layers(tiny, monkeypatch, method, what) -> None:
    trained, plain = [], TrainableModel.train
    monkeypatch.setattr(TrainableModel, "train", lambda self, x, *seed: trained.append(x) or plain(self, x, *seed))
    instead(monkeypatch, lambda _: None)
    run(method, tiny)
    assert trained == [what]


@each
def test_what_comes_out_names_its_method(tiny, monkeypatch, method) -> None:
    instead(monkeypatch, lambda _: None)
    assert run(method, tiny).header.method == method.SPEC.name


@each
def test_another_seed_starts_and_draws_elsewhere(tiny, monkeypatch, method) -> None:
    trainers: list[Trainer] = []
    instead(monkeypatch, trainers.append)
    starts = []
    for seed in (0, 1):
        trainers.clear()
        run(method, tiny, seed=seed)
        assert {trainer.seed for trainer in trainers} == {seed}
        starts.append([p.detach().clone() for trainer in trainers for x in trainer.phases for p in x.parameters])
    assert not any(torch.equal(a, b) for a, b in zip(*starts, strict=True) if a.any())


@pytest.mark.parametrize("method", [concept_ablation, dark_miner], ids=lambda m: m.SPEC.name)
def test_pictures_are_looked_at_at_any_time(tiny, monkeypatch, method) -> None:
    (asked,) = answers(monkeypatch, method, regress={}).values()
    instead(monkeypatch, lambda trainer: losses(trainer.phases[0]))
    run(method, tiny, batch=400)
    assert asked[0]["t"].min() < 20 and asked[0]["t"].max() > 980


@pytest.mark.parametrize("method", [concept_ablation, kpop], ids=lambda m: m.SPEC.name)
def test_full_weights_are_stored_as_exactly_as_asked(tiny, monkeypatch, method) -> None:
    def look(trainer: Trainer) -> None:
        with torch.no_grad():
            for p in trainer.model.parameters():
                p.normal_()

    instead(monkeypatch, look)
    ranks = [[d.rank for d in run(method, tiny, energy=energy).deltas.values()] for energy in (0.6, 0.9, 1.0)]
    assert all(rough < fine < whole for rough, fine, whole in zip(*ranks, strict=True))


# CPE


def cpe_trainings(monkeypatch, port, spec=SPEC, **settings) -> tuple[list, dict[str, list], Tensor]:
    """(name of the phase, losses) of one step of each training; what the losses are asked with; all offsets.

    Number k of the offsets is made 100 (k + 1) everywhere, as if it had been found."""
    asked = answers(monkeypatch, cpe.Losses, erase=2.0, attack=3.0, anchor=5.0)
    made, offsets = [], []

    def look(trainer: Trainer) -> None:
        (phase,) = trainer.phases
        if phase.name.startswith("attack"):
            (found,) = phase.parameters
            offsets.append(found.detach().clone())
            with torch.no_grad():
                last = sum(map(len, offsets))
                found.copy_(100 * torch.arange(last - len(found) + 1, last + 1)[:, None, None].expand_as(found))
        made.append((phase.name, losses(phase)))

    instead(monkeypatch, look)
    run(cpe, port, spec, **settings)
    return made, asked, torch.cat(offsets)


def test_cpe_goes_down_its_losses_the_anchors_weighed(tiny, monkeypatch) -> None:
    """An attack comes before each stage but the first; what it found is erased from then on."""
    made, asked, _ = cpe_trainings(monkeypatch, tiny, stages=3, adversaries=3, anchor_weight=7.0, negative_guidance=0.6)
    first, attack, later = {"erase": 2, "anchor": 35}, {"attack": 3}, {"erase": 2, "anchor": 35, "adverse": 2}
    assert [name for name, _ in made] == ["erase 0", "attack 0", "erase 1", "attack 6", "erase 2"]
    assert [found for _, found in made] == [first, attack, later, attack, later]
    assert {x["self"].guidance for x in asked["erase"]} == {0.6}


def test_cpe_reads_each_word_with_its_own_replacement_and_its_own_offsets(tiny, monkeypatch) -> None:
    """Those of later attacks too, whose number is no multiple of the words'; earlier ones stay."""
    _, asked, _ = cpe_trainings(monkeypatch, tiny, stages=3, adversaries=3, batch=60)
    offset: list[list[int]] = []
    for x in asked["erase"]:
        words = named(tiny, x["concept"])
        assert named(tiny, x["neutral"]) == [REPLACED[word] for word in words]
        offset.append(((x["read"] - x["concept"]).mean((1, 2)) / 100).round().int().tolist())
        assert all(n == 0 or IN_TURN[(n - 1) % 4] == word for n, word in zip(offset[-1], words, strict=True))
        assert set(words) == set(REPLACED)
    assert [set(numbers) for numbers in offset] == [{0}, {0}, set(range(1, 7)), {0}, set(range(1, 13))]
    for x, found in zip(asked["attack"], (range(1, 7), range(7, 13)), strict=True):
        number = (x["offset"].mean((1, 2)) / 100).round().int().tolist()
        assert set(number) == set(found) and named(tiny, x["concept"]) == [IN_TURN[(n - 1) % 4] for n in number]


def test_cpe_holds_its_anchors_with_a_little_noise(tiny, monkeypatch) -> None:
    _, asked, _ = cpe_trainings(monkeypatch, tiny, batch=64, anchor_noise=0.02)
    anchors = torch.cat([c.context for c in tiny.conditions(cpe.anchors_of(tiny, SPEC))])
    held = asked["anchor"][0]["anchors"]
    nearest = torch.cdist(held.flatten(1), anchors.flatten(1)).argmin(1)
    assert len(set(nearest.tolist())) > 30 and float((held - anchors[nearest]).std()) == pytest.approx(0.02, rel=0.05)


def test_each_attack_of_cpe_starts_anew_near_nothing(tiny, monkeypatch) -> None:
    """With 16 offsets for each of two concepts, of a deviation of 0.01."""
    _, _, offsets = cpe_trainings(monkeypatch, tiny, stages=3)
    assert len(offsets) == 2 * 32 == len({float(x[0, 0]) for x in offsets})
    assert float(offsets.std()) == pytest.approx(0.01, rel=0.05)


def test_each_stage_of_cpe_has_a_cosine_of_its_own(tiny, monkeypatch) -> None:
    """Five stages of 450 steps for each concept, and four attacks as long, whose rate stays."""
    trainers: list[Trainer] = []
    instead(monkeypatch, trainers.append)
    run(cpe, tiny, stages=cpe.Settings().stages)
    assert [t.phases[0].name.split()[0] for t in trainers] == ["erase", *["attack", "erase"] * 4]
    for trainer in trainers:
        attack = "attack" in trainer.phases[0].name
        assert trainer.iterations == 900
        assert [trainer.phases[0].rate(i) for i in range(0, 900, 50)] == pytest.approx(
            [1 if attack else falling(i, 900) for i in range(0, 900, 50)]
        )


# KPOP


def test_kpop_recovers_and_hides_on_one_latent_that_the_student_draws_of_the_concept(tiny, monkeypatch) -> None:
    drawn = sampled(monkeypatch, kpop)
    asked = answers(monkeypatch, kpop, recover_loss=2.0, hide_losses={"without": 3.0, "with": 4.0})
    made, at = [], set()

    def look(trainer: Trainer) -> None:
        for i in range(40):
            made.append([losses(phase, i) for phase in trainer.phases])
            (recover, held), hide, own = asked["recover_loss"][-2:], asked["hide_losses"][-1], drawn[-1]
            words = named(tiny, own.context)
            assert own.weights is Weights.STUDENT and set(words) == set(REPLACED)
            assert named(tiny, recover["concept"].context) == named(tiny, hide["conds"][ERASE].context) == words
            assert set(named(tiny, held["concept"].context)) == set(KEPT.keep)
            assert all(x["z"] is recover["z"] and x["t"] is recover["t"] for x in (held, hide))
            at.add(4 * own.progress)

    instead(monkeypatch, look)
    run(kpop, tiny, KEPT, batch=4, keep_weight=0.5, sample_steps=4)
    assert made == [[{"recover": 2, "held": 1}, {"without": 3, "with": 4}]] * 40
    assert at == {1, 2, 3}, "sampler steps of four"


@pytest.mark.parametrize(("keep", "weight"), [((), 1.0), (KEPT.keep, 0.0)])
def test_kpops_key_holds_nothing_where_nothing_is_kept(tiny, monkeypatch, keep, weight: float) -> None:
    sampled(monkeypatch, kpop)
    answers(monkeypatch, kpop, recover_loss=2.0)
    made = []
    instead(monkeypatch, lambda trainer: made.append(losses(trainer.phases[0])))
    run(kpop, tiny, replace(SPEC, keep=keep), keep_weight=weight)
    assert made == [{"recover": 2}]


def test_kpops_key_learns_on_alone_four_times_as_long_where_it_is_wanted(tiny, monkeypatch) -> None:
    """From the words and latents that were drawn before; nothing moves the weights any more."""
    stored = kpop.Underway(coloured(2), torch.tensor([7, 8]), tiny.conditions(["river", "pear"]))
    under = answers(monkeypatch, kpop, underway=stored)["underway"]
    drawn, asked = sampled(monkeypatch, kpop), answers(monkeypatch, kpop, recover_loss=2.0)["recover_loss"]
    trainers: list[Trainer] = []

    def look(trainer: Trainer) -> None:
        trainers.append(trainer)
        losses(trainer.phases[0], trainer.iterations - 1)

    instead(monkeypatch, look)
    settings = kpop.Settings(iterations=5, batch=20)
    kpop.hide(tiny, SPEC, settings, quiet, Aids())
    words = {7: "river", 8: "pear"}
    assert [x["steps"] for x in under] == [40] and not drawn
    assert named(tiny, asked[0]["concept"].context) == [words[t] for t in asked[0]["t"].tolist()]
    assert torch.equal(asked[0]["z"], stored.latents[asked[0]["t"] - 7]) and asked[0]["t"].unique().tolist() == [7, 8]
    memory, weights = trainers[0].phases
    assert trainers[0].iterations == 50
    assert [memory.rate(i) for i in range(50)] == pytest.approx([1.0] * 10 + [falling(i, 40) for i in range(40)])
    assert [weights.rate(i) for i in range(50)] == pytest.approx([falling(i, 10) for i in range(10)] + [0.0] * 40)
    kpop.run(tiny, SPEC, settings, quiet, Aids())
    assert trainers[1].iterations == 10 and len(under) == 1 and len(drawn) == 1, "a key that is thrown away doesn't"


def test_kpops_key_starts_as_rows_of_the_empty_prompt(tiny, monkeypatch) -> None:
    """A tenth of their deviation off, so many as asked, where asked."""
    instead(monkeypatch, lambda _: None)
    settings = kpop.Settings(iterations=1, sample_steps=2, rows=40, placement=Placement.MID, shared=True)
    key = kpop.hide(tiny, SPEC, settings, quiet, Aids(), alone=0).key
    null = tiny.conditions([""])[0].context[0]
    away = key.key - null[torch.cdist(key.key, null).argmin(1)]
    assert len(key.key) == 40 and key.placement is Placement.MID and torch.equal(key.key, key.value)
    assert float(away.std()) == pytest.approx(0.1 * float(null.std()), rel=0.1)


# Concept Ablation


def test_ablation_draws_pictures_of_each_words_anchor(tiny, monkeypatch) -> None:
    drawn = answers(monkeypatch, concept_ablation, draw_pictures=coloured(4))["draw_pictures"]
    instead(monkeypatch, lambda _: None)
    run(concept_ablation, tiny, pictures=5)
    words = named(tiny, torch.cat([c.context for c in drawn[0]["conds"]]))
    assert words == [REPLACED[word] for word in IN_TURN] and drawn[0]["count"] == 2 * 5
    assert named(tiny, drawn[0]["null"].context) == [""]


def terms_of(monkeypatch, port, method, keep, weight: float) -> tuple[list, dict]:
    """(prompt, target, weight, whose) of each term of a step's regression; the step's prompts."""
    asked = answers(monkeypatch, method, regress={})["regress"]
    instead(monkeypatch, lambda trainer: losses(trainer.phases[0]))
    run(method, port, replace(SPEC, keep=keep), keep_weight=weight)
    terms = [(x.reads, dict(x.combination), x.weight, x.reference) for x in asked[0]["terms"]]
    return terms, {key: set(named(port, cond.context)) for key, cond in asked[0]["conds"].items()}


@pytest.mark.parametrize(("keep", "weight"), [(("orchard",), 3.0), (("orchard",), 0.0), ((), 3.0)])
def test_ablation_holds_kept_words_as_the_original_has_them(tiny, monkeypatch, keep, weight: float) -> None:
    terms, prompts = terms_of(monkeypatch, tiny, concept_ablation, keep, weight)
    held = [(KEEP, {KEEP: 1.0}, 3.0, Weights.FROZEN)] if keep and weight else []
    assert terms == [(ERASE, {TO: 1.0}, 1.0, Weights.STUDENT), *held]
    assert prompts.get(KEEP, set()) == set(keep)


# Dark Miner


@pytest.mark.parametrize(("keep", "weight"), [(("orchard",), 3.0), (("orchard",), 0.0), ((), 3.0)])
def test_dark_miner_holds_kept_words_and_the_empty_prompt(tiny, monkeypatch, keep, weight: float) -> None:
    terms, prompts = terms_of(monkeypatch, tiny, dark_miner, keep, weight)
    held = [(key, {key: 1.0}, 3.0, Weights.FROZEN) for key in ((NULL, KEEP) if keep else (NULL,)) if weight]
    assert terms == [("dark", {"anchor": 1.0}, 1.0, Weights.FROZEN), *held]
    assert prompts[NULL] == {""} and prompts.get(KEEP, set()) == set(keep)


def test_dark_miner_searches_by_its_settings_and_erases_its_finds_in_half_of_a_step(tiny, monkeypatch) -> None:
    """At each of its rounds another search; of what was found before and of words is the other half."""
    finds = [torch.full((8, 1, 5, 16), 100.0 * n) for n in (1, 2)]
    mined = []

    def mine(model, latents: Tensor, *_, progress, **settings) -> Found:
        mined.append({"pictures": len(latents), **settings})
        return Found(finds[len(mined) - 1], ())

    monkeypatch.setattr(dark_miner, "mine", mine)
    erased = answers(monkeypatch, dark_miner, regress={})["regress"]
    instead(monkeypatch, lambda trainer: losses(trainer.phases[0]))
    run(dark_miner, tiny, ALONE, rounds=2, mine_steps=150, pictures=16, batch=41, seed=3, seal=False)
    search = {"pictures": 16, "steps": 150, "rate": 0.02, "batch": 41, "population": 8, "seed": 3}
    assert [{k: v for k, v in x.items() if k != "name"} for x in mined] == [search] * 2
    assert mined[0]["name"] != mined[1]["name"]
    read = [x["conds"]["dark"].context[:, 1:].mean((1, 2)).round().int().tolist() for x in erased]
    rounds = [[x if x >= 50 else "word" for x in of_round] for of_round in read]
    assert set(rounds[0]) == {"word"}
    assert rounds[1][:21] == [100] * 21 and set(rounds[1][21:]) == {"word", 100}
    assert rounds[2][:21] == [200] * 21 and set(rounds[2][21:]) == {"word", 100, 200}


def test_dark_miner_verifies_on_what_the_student_draws(tiny, monkeypatch) -> None:
    seen = reads(monkeypatch)
    cond, null = tiny.conditions(["cat", ""])
    with tiny.trainable() as model:
        dark_miner.scores_of(model, [cond], null, lambda z: torch.ones(len(z)), dark_miner.Settings(sample_steps=2))
    assert [x.weights for x in seen] == [Weights.STUDENT] * 2


# DUO


def test_duo_weighs_each_pair_against_the_prior_as_the_papers_settings_say(tiny, monkeypatch) -> None:
    """The members of a pair stay together, and no words are read."""
    asked = answers(monkeypatch, duo, preference_losses={"preference": 2.0, "prior": 3.0})["preference_losses"]
    made = []
    instead(monkeypatch, lambda trainer: made.append(losses(trainer.phases[0])))
    run(duo, tiny, batch=300)
    (x,) = asked
    assert made == [{"preference": 2, "prior": 3}] and (x["beta"], x["prior_weight"]) == (500, pytest.approx(5e6))
    assert torch.equal(x["unsafe"], -x["safe"]) and x["unsafe"].unique().tolist() == [100, 200, 300, 400]
    assert x["noise"].shape == x["unsafe"].shape and [named(tiny, c.context) for c in x["read"]] == [[""]] * 3


@pytest.mark.parametrize(("share", "shared"), [(0.75, True), (0.5, False)])
def test_duo_compares_pairs_at_the_cleaner_times(tiny, monkeypatch, share: float, shared: bool) -> None:
    asked = answers(monkeypatch, duo, preference_losses={})["preference_losses"]
    instead(monkeypatch, lambda trainer: losses(trainer.phases[0]))
    run(duo, tiny, batch=600, latest_time=share, shared_time=shared)
    unsafe, safe = asked[0]["times"]
    assert torch.equal(unsafe, safe) is shared
    for times in (unsafe, safe):
        assert times.min() < 10 and 1000 * share - 10 < times.max() < 1000 * share


def test_duo_comes_to_prefer_the_safe_members(tiny) -> None:
    """In plain squared errors of the network with what was trained: safe members gain on unsafe ones."""
    unsafe, safe = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    settings = duo.Settings(iterations=15, rank=4, base_learning_rate=2e-2, base_prior_weight=10.0, beta=100.0)
    pairs = ConceptPairs(unsafe, safe, (("cat", ""),), tiny.family)
    made = duo.run(tiny, SPEC, settings, quiet, Aids(pairs=pairs))
    net, null = copy.deepcopy(tiny.unet), tiny.conditions([""])[0].context
    for name, delta in made.deltas.items():
        net.get_submodule(name).weight.add_(delta.dense())

    def error(unet, x: Tensor) -> Tensor:
        t = torch.arange(0, 750, 50).repeat(3)
        x = x.repeat_interleave(15, 0)
        noise = torch.randn(x.shape, generator=generator_for(0, "check", 0))
        return (unet(tiny.schedule.add_noise(x, noise, t), t, null.expand(45, -1, -1)) - noise).square().mean()

    assert error(net, safe) - error(tiny.unet, safe) < 0.5 * (error(net, unsafe) - error(tiny.unet, unsafe))
