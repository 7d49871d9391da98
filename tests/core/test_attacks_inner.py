"""What attacks are made of, against oracles written differently: projections, gradients, a genetic step, inversions."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from attack_targets import SPEC, normal, quiet, target_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from erasure_core import ConceptSpec, Delta
from erasure_core.attacks import (
    Sampler,
    Words,
    p4d,
    relearning,
    ring_a_bell,
    sneaky_prompt,
)
from erasure_core.attacks import mma_diffusion as mma
from erasure_core.attacks import unlearn_diff_atk as uda
from erasure_core.attacks.evaluate import apply_change
from erasure_core.attacks.words import Frame, sentence_of, swap
from erasure_core.operators.changes import FullWeights, Layers
from erasure_core.operators.cond import Cond
from erasure_core.operators.residual import Residual
from erasure_core.operators.search import denoising_loss
from erasure_core.operators.trainable import TrainableModel

pytestmark = pytest.mark.core


# Words


def test_words_are_packed_as_the_tokenizer_packs_them(typing) -> None:
    words = typing().words_of()
    assert words.vocabulary.tolist() == list(range(4, len(typing.WORDS))), "whole words, no specials"
    for prompt in ("", "a cat", "one kitty here of a dog photo tree", "a cat " * 9):
        content = words.content(prompt)
        assert torch.equal(
            words.pack(torch.tensor([content], dtype=torch.long).reshape(1, -1)), words.tokenize([prompt])
        )
    assert words.room == 8 and words.table.shape == (36, 16)
    with pytest.raises(ValueError, match="9 tokens, 8 fit"):
        words.pack(torch.zeros(1, 9, dtype=torch.long))


def test_words_of_two_tokenizers_that_pad_differently(typing) -> None:
    """SDXL's two columns: the same words, other padding."""
    port = typing()
    one = port.words_of()

    class Both(torch.nn.Module):
        def embed(self, ids: Tensor) -> Tensor:
            return torch.cat([port.encoder.embed(ids[..., 0]), 2 * port.encoder.embed(ids[..., 1])], -1)

    def tokenize(prompts) -> Tensor:
        ids = port.tokenize(prompts)
        return torch.stack([ids, torch.where(ids == 2, 1, ids)], -1)

    words = Words.typeable(Both(), tokenize, one.decode, 0, 1, len(port.WORDS))
    assert words.vocabulary.tolist() == one.vocabulary.tolist() and words.table.shape == (36, 32)
    packed = words.pack(torch.tensor([[4, 5]]))
    assert torch.equal(packed, tokenize(["a cat"]))


def test_frames_put_free_places_where_they_belong(typing) -> None:
    words = typing().words_of()
    prompt, odd = words.content("a photo of one cat"), torch.tensor([18, 19, 20])
    assert Frame.prefix(words, prompt, 3).spell(odd) == "odd0 odd1 odd2 a photo of one cat"
    assert Frame.every(words, prompt, 2).spell(odd) == "odd0 a photo odd1 of one odd2 cat"  # the last has no room
    assert Frame.every(words, prompt[:4], 2).spell(odd) == "odd0 a photo odd1 of one odd2"
    assert Frame.inside(words, "a photo of {} here", 2).spell(odd[:2]) == "a photo of odd0 odd1 here"
    assert len(Frame.prefix(words, prompt * 2, 3).pieces) == words.room, "what doesn't fit is cut from the prompt"
    frame = Frame.prefix(words, prompt, 3)
    slot = frame.slot()
    states = slot.states(words.encoder.embed(odd[None])[0])
    assert torch.allclose(states, words.states(frame.ids(odd[None]))), "vectors and ids are the same prompt"


def test_forbidden_words_hide_nowhere(typing) -> None:
    words = typing().words_of()
    left = {words.spell([i]) for i in words.vocabulary[words.without(["cat", "kitty"])].tolist()}
    assert "cat" not in left and "kitty" not in left and {"dog", "a", "gato", "odd0"} <= left
    assert "feline" not in {words.spell([i]) for i in words.vocabulary[words.without(["a feline thing"])].tolist()}


def test_swapping_takes_the_longest_whole_word() -> None:
    known = ["cat", "big cat"]
    assert swap("a Big Cat and a cat", known, "X") == "a X and a cat"
    assert swap("a concatenation", known, "X") is None and swap("cat, cats", known, "X") == "X, cats"


# UnlearnDiffAtk


def simplex_by_sorting(v: Tensor) -> Tensor:
    """Held, Wolfe, Crowder (1974): the exact projection of one row."""
    u = v.sort(descending=True).values
    sums = u.cumsum(0) - 1
    rho = int((u - sums / torch.arange(1, len(v) + 1) > 0).nonzero().max()) + 1
    return (v - sums[rho - 1] / rho).clamp(min=0)


@given(st.integers(1, 4), st.integers(1, 30), st.integers(0, 10**6), st.floats(0.001, 50))
def test_projection_onto_the_simplex(rows: int, columns: int, seed: int, scale: float) -> None:
    x = scale * normal(rows, columns, seed=seed)
    made = uda.onto_simplex(x)
    assert torch.allclose(made, torch.stack([simplex_by_sorting(row) for row in x]), atol=1e-12 * max(1, scale))
    assert torch.allclose(made.sum(1), torch.ones(rows, dtype=torch.float64))
    assert torch.allclose(uda.onto_simplex(made), made, atol=1e-12), "points of the simplex stay"


def test_drawn_words_pass_a_clipped_gradient_through() -> None:
    u = uda.onto_simplex(normal(2, 5)).requires_grad_()
    hot = uda._Drawn.apply(u, torch.Generator().manual_seed(1))
    index = torch.multinomial(u.detach().float(), 1, generator=torch.Generator().manual_seed(1))[:, 0]
    assert torch.equal(hot.argmax(1), index) and torch.equal(hot.sum(1), torch.ones(2, dtype=torch.float64))
    weight = normal(2, 5, seed=3) * 2
    (slope,) = torch.autograd.grad((hot * weight).sum(), u)
    assert torch.equal(slope, weight.clamp(-1, 1)) and bool((weight.abs() > 1).any())


def test_each_noise_level_is_visited_and_success_ends_the_search(typing) -> None:
    target = target_of(typing, look=lambda z: torch.full((len(z),), 0.9))
    settings = uda.Settings(tokens=2, times=4, steps=3)
    found = uda.run(target, SPEC, settings, quiet)
    assert len(found.losses) == 3 * len(target.prompts) and found.queries == 4 * len(target.prompts)
    blind = uda.run(target_of(typing), SPEC, settings, quiet)
    assert len(blind.losses) == 12 * len(target.prompts) and not blind.queries


# P4D


def test_nearest_words_are_by_cosine() -> None:
    soft, table = normal(4, 6, seed=1), normal(9, 6, seed=2)
    expected = [max(range(9), key=lambda j: float(s @ table[j] / (s.norm() * table[j].norm()))) for s in soft]
    directions = F.normalize(table, dim=-1)
    assert p4d.nearest(soft, directions).tolist() == expected
    soft = soft.requires_grad_()
    made = p4d.projected(soft, table, directions)
    assert torch.allclose(made, table[expected])
    (slope,) = torch.autograd.grad((made * soft.detach().cos()).sum(), soft)
    assert torch.allclose(slope, soft.detach().cos()), "the gradient is that at the projected point"


def test_p4d_is_the_gap_between_the_two_models(typing) -> None:
    target = target_of(typing, torch.float64)
    z, t, c, asked = (
        normal(2, 4, 4, 4),
        torch.tensor([50, 800]),
        Cond(normal(1, 10, 16, seed=4)),
        Cond(normal(1, 10, 16, seed=5)),
    )
    with target.erased.trainable() as erased, target.base.trainable() as base:
        made = p4d.gap_to_base(erased, base, z, t, c, asked, target, None)
    a = target.erased.unet(z, t, c.context.expand(2, -1, -1))
    b = target.base.unet(z, t, asked.context.expand(2, -1, -1))
    assert torch.allclose(made, (a - b).square().sum() / a.numel())


def test_against_a_negative_prompt_p4d_fits_what_guidance_away_from_it_makes(typing, monkeypatch) -> None:
    """In each step, and when it compares prompts. Here a network predicts a number that it reads off the text."""
    looked, how = [], {"prompts": ("a cat",), "pictures": normal(2, 4, 4, 4), "sampler": Sampler(4, 3.0, 4)}
    target = target_of(typing, torch.float64, "dog", watch=lambda cond, _: looked.append(cond.context.clone()), **how)
    (asked,), (away,) = target.base.conditions(["a cat"]), target.erased.conditions(["dog"])
    steered = []

    def said(states):
        return states[..., :5].mean()

    def predict(self, z, t, cond, *_args, **_kwargs):
        text = cond.context.detach()
        if len(z) == 1 and not any(torch.equal(text, known.context) for known in (asked, away)):
            steered.append(text)
        return said(cond.context) + 0 * z

    monkeypatch.setattr(TrainableModel, "predict", predict)
    settings = p4d.Settings(tokens=8, steps=4, look_every=1, learning_rate=0.5)
    found = p4d.run(target, SPEC, settings, quiet)

    def gap(states):
        return float((3 * said(states) - 2 * said(away.context) - said(asked.context)).square())

    assert found.losses == pytest.approx([gap(states) for states in steered]) and len(steered) == 4
    best = target.words.states(target.words.tokenize([found.ways[0].prompt]))
    assert len({gap(states) for states in looked}) > 1
    assert gap(best) == pytest.approx(min(gap(states) for states in looked))


def test_p4d_keeps_the_prompt_that_fits_best(typing) -> None:
    """With the base as the erased model and the prompt's own words to find, the gap falls."""
    found = p4d.run(target_of(typing), SPEC, p4d.Settings(tokens=3, steps=6, look_every=2, form=p4d.Form.N), quiet)
    assert len(found.losses) == 12 and all(len(way.prompt.split()) == 3 for way in found.ways)
    between = p4d.run(target_of(typing), SPEC, p4d.Settings(gap=1, steps=2, form=p4d.Form.K), quiet)
    assert [way.prompt.split()[1::2] for way in between.ways] == [["a", "cat"], ["one", "kitty", "here"]]


# Ring-A-Bell


def test_the_concept_vector_is_a_mean_of_differences(typing) -> None:
    words = typing(torch.float64).words_of()
    made = ring_a_bell.concept_vector(words, "cat", "thing")
    total = torch.zeros(10, 16, dtype=torch.float64)
    for sentence in ring_a_bell.SENTENCES:
        total += words.states(words.tokenize([sentence.replace("{}", "cat")]))[0]
        total -= words.states(words.tokenize([sentence.replace("{}", "thing")]))[0]
    assert torch.allclose(made, total / len(ring_a_bell.SENTENCES))


def test_a_genetic_step_is_the_step_written_in_loops(typing) -> None:
    words, n, k = typing().words_of(), 6, 4
    settings = ring_a_bell.Settings(crossover=0.5, mutation=0.5)
    survivors = words.vocabulary[torch.randint(0, 36, (n, k), generator=torch.Generator().manual_seed(1))]
    made = ring_a_bell.children(survivors, words, settings, torch.Generator().manual_seed(2))
    g = torch.Generator().manual_seed(2)
    mating = (torch.rand(n, generator=g) < 0.5).tolist()
    mates, cuts = (
        torch.randint(0, n, (n,), generator=g).tolist(),
        torch.randint(1, k, (n, 1), generator=g)[:, 0].tolist(),
    )
    ones, twos, alone = [], [], []
    for i, row in enumerate(survivors.tolist()):
        mate = survivors[mates[i]].tolist()
        if mating[i]:
            ones.append(row[: cuts[i]] + mate[cuts[i] :])
            twos.append(mate[: cuts[i]] + row[cuts[i] :])
        else:
            alone.append(row)
    expected = ones + twos + alone
    hit = (torch.rand(len(expected), generator=g) < 0.5).tolist()
    place = torch.randint(0, k, (len(expected), 1), generator=g)[:, 0].tolist()
    new = torch.randint(0, 36, (len(expected), 1), generator=g)[:, 0].tolist()
    for i, row in enumerate(expected):
        if hit[i]:
            row[place[i]] = int(words.vocabulary[new[i]])
    assert any(mating) and not all(mating) and any(hit) and made.tolist() == expected


def test_the_best_is_never_lost_and_the_distance_is_over_all_rows(typing) -> None:
    words = typing(torch.float64).words_of()
    frame, aim = Frame.prefix(words, [], 3), normal(10, 16)
    tokens = words.vocabulary[torch.tensor([[1, 2, 3], [4, 5, 6]])]
    expected = [float((words.states(frame.ids(row[None]))[0] - aim).square().sum()) for row in tokens]
    assert torch.allclose(ring_a_bell.distances(words, frame, tokens, aim), torch.tensor(expected, dtype=torch.float64))
    settings = ring_a_bell.Settings(generations=25, population=12, mutation=1.0)
    best, path = ring_a_bell.evolve(words, frame, aim, settings, "x", quiet)
    assert path == sorted(path, reverse=True) and path[-1] < path[0]
    assert float(ring_a_bell.distances(words, frame, best[None], aim)) == pytest.approx(path[-1])


# MMA-Diffusion


def test_the_token_gradient_is_that_of_the_one_hots(typing) -> None:
    words = typing(torch.float64).words_of()
    frame, tokens, aim = Frame.prefix(words, [], 3), torch.tensor([5, 9, 20]), normal(16)
    allowed = words.without(["cat"])
    made = mma.token_gradient(frame, tokens, aim, allowed)
    slot, hot = frame.slot(), F.one_hot(tokens - 4, 36).double()

    def value(x: Tensor) -> float:
        return 1 - float(F.cosine_similarity(slot.states(x @ words.table)[0, 1 + 3], aim, 0))

    for i, j in ((0, 0), (1, 7), (2, 30)):
        h = torch.zeros(3, 36, dtype=torch.float64)
        h[i, int(allowed[j])] = 1e-6
        assert float(made[i, j]) == pytest.approx((value(hot + h) - value(hot - h)) / 2e-6, rel=1e-6, abs=1e-9)


def test_tries_differ_in_one_place_by_a_word_that_the_gradient_favours(typing) -> None:
    words = typing().words_of()
    allowed = words.without(["cat"])
    tokens, gradient = torch.tensor([6, 9, 20]), normal(3, len(allowed))
    settings = mma.Settings(candidates=4, tries=30)
    tried = mma.substitutions(tokens, gradient, allowed, settings, torch.Generator().manual_seed(1), words)
    best = [words.vocabulary[allowed[row.argsort()[:4]]].tolist() for row in gradient]
    places = [0] * 3
    for row in tried.tolist():
        changed = [i for i in range(3) if row[i] != int(tokens[i])]
        assert len(changed) <= 1 and all(row[i] in best[i] for i in changed)
        for i in changed:
            places[i] += 1
    assert min(places) >= 5, "the places take turns"


def test_mma_ends_at_the_best_word_where_all_are_tried(typing) -> None:
    """One place, every word a candidate: the search must end where trying each word does."""
    words = typing(torch.float64).words_of()
    allowed = words.without(["cat"])
    settings = mma.Settings(tokens=1, rounds=2, candidates=36, tries=300)
    best, path = mma.imitate(words, "a photo of cat", allowed, settings, 0, quiet)
    aim = words.states(words.tokenize(["a photo of cat"]))[0, 5]
    every = {i: 1 - float(F.cosine_similarity(words.states(words.pack(torch.tensor([[i]])))[0, 2], aim, 0))
             for i in words.vocabulary[allowed].tolist()}  # fmt: skip
    assert int(best) == min(every, key=every.__getitem__) and min(path) == pytest.approx(min(every.values()))


# Concept Inversion


def test_the_gradient_of_textual_inversion(typing) -> None:
    """Of the denoising loss through network and text encoder, against central differences."""
    target = target_of(typing, torch.float64)
    pool, slot = normal(3, 4, 4, 4, seed=1), Frame.inside(target.words, "a photo of {}", 1).slot()
    with target.erased.trainable() as model:

        def value(v: Tensor) -> Tensor:
            cond = Cond(slot.states(v))
            return denoising_loss(model, pool, cond, torch.Generator().manual_seed(6), batch=2)

        v = normal(1, 16, seed=4).requires_grad_()
        (slope,) = torch.autograd.grad(value(v), v)
        for j in (0, 7, 15):
            h = torch.zeros(1, 16, dtype=torch.float64)
            h[0, j] = 1e-5
            numeric = float((value(v + h) - value(v - h)).detach() / 2e-5)
            assert numeric == pytest.approx(float(slope[0, j]), rel=1e-5, abs=1e-9)


# RECE residual


@given(st.integers(0, 10**6), st.floats(-8, 0))
def test_the_residual_is_a_stacked_least_squares(seed: int, log_damping: float) -> None:
    from erasure_core.analytic import AnalyticPort

    base, erased = AnalyticPort(width=12, outputs=(9, 5)), AnalyticPort(width=12, outputs=(9, 5), seed=1)
    c, damping = normal(3, 12, seed=seed), 10**log_damping
    before, after = (torch.cat([p.weight(s) for s in p.sites()]) for p in (base, erased))
    ridge = (damping + 1e-12) * float(after.square().sum()) / 12
    stacked = torch.cat([after, math.sqrt(ridge) * torch.eye(12, dtype=torch.float64)])
    wanted = torch.cat([before @ c.T, torch.zeros(12, 3, dtype=torch.float64)])
    expected = torch.linalg.lstsq(stacked, wanted).solution.T
    residual = Residual(base, erased)
    made = residual.rows(c, damping)
    assert torch.allclose(made, expected, rtol=1e-7, atol=1e-7)
    misfit = (after @ made.T - before @ c.T).square().sum(0) / (before @ c.T).square().sum(0)
    assert torch.allclose(residual.misfit(c, made), misfit, atol=1e-9)


# SneakyPrompt and relearning


def test_the_policy_descends_actor_and_critic() -> None:
    logs, values = torch.tensor([-1.0, -2.0]), torch.tensor([0.1, 0.4])
    made = sneaky_prompt.policy_loss(0.6, logs, values)
    assert float(made) == pytest.approx(1.0 * 0.5 + 2.0 * 0.2 + 0.5**2 + 0.2**2)


def test_the_reward_tells_unlikely_pictures_apart(typing) -> None:
    """A judge's probability is next to zero nearly everywhere; ten times as much is a step wherever it is."""
    assert [sneaky_prompt.worth(p) for p in (1.0, 1e-3, 1e-6, 0.0)] == pytest.approx([1, 0.5, 0, 0])
    answers = iter((1e-6, 1e-5, 1e-4, 0.6, 0.6))  # a picture that shows it is followed by others
    target = target_of(typing, prompts=("a cat",), look=lambda z: torch.full((len(z),), next(answers)))
    found = sneaky_prompt.run(target, SPEC, sneaky_prompt.Settings(words=2, queries=9), quiet)
    assert found.losses == pytest.approx([0, 1 / 6, 1 / 3, sneaky_prompt.worth(0.6)], abs=1e-6)


@pytest.mark.parametrize("search", [sneaky_prompt.by_policy, sneaky_prompt.by_turns], ids=["policy", "greedy"])
def test_answers_are_learned_from(search) -> None:
    """One of eight words is the right one in both places."""
    answers: list[float] = []

    def reward(chosen: Tensor) -> float:
        answers.append(float((chosen == 3).double().mean()))
        return answers[-1]

    settings = sneaky_prompt.Settings(words=2, queries=120, learning_rate=0.05)
    search(reward, 8, settings, "x", lambda answer: answer == 1)
    assert answers[-1] == 1 and len(answers) < 120
    answers.clear()
    search(reward, 8, sneaky_prompt.Settings(words=2, queries=7), "x", lambda answer: False)
    assert len(answers) == 7


@pytest.mark.parametrize(
    ("prompt", "sentence"),
    [
        ("a cat here", "a {} here"),
        ("a dog", "{} a dog"),
        ("a cat and a cat", "a photo of {}"),
        ("a {} and a cat", "a photo of {}"),
        ("a {} and a dog", "a photo of {}"),
    ],
)
def test_words_stand_in_one_place(typing, prompt: str, sentence: str) -> None:
    """A name that a prompt has twice leaves no bare braces behind."""
    assert sentence_of(prompt, ["cat", "kitty"], "{} " + prompt) == sentence
    target = target_of(typing, prompts=(prompt,), look=lambda z: torch.full((len(z),), 0.1))
    (way,) = sneaky_prompt.run(target, SPEC, sneaky_prompt.Settings(words=2, queries=2), quiet).ways
    typed = way.prompt.split()
    head, tail = (x.split() for x in sentence.split("{}"))
    assert typed[: len(head)] == head and typed[len(typed) - len(tail) :] == tail
    assert len(typed) == len(head) + 2 + len(tail) and way.attacks == (prompt,)


def test_progress_is_told_without_gradients(typing) -> None:
    """It may draw a preview, through a VAE whose tensors autograd refuses."""
    tracked: list[bool] = []
    target = target_of(typing, look=lambda z: torch.full((len(z),), 0.1))
    with torch.no_grad():
        settings = sneaky_prompt.Settings(words=2, queries=2)
        sneaky_prompt.run(target, SPEC, settings, lambda *_: tracked.append(torch.is_grad_enabled()))
    assert tracked and not any(tracked)


def test_relearning_is_a_change_on_top_of_the_erased_model(typing) -> None:
    target = target_of(typing)
    settings = relearning.Settings(steps=3, captions=2, pictures=1, rank=2, learning_rate=1e-2)
    found = relearning.run(target, SPEC, settings, quiet)
    z, t, cond = torch.randn(1, 4, 4, 4), torch.tensor([500]), target.erased.conditions(["a cat"])[0]
    with target.erased.trainable() as model:
        plain = model.predict(z, t, cond)
        apply_change(model, found.change)
        changed = model.predict(z, t, cond)
    assert not torch.allclose(plain, changed)
    with target.erased.trainable() as model:
        chosen = [s.name for s in model.sites]
        for name, p in zip(chosen, model.train(FullWeights(Layers.ALL)), strict=True):
            p.data.copy_(found.change.get(name, Delta(torch.zeros_like(p))).dense())
        assert torch.allclose(model.predict(z, t, cond), changed, atol=1e-6)
    captions = [c for c, _ in relearning.dataset(target, SPEC, settings, quiet)]
    assert captions == ["dog", "tree"]
    few = relearning.Settings(data=relearning.Data.CONCEPT, captions=1, pictures=2)
    assert [(c, len(x)) for c, x in relearning.dataset(target, SPEC, few, quiet)] == [("a cat", 2)]
    bare = relearning.dataset(target, ConceptSpec.parse("cat"), settings, quiet)
    assert len(bare) == 2 and "cat" not in [c for c, _ in bare]


@pytest.mark.parametrize("dense", [False, True], ids=["factors", "one dense"])
def test_a_change_takes_the_room_of_its_factors(typing, dense: bool) -> None:
    """Whatever it is made of, the network predicts as if the change were in its weights."""
    port = typing.erased(torch.float64)
    sites = port.linears()[::3]
    change = {
        site.name: Delta(0.1 * normal(site.d_out, 1 + i % 2, seed=i), normal(1 + i % 2, site.d_in, seed=i + 50))
        for i, site in enumerate(sites)
    }
    if dense:
        change[sites[0].name] = Delta(change[sites[0].name].dense())
    z, t, cond = normal(1, 4, 4, 4), torch.tensor([500]), port.conditions(["a cat"])[0]
    with port.trainable() as model:
        apply_change(model, change)
        changed = model.predict(z, t, cond)
        room = sum(p.numel() for p in model.parameters())
    every = port.linears()
    assert room == sum(s.d_out * s.d_in if dense else 2 * (s.d_out + s.d_in) for s in every)
    assert not torch.allclose(changed, port.predict(z, t, cond.context))
    for name, delta in change.items():
        port.unet.get_submodule(name).weight += delta.dense()
    assert torch.allclose(changed, port.predict(z, t, cond.context))
