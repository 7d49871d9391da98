"""Searches against closed forms, textual inversion's gradient against differences, Dark Miner's three functions."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptSpec
from erasure_core.emojicanvas.text import TextConfig, TextEncoder
from erasure_core.methods import Aids, dark_miner, rece
from erasure_core.methods._training import Prompts, Wanted
from erasure_core.operators.changes import FullWeights, Layers
from erasure_core.operators.checkpoint import Checkpoint
from erasure_core.operators.cond import Cond
from erasure_core.operators.memory import Placement, PromptMemory
from erasure_core.operators.search import (
    TokenSlot,
    denoising_loss,
    free,
    mine,
    pseudo_words,
    search,
)
from erasure_core.operators.train_loop import Kind, generator_for
from erasure_core.operators.trainable import TrainableModel, Weights

pytestmark = pytest.mark.core
SPEC = ConceptSpec.parse("bomb", "", "dog")
SMALL = {
    "rounds": 2,
    "population": 2,
    "mine_steps": 4,
    "iterations": 3,
    "rank": 2,
    "batch": 2,
    "mine_rate": 0.05,
    "learning_rate": 1e-3,
    "sample_steps": 3,
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quiet(done: int, total: int) -> None:
    pass


def test_a_search_is_the_optimisers_path() -> None:
    goal, start = normal(2, 3), torch.zeros(2, 3, dtype=torch.float64)
    found = search(start, lambda x, _: (x - goal).square().sum(), steps=7, lr=0.1, kind=Kind.SGD, every=3)
    assert torch.allclose(found.value, goal * (1 - 0.8**7))
    expected = [float(goal.square().sum()) * 0.64**i for i in (0, 3, 6)]
    assert found.losses == pytest.approx(expected)
    assert not start.any() and not found.value.requires_grad, "the start is not changed"


def test_a_search_draws_from_its_own_seed() -> None:
    def run(seed: int) -> Tensor:
        return search(
            torch.zeros(3), lambda x, g: (x - torch.randn(3, generator=g)).square().sum(), steps=3, lr=0.1, seed=seed
        ).value

    torch.manual_seed(1)
    one = run(1)
    torch.manual_seed(2)
    assert torch.equal(one, run(1)) and not torch.equal(one, run(2))


def test_the_gradient_of_a_pseudo_word_goes_through_the_text_encoder() -> None:
    """Against central differences in float64, through the core's own encoder."""
    torch.manual_seed(3)
    encoder = TextEncoder(TextConfig(16, 2, 2)).double().requires_grad_(False)
    ids = torch.tensor([[49406, 320, 1000, 2000, *[49407] * 73]])
    slot = TokenSlot(encoder, ids, [2, 3])
    start = slot.start()
    assert torch.allclose(start, encoder.text_model.embeddings.token_embedding.weight[[1000, 2000]])
    assert torch.allclose(slot.states(start), encoder(ids)), "the words themselves give the prompt's states"
    probe = normal(1, 77, 16, seed=5)

    def value(v: Tensor) -> Tensor:
        return (slot.states(v) * probe).sum()

    v = (start + 0.1 * normal(2, 16, seed=6)).requires_grad_()
    (slope,) = torch.autograd.grad(value(v), v)
    for i, j in ((0, 0), (1, 7), (1, 15)):
        h = torch.zeros(2, 16, dtype=torch.float64)
        h[i, j] = 1e-5
        assert float((value(v + h) - value(v - h)).detach() / 2e-5) == pytest.approx(
            float(slope[i, j]), rel=1e-6, abs=1e-8
        )
    before = slot.states(v)[:, :2]
    assert torch.allclose(before, encoder(ids)[:, :2]), "the encoder is causal"


def test_the_denoising_loss_is_textual_inversions(tiny64) -> None:
    pool, cond = normal(3, 4, 4, 4, seed=1), Cond(normal(1, 6, 16, seed=2))
    with tiny64.trainable() as model:
        made = denoising_loss(model, pool, cond, torch.Generator().manual_seed(6), batch=2)
        g = torch.Generator().manual_seed(6)
        chosen, t = torch.randint(0, 3, (2,), generator=g), torch.randint(0, 1000, (2,), generator=g)
        n = torch.randn(2, 4, 4, 4, generator=g).double()
        betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
        abar = torch.cumprod(1 - betas, 0)[t].view(-1, 1, 1, 1)
        z = abar.sqrt() * pool[chosen] + (1 - abar).sqrt() * n
        error = tiny64.unet(z, t, cond.context.expand(2, -1, -1)) - n
        assert torch.allclose(made, error.square().sum() / error.numel())


def test_against_a_negative_prompt_what_guidance_makes_is_fitted(tiny64) -> None:
    pool, cond, negative = normal(3, 4, 4, 4, seed=1), Cond(normal(1, 6, 16, seed=2)), Cond(normal(1, 6, 16, seed=3))
    with tiny64.trainable() as model:
        states = cond.context.requires_grad_()
        made = denoising_loss(model, pool, cond, torch.Generator().manual_seed(6), batch=2, away=(negative, 4.0))
        g = torch.Generator().manual_seed(6)
        chosen, t = torch.randint(0, 3, (2,), generator=g), torch.randint(0, 1000, (2,), generator=g)
        n = model.noise(2, g)
        z = tiny64.schedule.add_noise(pool[chosen], n, t)
        asked, gone = (tiny64.unet(z, t, c.expand(2, -1, -1)) for c in (states, negative.context))
        expected = (4.0 * asked - 3.0 * gone - n).square().mean()
        assert torch.allclose(made, expected)
        ours, theirs = (torch.autograd.grad(x, states)[0] for x in (made, expected))
        assert torch.allclose(ours, theirs)


def test_a_teacher_takes_the_noises_place(tiny64) -> None:
    pool, cond = normal(3, 4, 4, 4, seed=1), Cond(normal(1, 6, 16, seed=2))
    asked: list[tuple[Tensor, Tensor]] = []

    def teacher(z: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        asked.append((z, t))
        return 3 * z

    with tiny64.trainable() as model:
        made = denoising_loss(model, pool, cond, torch.Generator().manual_seed(6), batch=2, teacher=teacher)
        z, t = asked[0]
        expected = (tiny64.unet(z, t, cond.context.expand(2, -1, -1)) - 3 * z).square().mean()
        assert torch.allclose(made, expected)
        g = torch.Generator().manual_seed(6)
        chosen = torch.randint(0, 3, (2,), generator=g)
        assert torch.equal(t, torch.randint(0, 1000, (2,), generator=g))
        assert torch.equal(z, tiny64.schedule.add_noise(pool[chosen], model.noise(2, g), t)), "the same latents"


def test_a_full_conditioning_and_a_memory_can_be_searched(tiny) -> None:
    """What the student predicts for a hidden conditioning is found again: the loss falls, no weight moves."""
    z, t = torch.randn(4, 4, 4, 4), torch.tensor([100, 300, 500, 700])
    null = tiny.conditions([""])[0]
    with tiny.trainable() as model:
        parameters = model.train(FullWeights(Layers.TEXT))
        with torch.no_grad():
            parameters[0].add_(0.1)
        before = [p.clone() for p in parameters]
        goal = model.reference(z, t, tiny.conditions(["bomb"])[0])
        found = search(
            null.context,
            lambda c, _: (model.predict(z, t, Cond(c)) - goal).square().mean(),
            steps=15,
            lr=0.05,
            every=14,
        )
        assert found.losses[-1] < 0.9 * found.losses[0]
        memory = PromptMemory(4, 16, Placement.ALL, torch.Generator().manual_seed(1), shared=True)

        def with_rows(rows: Tensor, _: torch.Generator) -> Tensor:
            context = torch.cat([null.context, rows[None]], 1)  # what a shared memory in all blocks is
            return (model.predict(z, t, Cond(context), Weights.FROZEN) - goal).square().mean()

        key = search(memory.key, with_rows, steps=15, lr=0.2, every=14)
        assert key.losses[-1] < key.losses[0]
        assert all(torch.equal(a, b) for a, b in zip(before, parameters, strict=True))


def test_verifying_looks_at_pictures_of_the_conditioning(tiny) -> None:
    cond, null = tiny.conditions(["bomb"])[0], tiny.conditions([""])[0]
    settings = dark_miner.Settings(**SMALL, guidance=2.0, looks=3, seed=4)
    seen: list[Tensor] = []

    def look(latents: Tensor) -> Tensor:
        seen.append(latents)
        return torch.tensor([0.1, 0.2, 0.6])

    with tiny.trainable() as model:
        expected = model.denoise_until(
            cond.expand(3), null, guidance=2.0, progress=1.0, steps=3, generator=torch.Generator().manual_seed(4)
        )
        assert dark_miner.scores_of(model, [cond], null, look, settings) == [pytest.approx(0.3)]
    assert torch.equal(seen[0], expected)


def test_many_finds_are_drawn_a_few_at_a_time(tiny) -> None:
    """As many rows as have room, prompts and empty ones, and each find scores what it did."""
    finds, null = tiny.conditions(["bomb", "grenade", "knife"]), tiny.conditions([""])[0]
    settings, seen, scores = dark_miner.Settings(**SMALL, looks=3, seed=4), [], []
    with tiny.trainable() as model:
        model.net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
        for model.rows in (256, 4):
            scores.append(dark_miner.scores_of(model, finds, null, lambda z: z.mean((1, 2, 3)).sigmoid(), settings))
    assert seen == [18] * 3 + [4, 4, 4, 4, 2] * 3
    assert scores[1] == pytest.approx(scores[0], abs=1e-5) and len(set(scores[0])) == 3


def test_a_free_conditioning_keeps_bos(tiny) -> None:
    null = tiny.conditions([""])[0]
    variable = free(null)
    one, two = (variable.start(torch.Generator().manual_seed(i)) for i in (1, 2))
    assert one.shape == (1, 5, 16) and not torch.equal(one, two)
    read = variable.read(one)
    assert torch.equal(read.context[:, :1], null.context[:, :1]) and torch.equal(read.context[:, 1:], one)
    away = (one - null.context[:, 1:]) / null.context[:, 1:].std(-1, keepdim=True)
    assert 0.05 < float(away.std()) < 0.2, "starts lie near the empty prompt"
    assert variable.unit == pytest.approx(float(null.context[:, 1:].std(-1).mean()))


def test_pseudo_words_are_read_through_the_encoder() -> None:
    torch.manual_seed(3)
    encoder = TextEncoder(TextConfig(16, 2, 2)).requires_grad_(False)
    slot = TokenSlot(encoder, torch.tensor([[49406, 320, 1000, 2000, *[49407] * 73]]), [2, 3])
    variable = pseudo_words(slot, Cond(encoder(slot.ids), {"y": torch.ones(1, 3)}))
    start = variable.start(torch.Generator().manual_seed(1))
    assert start.shape == (2, 16) and not torch.equal(start, slot.start())
    read = variable.read(start)
    assert torch.equal(read.context, slot.states(start)) and torch.equal(read.extra["y"], torch.ones(1, 3))


def test_mining_is_adam_on_the_denoising_loss(tiny64) -> None:
    """One step by hand: times from each half of the schedule, the rate in deviations of the start, falling as a cosine."""
    pool, null = normal(3, 4, 4, 4, seed=1), Cond(normal(1, 6, 16, seed=2))
    variable = free(null)
    shown: list[tuple[Tensor, int, float]] = []
    with tiny64.trainable() as model:
        found = mine(model, pool, variable, steps=2, rate=0.1, batch=2, seed=5, name="m",
            seen=lambda *args: shown.append(args))  # fmt: skip
        value = variable.start(generator_for(5, "m", -1))
        lr, mean, square = 0.1 * variable.unit, 0.0, 0.0
        for i in range(2):
            g = generator_for(5, "m", i)
            t = ((torch.arange(2) + torch.rand(2, generator=g)) * 500).long()
            assert t[0] < 500 <= t[1]
            value = value.detach().requires_grad_()
            loss = denoising_loss(model, pool, variable.read(value), g, batch=2, t=t)
            (slope,) = torch.autograd.grad(loss, value)
            mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
            step = (mean / (1 - 0.9 ** (i + 1))) / ((square / (1 - 0.999 ** (i + 1))).sqrt() + 1e-8)
            value = value - lr * (1.0, 0.5)[i] * step
    assert torch.allclose(found.value, value.detach(), atol=1e-10)
    assert [x[1] for x in shown] == [1, 2] and shown[-1][2] == pytest.approx(float(loss.detach()))


def test_circumventing_is_the_papers_loss(tiny64) -> None:
    """Each way at pictures of its own concept, to its own anchor."""
    subjects = [Wanted((), Cond(normal(1, 6, 16, seed=10 + k)), normal(2 + k, 4, 4, 4, seed=20 + k)) for k in (0, 1)]
    settings = dark_miner.Settings(**{**SMALL, "batch": 6, "keep_weight": 0.0})
    pool = [dark_miner.Way(Cond(normal(1, 6, 16, seed=k)), subjects[k % 2]) for k in range(4)]
    prompts = Prompts(tiny64, SPEC)
    with tiny64.trainable() as model:
        model.train(FullWeights(Layers.CROSS))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.1 * normal(*p.shape, seed=i))
        phase = dark_miner.circumvent(model, pool, prompts, settings, 0)
        losses = phase.loss(0, torch.Generator().manual_seed(8))
        g = torch.Generator().manual_seed(8)
        chosen, newest = (torch.randint(0, 4, (6,), generator=g).tolist() for _ in range(2))
        chosen[:3] = newest[:3]  # half of a step is of the last round
        prompts.draw(6, g)
        picked, t = torch.randint(0, 3, (6,), generator=g).tolist(), torch.randint(0, 1000, (6,), generator=g)
        noise, parts = model.noise(6, g), []
        for k, (i, n) in enumerate(zip(chosen, picked, strict=True)):
            own = subjects[i % 2]
            x0 = own.pictures[n % len(own.pictures)][None]
            z = tiny64.schedule.add_noise(x0, noise[k : k + 1], t[k : k + 1])
            student = model.predict(z, t[k : k + 1], pool[i].cond)
            parts.append((student - tiny64.unet(z, t[k : k + 1], own.anchor.context)).square().mean())
        assert {i % 2 for i in chosen} == {0, 1}
        assert set(losses) == {"erase"} and torch.allclose(losses["erase"], torch.stack(parts).mean())


def test_dark_miner_runs_until_nothing_is_found(tiny) -> None:
    def mined(*verdicts: float, **aids) -> dark_miner.Mined:
        left = iter(verdicts)

        def look(latents: Tensor) -> Tensor:
            return torch.full((len(latents),), next(left))

        chosen = Aids(pictures=latents, looks=(look,), **aids)
        return dark_miner.mine_and_erase(tiny, SPEC, dark_miner.Settings(**SMALL, seal=False), quiet, chosen)

    latents = torch.randn(3, 4, 4, 4)
    done = mined(0.9, 0.1)
    assert done.exhausted == (True,) and done.scores == (pytest.approx((0.9, 0.1)),)
    assert done.pool is not None and done.pool.states.shape == (2, 6, 16)
    assert done.pool.scores == pytest.approx((0.9, 0.9)) and done.pool.header.settings["scored by"] == "judge"
    assert all(d.rank == 2 and d.dense().any() for d in done.erasure.deltas.values())
    assert "erased: 2." in done.report() and "0.90, 0.10, so the search found nothing more" in done.report()
    out = mined(0.8, 0.9)
    assert out.pool is not None and out.exhausted == (False,) and len(out.pool) == 4, "the rounds ended first"
    assert "ways back are left" in out.report()
    assert out.pool.scores == pytest.approx((0.9, 0.9, 0.8, 0.8)), "the best come first"
    assert len({found.flatten()[20].item() for found in out.pool.states}) == 4, "each search is another one"
    none = mined(0.1)
    assert none.exhausted == (True,) and none.pool is None and "the words alone were enough" in none.report()
    again = mined(0.9, 0.1)
    assert all(torch.equal(d.dense(), again.erasure.deltas[n].dense()) for n, d in done.erasure.deltas.items())
    more = mined(0.1, dark=(torch.randn(6, 16),))
    assert any(not torch.equal(d.dense(), none.erasure.deltas[n].dense()) for n, d in more.erasure.deltas.items())
    told: list = []
    blind = Aids(found=lambda *x: told.append(x))
    dark_miner.run(tiny, SPEC, dark_miner.Settings(**SMALL, pictures=2), quiet, blind)
    ((pool, report),) = told
    assert len(pool) == 4 and "no judge looked" in report, "nobody looks: every round is made"
    assert pool.header.settings["scored by"] == "nobody"
    assert tiny.untouched()


def test_of_several_concepts_each_has_its_round(tiny, monkeypatch) -> None:
    """Its own pictures, which lead to its own replacement, its own judge, and its own part in what comes out."""
    spec = ConceptSpec.parse("bomb, grenade\nrose", "dog\ntulip")
    ways: list[list[dark_miner.Way]] = []
    mined_from: list[Tensor] = []
    circumvent, mine_ = dark_miner.circumvent, dark_miner.mine
    monkeypatch.setattr(
        dark_miner, "circumvent", lambda model, pool, *x: ways.append([*pool]) or circumvent(model, pool, *x)
    )
    monkeypatch.setattr(dark_miner, "mine", lambda model, z, *x, **y: mined_from.append(z) or mine_(model, z, *x, **y))
    looked: list[int] = []
    given = torch.randn(3, 4, 4, 4)
    aids = Aids(pictures=given, looks=(lambda z: looked.append(len(z)) or torch.full((len(z),), 0.9),))
    settings = dark_miner.Settings(**{**SMALL, "rounds": 2, "pictures": 2})
    out = dark_miner.mine_and_erase(tiny, spec, settings, quiet, aids)
    dog, tulip = (tiny.conditions([word])[0].context for word in ("dog", "tulip"))
    anchors = [[torch.equal(w.concept.anchor.context, dog) for w in pool] for pool in ways]
    words = [True, True, False]
    assert anchors == [
        words,
        [*words, True, True],
        [*words, True, True, False, False],
        [*words, *[True, True, False, False, True, True]],
        [*words, *[True, True, False, False, True, True, False, False]],
    ]
    assert all(
        torch.equal(w.concept.anchor.context, tulip) for w in ways[-1] if not torch.equal(w.concept.anchor.context, dog)
    )
    assert torch.equal(mined_from[0], given) and torch.equal(mined_from[2], given) and len(mined_from[1]) == 2
    assert [len(scores) for scores in out.scores] == [2, 0] and len(looked) == 2, "the second has no judge"
    assert out.pool is not None and out.pool.owners == (0, 0, 0, 0, 1, 1, 1, 1)
    assert all(math.isnan(score) == bool(owner) for score, owner in zip(out.pool.scores, out.pool.owners, strict=True))
    assert out.report().splitlines()[1:] == [
        "- bomb: The best find of each round scored 0.90, 0.90, but the rounds ended: ways back are left.",
        "- rose: no judge looked, so every round was made.",
    ]
    assert (
        "8 dark embeddings for bomb (4), rose (4)" in out.pool.summary()
        and "5: nobody looked (rose)" in out.pool.summary()
    )


def test_a_concept_may_be_done_before_the_others(tiny, tmp_path, monkeypatch) -> None:
    """Its rounds end when nothing is found any more, and those of the others go on, cut off or not."""
    spec = ConceptSpec.parse("bomb, grenade\nrose", "dog\ntulip")
    pools: list[list[bool]] = []
    dog = tiny.conditions(["dog"])[0].context
    circumvent = dark_miner.circumvent

    def noted(model, pool, *x):
        pools.append([torch.equal(w.concept.anchor.context, dog) for w in pool])
        return circumvent(model, pool, *x)

    monkeypatch.setattr(dark_miner, "circumvent", noted)
    settings = dark_miner.Settings(**{**SMALL, "rounds": 3, "pictures": 2})

    def mined(progress=quiet, **aids) -> dark_miner.Mined:
        looks = [lambda z, p=p: torch.full((len(z),), p) for p in (0.1, 0.9)]
        chosen = Aids(looks=tuple(looks), **aids)
        return dark_miner.mine_and_erase(tiny, spec, settings, progress, chosen)

    class Stop(Exception):
        pass

    def stopping(done: int, total: int) -> None:
        assert total == 7
        if done == 4:
            raise Stop

    whole = mined()
    words = [True, True, False]
    assert pools == [words, [*words, *[False] * 2], [*words, *[False] * 4], [*words, *[False] * 6]]
    assert (
        whole.exhausted == (True, False)
        and whole.scores == (pytest.approx((0.1,)), pytest.approx((0.9, 0.9, 0.9)))
        and whole.found == 6
    )
    assert "- bomb: nothing was found, the best scored 0.10: the words alone were enough." in whole.report()
    with pytest.raises(Stop):
        mined(stopping, checkpoint=Checkpoint(tmp_path / "state.safetensors", seconds=0.0))
    pools.clear()
    rest = mined(checkpoint=Checkpoint(tmp_path / "state.safetensors", seconds=0.0))
    assert pools == [[*words, *[False] * 4], [*words, *[False] * 6]], "the rounds that were left"
    assert rest.report() == whole.report() and rest.pool is not None and whole.pool is not None
    assert (rest.pool.owners, rest.pool.scores) == (whole.pool.owners, whole.pool.scores) and set(
        whole.pool.owners
    ) == {1}
    assert all(torch.equal(d.dense(), rest.erasure.deltas[n].dense()) for n, d in whole.erasure.deltas.items())


def test_ways_of_a_concept_with_few_are_trained_as_often(tiny, monkeypatch) -> None:
    """Beside twelve embeddings of another."""
    spec = ConceptSpec.parse("bomb\nrose", "dog\ntulip")
    shown: list[Tensor] = []
    monkeypatch.setattr(
        dark_miner,
        "regress",
        lambda model, terms, z, t, conds: shown.append(conds["anchor"].context) or {"erase": z.sum() * 0},
    )
    phases = []
    monkeypatch.setattr(dark_miner.Trainer, "run", lambda self, *_, **__: phases.append(self.phases[0]))
    dark = tuple(torch.randn(6, 16) for _ in range(12))
    settings = dark_miner.Settings(**{**SMALL, "rounds": 1, "batch": 40})
    monkeypatch.setattr(dark_miner, "mine", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        dark_miner.mine_and_erase(tiny, spec, settings, quiet, Aids(dark=dark, owners=(1,) * 12))
    for i in range(10):
        phases[0].loss(i, torch.Generator().manual_seed(i))
    dog = tiny.conditions(["dog"])[0].context[0]
    mine_ = sum(torch.equal(x, dog) for x in torch.cat(shown))
    assert mine_ == pytest.approx(200, abs=40)


def test_dark_miner_searches_words_where_an_encoder_reads_them(tiny) -> None:
    encoder = TextEncoder(TextConfig(16, 2, 2)).requires_grad_(False)
    read: list[Tensor] = []

    class Slot(TokenSlot):
        def states(self, vectors: Tensor) -> Tensor:
            read.append(super().states(vectors))
            return read[-1]

    def slot(count: int) -> TokenSlot:
        return Slot(encoder, torch.tensor([[49406, 320, 1000, 2000, 49407, 49407]]), range(1, 1 + count))

    settings = dark_miner.Settings(**SMALL, form=dark_miner.Form.WORDS, words=3)
    aids = Aids(pictures=torch.randn(3, 4, 4, 4), slot=slot)
    pool = dark_miner.mine_and_erase(tiny, SPEC, settings, quiet, aids).pool
    assert pool is not None and len(pool) == 4
    assert all(any(torch.equal(states, x[0]) for x in read) for states in pool.states), (
        "what the encoder makes of words"
    )
    with pytest.raises(ValueError, match=r"form: .* Choose free"):
        dark_miner.mine_and_erase(tiny, SPEC, settings, quiet, Aids(pictures=torch.randn(3, 4, 4, 4)))


def test_dark_miner_ends_by_solving_for_the_words_on_what_training_left(tiny64, monkeypatch) -> None:
    aids = Aids(pictures=torch.randn(3, 4, 4, 4, dtype=torch.float64), looks=(lambda z: torch.full((len(z),), 0.1),))
    trained, whole = (
        dark_miner.mine_and_erase(tiny64, SPEC, dark_miner.Settings(**SMALL, seal=seal), quiet, aids).erasure
        for seal in (False, True)
    )
    plain = type(tiny64).weight
    change = {name: d.dense() for name, d in trained.deltas.items()}
    monkeypatch.setattr(
        type(tiny64),
        "weight",
        lambda self, site: plain(self, site) + change.get(site.name, torch.zeros(())).to(torch.float64),
    )
    solved = rece.run(tiny64, SPEC, rece.Settings(), quiet, Aids())
    assert whole.header.method == "dark_miner" and solved.deltas.keys() <= whole.deltas.keys()
    for name, delta in whole.deltas.items():
        expected = change.get(name, 0.0) + (solved.deltas[name].dense() if name in solved.deltas else 0.0)
        assert torch.allclose(delta.dense().double(), torch.as_tensor(expected).double(), atol=1e-5), name


def test_a_step_of_a_search_brings_nothing_to_the_device_that_it_waits_for(tiny, waits) -> None:
    """On the meta device; the first step may set things up."""
    model = TrainableModel(copy.deepcopy(tiny.unet).to("meta"), tiny.schedule, tiny.prediction, (4, 4, 4))
    encoder = TextEncoder(TextConfig(16, 2, 2)).requires_grad_(False).to("meta")
    ids = torch.tensor([[49406, 320, 1000, 2000, *[49407] * 73]], device="meta")
    slot, latents = TokenSlot(encoder, ids, [2, 3]), normal(3, 4, 4, 4)  # the pool may stay on the host

    def objective(vectors: Tensor, generator: torch.Generator) -> Tensor:
        return denoising_loss(model, latents, Cond(slot.states(vectors)), generator, batch=2)

    class Ended(Exception):
        pass

    def progress(done: int, steps: int) -> None:
        waits.on = done > 0
        if done == steps - 1:
            raise Ended

    with waits, pytest.raises(Ended):
        search(slot.start(), objective, steps=4, lr=0.1, progress=progress)
    assert waits.seen == 0
