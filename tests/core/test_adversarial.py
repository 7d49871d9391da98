"""Adversarial erasing: its three losses against passes of the plain network, and who attacks what, and when."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure_core.methods import adversarial
from erasure_core.methods._adversaries import Adversaries
from erasure_core.methods._training import ERASE, TO, Wanted
from erasure_core.methods._training import NULL as EMPTY
from erasure_core.methods._views import Source, fresh, once
from erasure_core.methods.adversarial import Settings
from erasure_core.operators.changes import FullWeights
from erasure_core.operators.cond import Cond
from erasure_core.operators.trainable import TrainableModel

pytestmark = pytest.mark.core
NULL = 0.01


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def concept(seed: int) -> Wanted:
    """Two words, an anchor and a picture of its own."""
    words = [Cond(normal(1, 6, 16, seed=seed + i)) for i in (0, 1)]
    return Wanted(words, Cond(normal(1, 6, 16, seed=seed + 2)), normal(1, 4, 4, 4, seed=seed + 3))


@pytest.fixture
def null() -> Cond:
    return Cond(NULL * normal(1, 6, 16, seed=99))


@pytest.fixture
def model(tiny64) -> Iterator[TrainableModel]:
    with tiny64.trainable() as model:
        model.train(FullWeights())
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.1 * normal(*p.shape, seed=i))
        yield model


@pytest.fixture
def passes(model: TrainableModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor, Tensor, Tensor, Tensor]]:
    """(whose, z, t, states, prediction) of every pass from now on."""
    seen: list[Any] = []
    plain = model.predict

    def predict(z: Tensor, t: Tensor, cond: Cond, *args: Any, **kwargs: Any) -> Tensor:
        out = plain(z, t, cond, *args, **kwargs)
        whose = "student" if out.requires_grad or not args else str(args[0])
        seen.append((whose, z, t, cond.expand(len(z)).context, out))
        return out

    monkeypatch.setattr(model, "predict", predict)
    return seen


def asking(model: TrainableModel, null: Cond, settings: Settings) -> Source:
    return fresh(model, null, lambda where: adversarial.times(model, settings, where))


def population(null: Cond, concepts: list[Wanted], population: int, life: int = 160, batch: int = 8) -> Adversaries:
    like = torch.zeros(1, dtype=torch.float64)
    return Adversaries(concepts, null, population=population, life=life, batch=batch, seed=0, like=like)


def shares(prediction: Tensor, target: Tensor, signal: Tensor) -> Tensor:
    """The mean over pictures of squares relative to each one's signal, times the mean signal; written as a loop."""
    size = [float(x.square().mean()) for x in signal]
    parts = [(a - b).square().mean() / s for a, b, s in zip(prediction, target, size, strict=True)]
    return torch.stack(parts).mean() * (sum(size) / len(size))


@pytest.mark.parametrize("each", [1, 2])
def test_each_embedding_is_drawn_to_what_the_original_sees_in_its_own_concept(
    tiny64, model, passes, null, each: int
) -> None:
    concepts = [concept(0), concept(10)]
    adversaries = population(null, concepts, population=4, batch=4 * each)
    settings = Settings(least_noise=0.5, batch=4 * each)
    loss = adversarial.attack_loss(
        model, adversaries, asking(model, null, settings), settings, 0, torch.Generator().manual_seed(3)
    )
    (frozen, _, _, both, target), (student, z, t, reads, _) = passes
    words, empty = both.split(4 * each)
    assert (frozen, student) == ("frozen", "student") and torch.equal(empty, null.context.expand(4 * each, -1, -1))
    places = sorted(((t - 500) * 4 * each // 500).tolist())
    assert places == list(range(4 * each)), "one time from every part of what is trained"
    for k in range(4 * each):
        number = k // each
        own = concepts[number % 2]
        assert any(torch.equal(words[k], word.context[0]) for word in own.words)
        signal, noise = (
            tiny64.schedule.add_noise(x, 1 - x, t[k : k + 1]) for x in torch.eye(2)[:, :, None, None, None]
        )
        rest = (z[k] - signal.flatten()[0] * own.pictures[0]) / noise.flatten()[0]
        assert 0.3 < float(rest.std()) < 2, "what is left of the latent is noise"
        assert torch.equal(reads[k, 1:], adversaries.now[number].detach()) and torch.equal(
            reads[k, :1], null.context[0, :1]
        )
    plain = [tiny64.unet(z, t, states) for states in (words, empty)]
    assert torch.allclose(target, torch.cat(plain))
    assert torch.allclose(loss, 4 * shares(model.predict(z, t, Cond(reads)), plain[0], plain[0] - plain[1]))
    slope = torch.autograd.grad(loss, [*adversaries.now, adversaries.former], allow_unused=True)
    assert all(x is not None for x in slope[:4]) and slope[4] is None, "former ones are not searched on"


def test_more_embeddings_than_pictures_take_turns_in_the_loss(model, null) -> None:
    adversaries = population(null, [concept(0), concept(10)], population=4, batch=2)
    for i, turn in ((0, [0, 1]), (1, [2, 3]), (2, [0, 1])):
        generator = torch.Generator().manual_seed(3)
        loss = adversarial.attack_loss(
            model, adversaries, asking(model, null, Settings(batch=2)), Settings(batch=2), i, generator
        )
        slopes = torch.autograd.grad(loss, adversaries.now, allow_unused=True)
        assert [k for k, slope in enumerate(slopes) if slope is not None] == turn
    one, two = (population(null, [concept(0)], population=n, batch=2) for n in (1, 2))
    losses = []
    for adversaries in (one, two):
        with torch.no_grad():
            for embedding in adversaries.now:
                embedding.copy_(one.now[0])
        generator = torch.Generator().manual_seed(3)
        losses.append(
            adversarial.attack_loss(
                model, adversaries, asking(model, null, Settings(batch=2)), Settings(batch=2), 0, generator
            )
        )
    assert losses[1] > 1.2 * losses[0], "the sum over those that attack, not their mean"


def test_what_is_erased_goes_to_its_own_replacement_or_beyond(tiny64, model, passes, null) -> None:
    concepts = [concept(0), concept(10)]
    adversaries, settings = population(null, concepts, population=2), Settings(negative_guidance=0.7, batch=16)
    loss = adversarial.erase_loss(
        model, adversaries, asking(model, null, settings), settings, 0, torch.Generator().manual_seed(3)
    )
    (_, _, _, aims, _), (_, z, t, reads, student) = passes
    to, empty, word = aims.split(16)
    plain = [tiny64.unet(z, t, states) for states in (to, word, empty)]
    assert torch.allclose(loss, shares(student, plain[0] - 0.7 * (plain[1] - plain[2]), plain[1] - plain[2]))
    assert t.min() >= 400 and t.max() > 850
    assert torch.autograd.grad(loss, adversaries.now, allow_unused=True) == (None, None), (
        "embeddings are only read here"
    )
    for k in range(16):
        (n,) = [n for n, c in enumerate(concepts) if torch.equal(c.anchor.context[0], to[k])]
        words = [w.context[0] for w in concepts[n].words]
        searching = adversaries.read(adversaries.now[n].detach()[None]).context[0]
        assert any(torch.equal(word[k], x) for x in words) and torch.equal(empty[k], null.context[0])
        assert any(torch.equal(reads[k], x) for x in [*words, searching])


@pytest.mark.parametrize("batch", [8, 1])
def test_kept_words_are_held_at_pictures_of_their_own(model, passes, null, monkeypatch, batch: int) -> None:
    """In eight pictures of one step, or of eight steps of one."""
    monkeypatch.setattr(type(model.schedule), "add_noise", lambda _, x0, noise, t: x0)
    words = [Cond(normal(1, 6, 16, seed=i)) for i in range(3)]
    others = torch.arange(6, dtype=torch.float64)[:, None, None, None].expand(
        6, 4, 4, 4
    )  # picture k shows word k mod 3
    shown = concept(0)
    for i in range(8 // batch):
        part = adversarial.held(
            model, others, words, [shown], null, i * batch, batch, torch.Generator().manual_seed(3 + i)
        )
        loss = adversarial.keep_loss(model, *part.at(0, batch))
        (_, z, _, again, original), (_, _, _, reads, student) = passes[2 * i : 2 * i + 2]
        assert torch.equal(reads, again) and torch.allclose(loss, (student - original).square().mean())
    z, reads = (torch.cat([seen[k] for seen in passes[::2]]) for k in (1, 3))
    at_concept = [bool(torch.equal(x, shown.pictures[0])) for x in z]
    empty = [bool(torch.equal(states, null.context[0])) for states in reads]
    assert at_concept == [k in (0, 2) for k in range(8)] and empty == [k in (0, 1) for k in range(8)]
    for k in range(3, 8):
        assert torch.equal(reads[k], words[int(z[k, 0, 0, 0]) % 3].context[0])


def test_what_is_asked_once_is_what_the_original_sees(tiny64, model, passes, null) -> None:
    """At places that are spread evenly, of each concept's own pictures and words, and never asked again."""
    concepts, settings = [concept(0), concept(10)], Settings(least_noise=0.5)
    ticks: list[int] = []
    generator = torch.Generator().manual_seed(1)
    source = once(asking(model, null, settings), concepts, 16, generator, lambda: ticks.append(0))
    assert len(passes) == len(ticks) == 4 and {p[0] for p in passes} == {"frozen"}
    passes.clear()
    where = torch.tensor([0.03, 0.5, 1.0, 0.5])  # a place next to 1 may be rounded up to it
    owners = [concepts[n] for n in (0, 1, 1, 0)]
    views = source(owners, where, (ERASE,), torch.Generator())
    assert not passes and torch.equal(source(owners, where, (TO,), generator).z, views.z)
    assert ((views.t - 500) * 16 // 500).tolist() == [0, 8, 15, 8] and not torch.equal(views.z[1], views.z[3])
    for k, own in enumerate(owners):
        z, t = views.z[k : k + 1], views.t[k : k + 1]
        for name, states in ((TO, own.anchor.context), (EMPTY, null.context)):
            assert torch.allclose(views.seen[name][k : k + 1], tiny64.unet(z, t, states))
        words = [tiny64.unet(z, t, word.context) for word in own.words]
        assert any(torch.allclose(views.seen[ERASE][k : k + 1], x) for x in words)


def test_held_views_go_round(model, null) -> None:
    words, others = [Cond(normal(1, 6, 16, seed=i)) for i in range(3)], normal(6, 4, 4, 4, seed=5)
    part = adversarial.held(model, others, words, [concept(0)], null, 0, 8, torch.Generator().manual_seed(3))
    views, reads = part.at(6, 4)
    rows = torch.tensor([6, 7, 0, 1])
    assert torch.equal(views.z, part.views.z[rows]) and torch.equal(views.t, part.views.t[rows])
    assert torch.equal(reads.context, Cond.cat([part.reads[n] for n in rows.tolist()]).context)


def test_one_at_a_time_retires_to_the_store_and_starts_anew(null) -> None:
    adversaries = population(null, [concept(0), concept(10)], population=4, life=8)
    before = torch.stack(adversaries.now).detach().clone()
    for i in range(2 * 16 + 1):
        was = torch.stack(adversaries.now).detach().clone()
        adversaries.retire(i, torch.Generator().manual_seed(i))
        changed = [k for k in range(4) if not torch.equal(adversaries.now[k], was[k])]
        turn = i // 2
        assert changed == ([turn % 4] if i and i % 2 == 0 else [])
        if changed:
            assert torch.equal(adversaries.former[turn % 16], was[turn % 4]), "the store holds it as it was found"
    assert not any(torch.equal(adversaries.now[k], before[k]) for k in range(4))
    assert adversaries.concept(5) is adversaries.concepts[1] and adversaries.concept(14) is adversaries.concepts[0]


def test_only_what_has_retired_is_taken_from_the_store(null) -> None:
    adversaries = population(null, [concept(0)], population=2, life=2)
    with torch.no_grad():
        for embedding in adversaries.now:
            embedding.fill_(1)
        adversaries.former.copy_(torch.arange(8, dtype=torch.float64)[:, None, None] + 10)

    def kinds(i: int) -> list[float]:
        drawn = adversaries.draw(400, i, torch.Generator().manual_seed(1))
        return [float(c.context[0, 1, 0]) for _, c in drawn]

    words = {float(w.context[0, 1, 0]) for w in adversaries.concepts[0].words}
    assert set(kinds(0)) == {1.0} | words
    assert set(kinds(3)) == {1.0, 11, 12, 13} | words
    late = kinds(100)
    assert set(late) == {1.0, *range(10, 18)} | words
    assert late.count(1.0) == pytest.approx(220, abs=30) and sum(x in words for x in late) == pytest.approx(80, abs=25)


@pytest.mark.parametrize(("concepts", "members", "batch"), [(1, 4, 8), (3, 6, 8), (2, 4, 6), (5, 5, 2), (8, 8, 8)])
def test_every_concept_has_as_many_embeddings_and_nearly_as_many_pictures(
    null, concepts: int, members: int, batch: int
) -> None:
    adversaries = population(null, [concept(10 * k) for k in range(concepts)], population=4, batch=batch)
    assert adversaries.count == members
    owners = [[c is adversaries.concept(k) for c in adversaries.concepts].index(True) for k in range(members)]
    assert sorted(owners) == sorted(list(range(concepts)) * (members // concepts))
    steps = [adversaries.places(i) for i in range(members)]
    assert all(len(places) == batch and places == sorted(places) for places in steps)
    assert all(len(set(places)) == min(batch, members) for places in steps), "as many of them as there are pictures"
    met = [sum(places.count(k) for places in steps) for k in range(members)]
    assert met == [batch] * members if batch < members else max(met) - min(met) <= members


def test_whoever_waits_neither_moves_nor_ages(null) -> None:
    """Of six that share two pictures, each step moves two, and one retires once it has attacked ``life`` times."""
    adversaries = population(null, [concept(10 * k) for k in range(3)], population=6, life=4, batch=2)
    optimiser, attacks, lives = torch.optim.Adam(adversaries.now, 0.1), [0] * 6, []

    def changed(act: Callable[[], object]) -> list[int]:
        was = torch.stack(adversaries.now).detach()
        act()
        return [k for k in range(6) if not torch.equal(adversaries.now[k], was[k])]

    def attack(members: list[int]) -> None:
        optimiser.zero_grad()
        torch.stack([adversaries.now[k] for k in members]).square().sum().backward()
        optimiser.step()

    for i in range(36):
        for k in changed(lambda i=i: adversaries.retire(i, torch.Generator().manual_seed(i))):
            lives.append(attacks[k])
            attacks[k] = 0
        members = adversaries.places(i)
        assert changed(lambda members=members: attack(members)) == members and len(members) == 2
        for k in members:
            attacks[k] += 1
    assert lives[6:] == [4] * (len(lives) - 6) and len(lives) == 17


def test_against_weights_that_stand_still_embeddings_find_the_way(tiny64, null) -> None:
    """With the original's own weights the least of the attack's loss is zero: at the concept's word."""
    own = Wanted([Cond(normal(1, 6, 16, seed=1))], null, normal(1, 4, 4, 4, seed=2))
    adversaries = population(null, [own], population=2)
    with tiny64.trainable() as model:
        model.train(FullWeights())

        def loss(seed: int) -> Tensor:
            return adversarial.attack_loss(
                model,
                adversaries,
                asking(model, null, Settings()),
                Settings(),
                seed,
                torch.Generator().manual_seed(seed),
            )

        def distance() -> float:
            """At times and noises that no step has seen."""
            return sum(float(loss(1000 + i).detach()) for i in range(10))

        before, optimiser = distance(), torch.optim.Adam(adversaries.now, 0.05)
        for i in range(120):
            optimiser.zero_grad()
            loss(i).backward()
            optimiser.step()
        assert distance() < 0.5 * before
