"""What Adversarial's ``run`` makes of its parts, for which numbers stand in; test_adversarial.py tests these."""

from __future__ import annotations

import pytest
import torch
from watched_runs import ALONE, KEPT, answers, coloured, falling, instead, losses, named, numbers, reads, run

from erasure_core.methods import adversarial
from erasure_core.methods._adversaries import Adversaries
from erasure_core.operators.train_loop import Trainer
from erasure_core.operators.trainable import Weights

pytestmark = pytest.mark.core


def test_adversarial_goes_down_its_losses_the_kept_one_weighed(tiny, monkeypatch) -> None:
    answers(monkeypatch, adversarial, attack_loss=2.0, erase_loss=3.0, keep_loss=5.0)
    made: list[dict[str, float]] = []
    instead(monkeypatch, lambda trainer: made.extend(losses(phase) for phase in trainer.phases))
    for weight in (0.5, 0.0):
        run(adversarial, tiny, KEPT, keep_weight=weight)
    assert made == [{"attack": 2}, {"erase": 3, "keep": 2.5}, {"attack": 2}, {"erase": 3}]


def test_adversarials_weights_warm_up_and_fall_while_its_search_goes_on_as_fast(tiny, monkeypatch) -> None:
    """The rate of the search is in deviations of the empty prompt's rows."""
    trainers: list[Trainer] = []
    instead(monkeypatch, trainers.append)
    run(adversarial, tiny, ALONE)
    run(adversarial, tiny, ALONE, iterations=50)
    unit = tiny.conditions([""])[0].context[0, 1:].std(-1).mean()
    for trainer, steps, warmup in zip(trainers, (1000, 50), (20, 5), strict=True):
        search, weights = trainer.phases
        made = [(type(p.made), p.made.defaults["lr"], p.made.defaults["weight_decay"]) for p in trainer.phases]
        assert made == [(torch.optim.Adam, pytest.approx(0.03 * float(unit)), 0), (torch.optim.Adam, 2e-4, 0)]
        assert trainer.iterations == steps and {search.rate(i) for i in range(steps)} == {1}
        rates = [(i + 1) / warmup for i in range(warmup)] + [falling(i, steps - warmup) for i in range(steps - warmup)]
        assert [weights.rate(i) for i in range(steps)] == pytest.approx(rates)


def test_adversarial_counts_the_steps_of_its_search(tiny, monkeypatch) -> None:
    """Whoever retires does so before one; what is erased goes by how many were made."""
    steps: list[tuple[str, int]] = []
    monkeypatch.setattr(Adversaries, "retire", lambda self, i, _: steps.append(("retire", i)))
    for name in ("attack_loss", "erase_loss"):
        monkeypatch.setattr(adversarial, name, lambda *args, name=name: steps.append((name, args[4])) or 0.0)

    def look(trainer: Trainer) -> None:
        search, weights = trainer.phases
        assert search.repeat == 3
        losses(search, 5)
        losses(weights, 4)

    instead(monkeypatch, look)
    run(adversarial, tiny, attacks=3, keep_weight=0.0)
    assert steps == [("retire", 5), ("attack_loss", 5), ("erase_loss", 12)]


def test_embeddings_of_adversarial_live_as_long_as_asked(tiny, monkeypatch) -> None:
    """Three of each of two concepts where five are asked for; with one picture a step each attacks in every sixth of 24."""
    answers(monkeypatch, adversarial, attack_loss=0.0)
    changed: list[tuple[int, int]] = []

    def look(trainer: Trainer) -> None:
        *now, store = trainer.phases[0].parameters
        assert (len(now), len(store)) == (6, 24)
        for i in range(50):
            before = torch.stack(now).detach()
            losses(trainer.phases[0], i)
            changed.extend((i, k) for k in range(6) if not torch.equal(before[k], now[k]))

    instead(monkeypatch, look)
    run(adversarial, tiny, population=5, life=24, batch=1)
    assert changed == [(24, 1), (48, 2)]


def test_adversarial_searches_and_erases_where_there_is_most_noise_and_keeps_anywhere(tiny, monkeypatch) -> None:
    seen = reads(monkeypatch)

    def look(trainer: Trainer) -> None:
        seen.clear()
        for phase in trainer.phases:
            losses(phase)

    instead(monkeypatch, look)
    run(adversarial, tiny, KEPT, least_noise=0.7, batch=64)
    assert [x.weights for x in seen] == [Weights.FROZEN, Weights.STUDENT] * 3
    first = [(x.t.min() // 100, x.t.max() // 100) for x in seen]
    assert first == [(7, 9)] * 4 + [(0, 9)] * 2


def test_adversarial_asks_the_original_once_where_views_are_stored(tiny, monkeypatch) -> None:
    seen = reads(monkeypatch)

    def look(trainer: Trainer) -> None:
        assert [len(x.z) for x in seen if x.weights is Weights.FROZEN][-2:] == [8, 8], "16 of what is kept"
        seen.clear()
        for phase in trainer.phases:
            losses(phase)

    instead(monkeypatch, look)
    run(adversarial, tiny, KEPT, views=16)
    assert [x.weights for x in seen] == [Weights.STUDENT] * 3


@pytest.mark.parametrize("views", [0, 16])
def test_adversarial_takes_turns_at_what_it_keeps(tiny, monkeypatch, views: int) -> None:
    """The empty prompt twice in eight, however many are in a step, and kept words at pictures that were drawn of them."""
    answers(monkeypatch, adversarial, erase_loss=0.0)
    drawn = answers(monkeypatch, adversarial, draw_pictures=coloured(6))["draw_pictures"]
    seen, words, shown = reads(monkeypatch), [], []

    def look(trainer: Trainer) -> None:
        seen.clear()
        for i in range(8):
            losses(trainer.phases[1], i)
        for x in seen:
            if x.weights is Weights.STUDENT:
                words.extend(named(tiny, x.cond.context))
                shown.extend(numbers(tiny, x))

    instead(monkeypatch, look)
    run(adversarial, tiny, KEPT, views=views, batch=3)
    assert [word == "" for word in words] == [k % 8 in (0, 1) for k in range(24)]
    own = [(word, KEPT.keep[n % 2]) for k, (word, n) in enumerate(zip(words, shown, strict=True)) if k % 8 > 2]
    assert all(word == its for word, its in own) and {word for word, _ in own} == set(KEPT.keep)
    assert [named(tiny, c.context) for c in drawn[0]["conds"]] == [["orchard"], ["pear"]] and drawn[0]["count"] == 64
