"""Pictures of attacks: sampling from anywhere and backwards, what is drawn, shared, counted and handed over."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from attack_targets import SPEC, normal, quiet, target_of
from torch import Tensor

from erasure_core.attacks import (
    AttackTarget,
    Found,
    Sampler,
    Way,
    asking,
    evaluate,
    p4d,
    reentry,
    relearning,
    success,
    tina,
)
from erasure_core.attacks import unlearn_diff_atk as uda
from erasure_core.attacks.drawing import Eye, Seen, draw, invert, noises, pictures_of, pictures_of_each
from erasure_core.operators.cond import Cond
from erasure_core.operators.trainable import TrainableModel

pytestmark = pytest.mark.core


@pytest.mark.parametrize("flow", [False, True], ids=["eps", "flow"])
def test_inversion_and_sampling_are_a_round_trip(tiny64, tiny_flow, flow: bool) -> None:
    port = tiny_flow if flow else tiny64
    null = port.conditions([""])[0]
    with port.trainable() as model:
        noise = normal(2, 4, 4, 4, seed=3)
        shown = draw(model, null, null, noise, Sampler(6, 1.0))
        errors = []
        for refine in (0, 4, 60):
            found = invert(model, null, shown, 6, refine=refine)
            again = draw(model, null, null, found, Sampler(6, 1.0))
            errors.append(float((again - shown).norm() / shown.norm()))
    assert errors[2] < 1e-5 and errors[2] < errors[1] < errors[0]


def test_inversion_of_a_network_that_ignores_the_latent_is_exact_at_once(tiny64) -> None:
    with tiny64.trainable() as model:
        model.predict = lambda z, t, cond, *_a, **_k: normal(1, 4, 4, 4, seed=int(t[0])).expand(len(z), -1, -1, -1)
        shown = normal(2, 4, 4, 4, seed=3)
        cond = Cond(normal(1, 6, 16))
        found = invert(model, cond, shown, 5)
        assert torch.allclose(draw(model, cond, cond, found, Sampler(5, 1.0)), shown)


def test_a_start_from_a_picture_is_sdedit(tiny64) -> None:
    cond, null = tiny64.conditions(["cat"])[0], tiny64.conditions([""])[0]
    picture, noise = normal(2, 4, 4, 4, seed=1), normal(2, 4, 4, 4, seed=2)
    with tiny64.trainable() as model:
        made = draw(model, cond, null, noise, Sampler(4, 2.0), picture=picture, strength=0.5)
        stops = model.schedule.trajectory(4)[2:]
        z = model.schedule.add_noise(picture, noise, torch.tensor([stops[0]] * 2))
        for at, to in pairwise(stops):
            t = torch.tensor([at] * 2)
            e, e0 = (model.predict(z, t, c) for c in (cond, null))
            z = model.schedule.step(e0 + 2 * (e - e0), z, at, to, model.space)
        assert torch.allclose(made, z)
        mask = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
        mask[..., 2:, :] = 1
        painted = draw(model, cond, null, noise, Sampler(4, 2.0), picture=picture, mask=mask)
        assert torch.equal(painted[:, :, :2], picture[:, :, :2]) and not torch.allclose(
            painted[:, :, 2:], picture[:, :, 2:]
        )
        whole = draw(model, cond, null, noise, Sampler(4, 2.0), picture=picture, mask=torch.ones_like(mask))
        start = model.schedule.add_noise(picture, noise, torch.tensor([model.schedule.trajectory(4)[0]] * 2))
        assert not torch.allclose(whole, painted) and torch.isfinite(start).all()


def test_reentry_has_each_strength_and_the_mask(typing) -> None:
    found = reentry.run(target_of(typing), SPEC, reentry.Settings(pictures=2, strengths=3, masked=0.5), quiet)
    assert [way.strength for way in found.ways[:3]] == pytest.approx([0.6, 0.75, 0.9])
    assert len(found.ways) == 8 and found.ways[3].mask is not None
    assert found.ways[3].mask[0].tolist() == [[0.0] * 4] * 2 + [[1.0] * 4] * 2
    assert [way.prompt for way in found.ways[::4]] == ["a cat", "one kitty here"]


def test_tina_gives_the_pictures_back(typing) -> None:
    given = normal(3, 4, 4, 4, seed=1)
    target = target_of(typing, torch.float64, pictures=given, sampler=Sampler(20, 2.0, 2))
    found = tina.run(target, SPEC, tina.Settings(pictures=3, refine=50), quiet)
    result = evaluate(target, found, lambda z: torch.ones(len(z)))
    assert torch.allclose(result.latents, given, atol=1e-5)


def test_tina_gives_them_back_against_a_negative_prompt_too(typing, monkeypatch) -> None:
    """As the sampler draws the empty prompt then: guided away from the negative one. Inverting a network that does not look at
    the latent is exact at once."""

    def said(cond: Cond, at: int) -> Tensor:
        return cond.context[..., :5].mean((1, 2)).view(-1, 1, 1, 1) * normal(1, 4, 4, 4, seed=at)

    monkeypatch.setattr(TrainableModel, "predict", lambda self, z, t, cond, *_, **__: said(cond, int(t[0])) + 0 * z)
    given = normal(3, 4, 4, 4, seed=1)
    target = target_of(typing, torch.float64, negative="dog", pictures=given, sampler=Sampler(6, 2.0, 4))
    found = tina.run(target, SPEC, tina.Settings(pictures=3, refine=0), quiet)
    (null, dog), z = target.erased.conditions(["", "dog"]), torch.stack([way.noise for way in found.ways])
    with target.erased.trainable() as model:
        for at, to in pairwise(model.schedule.trajectory(6)):
            z = model.schedule.step(2 * said(null, at) - said(dog, at) + 0 * z, z, at, to, model.space)
    assert torch.allclose(z, given)
    assert torch.allclose(evaluate(target, found, lambda z: torch.ones(len(z))).latents, given)


def test_evaluation_has_noises_of_its_own(typing) -> None:
    target = target_of(typing)
    with target.erased.trainable() as model:
        one, two = (noises(model, 0, name, range(3)) for name in ("evaluate", "p4d look 0"))
        assert not torch.isclose(one, two).any() and torch.equal(one[1:], noises(model, 0, "evaluate", [1, 2]))
    states = target.erased.conditions(["a dog"])[0].context[0]
    found = Found((Way("text", "a dog"), Way("states", states=states)))
    result = evaluate(target, found, lambda z: torch.zeros(len(z)), pictures=2)
    assert torch.allclose(result.latents[:2], result.latents[2:], atol=1e-3), "the same noise for every way"


def test_pictures_are_sampled_side_by_side_and_stay_what_they_are(typing) -> None:
    """Ways of every kind: a batch holds only those that are sampled alike, and each keeps its noise, start and mask."""
    shown, mask = normal(6, 4, 4, 4, seed=3), torch.zeros(1, 4, 4, dtype=torch.float64)
    mask[:, 2:] = 1
    port = typing(torch.float64)
    states = [c.context[0] for c in port.conditions(["a dog", "one tree"])]
    ways = [Way(f"strength {s}", "a cat", picture=shown[i], strength=s) for i in (0, 1) for s in (0.5, 1.0)]
    ways += [Way("mask", "a dog", picture=shown[2], mask=mask), Way("other mask", picture=shown[3], mask=1 - mask)]
    ways += [Way(f"noise {i}", noise=shown[i], guidance=1.0) for i in range(5)]
    ways += [Way("text", "a cat"), *(Way("states", states=x) for x in states), Way("guidance", "a cat", guidance=3.0)]
    results, passes = [], []
    for batch in (1, 4):
        target = target_of(typing, torch.float64, sampler=Sampler(4, 2.0, batch))
        results.append(evaluate(target, Found(tuple(ways)), lambda z: z.mean((1, 2, 3)), pictures=3, seed=7))
        passes.append(target.erased.passes[0])
    one, many = results
    assert torch.allclose(one.latents, many.latents, atol=1e-5) and passes[1] < passes[0] / 2
    assert [len(p) for p in many.probabilities] == [1 if way.noise is not None else 3 for way in ways]
    assert torch.allclose(torch.cat(many.probabilities), many.latents.mean((1, 2, 3)).float()), "each way's own"


def test_harmless_pictures_are_drawn_side_by_side(typing) -> None:
    settings, made, passes = relearning.Settings(captions=2, pictures=3), [], []
    for batch in (1, 4):
        target = target_of(typing, torch.float64, sampler=Sampler(4, 2.0, batch))
        made.append(relearning.dataset(target, SPEC, settings, quiet))
        passes.append(target.base.passes[0])
    assert passes == [6 * 4, 2 * 4]
    null, *conds = target.base.conditions(["", "dog", "tree"])
    with target.base.trainable() as model:
        for i, cond in enumerate(conds):
            alone = draw(model, cond.expand(3), null, noises(model, 0, f"benign {i}", range(3)), target.sampler)
            assert torch.allclose(made[1][i][1], alone, atol=1e-5), "each caption's own pictures"
    for one, many in zip(*made, strict=True):
        assert one[0] == many[0] and one[1].shape == (3, 4, 4, 4) and torch.allclose(one[1], many[1], atol=1e-5)


def test_pictures_that_are_given_are_dealt_out(typing) -> None:
    target = target_of(typing, pictures=normal(3, 4, 4, 4))
    (cat,), (kitty,) = pictures_of_each(target, target.prompts, 1, 0, "x", quiet)
    assert torch.equal(cat, target.pictures[0]) and torch.equal(kitty, target.pictures[1])
    more = pictures_of_each(target, target.prompts, 2, 0, "x", quiet)
    assert torch.equal(torch.cat(more), target.pictures[[0, 1, 2, 0]])


def test_a_picture_that_is_given_is_counted_once(typing) -> None:
    """The same start twice would be one observation counted as two."""
    target = target_of(typing, pictures=normal(2, 4, 4, 4))
    assert len(tina.run(target, SPEC, tina.Settings(pictures=5, refine=0), quiet).ways) == 2
    assert len(reentry.run(target, SPEC, reentry.Settings(pictures=5, strengths=3), quiet).ways) == 2 * (3 + 1)


def test_one_find_for_several_prompts_is_not_counted_for_each(typing) -> None:
    target = target_of(typing)
    asked = evaluate(target, asking(target), lambda z: torch.zeros(len(z)), pictures=2)
    shown = lambda z: torch.ones(len(z))  # noqa: E731
    of_each = [Way(p, p, attacks=(p,)) for p in target.prompts]
    made = success(asked, evaluate(target, Found(tuple(of_each)), shown, pictures=1))
    assert made is not None and (made.pre.hits, made.post.hits, made.post.n) == (0, 2, 2)
    assert made.pictures == (2, 3), "two of asking, one of the attack"
    of_all = [Way("one state for all", "a cat", attacks=target.prompts)]
    assert success(asked, evaluate(target, Found(tuple(of_all)), shown, pictures=1)) is None


def test_what_the_base_draws_is_shared_between_erasures(typing) -> None:
    """Targets with one ``drawn`` draw each picture once, the same as without; other prompts and counts are other pictures."""
    settings = relearning.Settings(captions=2, pictures=1)

    def of(target: AttackTarget) -> list[Tensor]:
        one, two = pictures_of_each(target, target.prompts, 2, 0, "x", quiet)
        more = pictures_of(target, target.prompts, 3, 0, "x", quiet)
        return [one, two, more, *(pool for _, pool in relearning.dataset(target, SPEC, settings, quiet))]

    shared: dict = {}
    alone, first, second = (target_of(typing), *(target_of(typing, drawn=shared) for _ in range(2)))
    made = [of(target) for target in (alone, first, second)]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(*made, strict=True))
    assert first.base.passes == alone.base.passes and second.base.passes[0] == 0
    others = target_of(typing, drawn=shared, prompts=("one kitty here", "a cat"))
    assert not torch.equal(pictures_of(others, others.prompts, 3, 0, "x", quiet), made[0][2])


def test_pictures_are_the_clearest_that_the_base_draws(typing) -> None:
    target = target_of(typing)
    plain = pictures_of(target, target.prompts, 2, 0, "x", quiet)
    seen: list[Tensor] = []

    def look(latents: Tensor) -> Tensor:
        seen.append(latents)
        return torch.linspace(0, 1, len(latents))

    clear = pictures_of(target_of(typing, look=look), target.prompts, 2, 0, "x", quiet)
    assert torch.equal(clear, seen[0][-2:]) and torch.allclose(seen[0][:2], plain, atol=1e-5)
    given = target_of(typing, pictures=plain[:1])
    assert torch.equal(pictures_of(given, target.prompts, 2, 0, "x", quiet), plain[[0, 0]])


@pytest.mark.parametrize(("chosen", "most"), [(p4d, 2), (uda, 1)], ids=["p4d", "unlearn_diff_atk"])
def test_no_more_networks_are_held_than_searched_with(typing, chosen, most: int) -> None:
    """The pictures of all prompts are drawn before, on one replica."""
    target = target_of(typing, look=lambda z: torch.linspace(0, 0.4, len(z)))
    made, held = [], []
    for port in (target.erased, target.base):

        def trainable(port=port, plain=port.trainable):
            model = plain()
            made.append(model)
            held.append(sum(bool(m._hooks) for m in made))
            return model

        port.trainable = trainable
    chosen.run(target, SPEC, chosen.Settings(tokens=2, steps=2, **({"times": 1} if chosen is uda else {})), quiet)
    assert max(held) == most and len(held) == most + 1


def test_pictures_of_each_are_those_of_one_prompt(typing) -> None:
    for look in (None, lambda z: z.mean((1, 2, 3))):
        target = target_of(typing, look=look)
        each = pictures_of_each(target, target.prompts, 2, 3, "x", quiet)
        for number, prompt in enumerate(target.prompts):
            assert torch.equal(each[number], pictures_of(target, [prompt], 2, 3, f"x {number}", quiet))


def test_pictures_are_guided_away_from_the_negative_prompt(typing) -> None:
    """Those that are counted, and those that a search looks at; the base model's are not."""
    plain, against = target_of(typing), target_of(typing, negative="dog")
    erased, look = plain.erased, lambda z: torch.zeros(len(z))
    (cond,), (away,) = erased.conditions(["a cat"]), erased.conditions(["dog"])
    with erased.trainable() as model:
        noise = noises(model, 0, "evaluate", range(2))
        expected = draw(model, cond, away, noise, plain.sampler)
    made, without = (evaluate(t, Found((Way("a cat", "a cat"),)), look, pictures=2).latents for t in (against, plain))
    assert torch.allclose(made, expected, atol=1e-5) and not torch.allclose(made, without, atol=1e-3)
    seen = []
    watched = target_of(typing, negative="dog", look=lambda z: seen.append(z) or torch.zeros(len(z)))
    with erased.trainable() as model:
        eye = Eye(watched, model, 0, "x")
        eye(cond)
        assert torch.allclose(seen[0], draw(model, cond, away, eye.noise, plain.sampler), atol=1e-5)
    base = [pictures_of(t, ["a cat"], 2, 0, "x", quiet) for t in (plain, against)]
    assert torch.equal(*base)


def test_a_glance_looks_on_only_where_the_first_picture_shows_the_concept(typing) -> None:
    seen: list[Tensor] = []
    answers = iter([torch.tensor([0.4]), torch.tensor([0.9]), torch.tensor([0.9, 0.2, 0.1]), torch.full((4,), 0.9)])
    target = target_of(typing, look=lambda z: seen.append(z) or next(answers), threshold=0.5)
    cond = target.erased.conditions(["a cat"])[0]
    with target.erased.trainable() as model:
        eye = Eye(target, model, 0, "x")
        missed, doubted = eye.glance(cond), eye.glance(cond)
        assert missed == Seen(pytest.approx(0.4), success=False, sure=False) and eye.asked == 1 + 4
        assert doubted == Seen(pytest.approx((0.9 + 0.9 + 0.2 + 0.1) / 4), success=True, sure=False)
        eye(cond)
    assert torch.allclose(torch.cat(seen[1:3]), seen[3], atol=1e-5), "the pictures of a whole look"


def test_states_that_stand_for_a_prompt_do_not_stand_for_the_negative_one(typing) -> None:
    target = target_of(typing, negative="dog")
    states = target.erased.conditions(["a cat"])[0].context[0]
    look = lambda z: torch.zeros(len(z))  # noqa: E731
    made, typed = (
        evaluate(target, Found((way,)), look, pictures=1).latents
        for way in (Way("x", states=states), Way("a cat", "a cat"))
    )
    assert torch.allclose(made, typed, atol=1e-5)
