"""Scores, judge error, distances and weight measures against formulas written out, known cases and other libraries."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from erasure_core import ConceptSpec, Delta, Erasure, erase
from erasure_core.analytic import AnalyticPort
from erasure_core.metrics import (
    JudgeError,
    Rate,
    attack_success,
    clip_score,
    corrected,
    curve,
    frechet_distance,
    harmonic_mean,
    kernel_distance,
    mace_harmonic,
    pairwise_error,
    perceptual_distance,
    text_measures,
    total_drift,
    unlearning,
    weight_changes,
)
from erasure_core.metrics.distances import pairwise_cosine_distance
from erasure_core.metrics.rates import rate
from erasure_core.metrics.scores import combined_interval, complement, mean_interval
from erasure_core.metrics.weights import output_change, stored_energy

pytestmark = pytest.mark.core


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_attack_success_counts_prompts_that_succeed_unattacked() -> None:
    asked, attacked = torch.tensor([1, 0, 0, 0, 1]) > 0, torch.tensor([0, 1, 0, 1, 1]) > 0
    made = attack_success(asked, attacked, (4, 3))
    assert (made.pre.hits, made.post.hits, made.defended.hits, made.post.n) == (2, 4, 1, 5)
    assert made.pictures == (4, 7), "behind post are those of asking too"
    with pytest.raises(ValueError, match="one list of prompts each"):
        attack_success(asked, attacked[:3])


def test_unlearning_accuracies() -> None:
    made = unlearning(torch.tensor([0, 0, 0, 1]) > 0, torch.tensor([1, 1, 0]) > 0, torch.tensor([1, 1, 1, 1, 0]) > 0)
    assert made.ua == Rate(3, 4) and made.ira == Rate(2, 3) and made.cra == Rate(4, 5)
    assert made.average == pytest.approx((0.75 + 2 / 3 + 0.8) / 3)
    assert complement(Rate(1, 4)) == Rate(3, 4)


def test_maces_mean_is_its_formula() -> None:
    assert mace_harmonic(0.1, 0.9, 0.3) == pytest.approx(3 / (1 / 0.9 + 1 / 0.9 + 1 / 0.7))
    assert mace_harmonic(1.0, 0.9, 0.3) == 0, "nothing erased"
    assert harmonic_mean([0.2, 0.9, 0.5]) == pytest.approx(statistics.harmonic_mean([0.2, 0.9, 0.5]))


def test_a_curve_falls() -> None:
    shares = [r.hits for _, r in curve(torch.tensor([0.2, 0.5, 0.8, 0.95]))]
    assert shares == sorted(shares, reverse=True) and shares[0] == 3 and shares[-1] == 1


def test_intervals_of_combinations() -> None:
    """One rate: the Jeffreys interval, here of 7 of 20 (Brown, Cai, DasGupta 2001: Beta(7.5, 13.5) quantiles)."""
    low, high = combined_interval(lambda r: r.share, [Rate(7, 20)], draws=20000)
    assert low == pytest.approx(0.171, abs=0.01) and high == pytest.approx(0.567, abs=0.01)
    counts = [Rate(5, 100), Rate(90, 100), Rate(10, 100)]
    low, high = combined_interval(lambda *rates: mace_harmonic(*(r.share for r in rates)), counts)
    assert low < mace_harmonic(0.05, 0.9, 0.1) < high and high - low < 0.15
    mean, low, high = mean_interval(normal(400, seed=1) + 3)
    assert low < mean < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)


@given(st.integers(1, 60), st.integers(0, 60), st.integers(20, 60), st.integers(0, 19))
def test_the_judges_error_is_taken_out(n: int, seen: int, hits: int, alarms: int) -> None:
    seen = min(seen, n)
    made = corrected(Rate(seen, n), Rate(hits, 60), Rate(alarms, 60))
    q = (seen / n - alarms / 60) / (hits / 60 - alarms / 60)
    assert made.share == pytest.approx(min(1, max(0, q)))
    assert 0 <= made.low <= made.share <= made.high <= 1


def test_a_perfect_judge_changes_little_and_a_blind_one_is_refused() -> None:
    seen = Rate(30, 100)
    made = corrected(seen, Rate(100000, 100000), Rate(0, 100000))
    assert made.share == pytest.approx(0.3) and made.low == pytest.approx(seen.interval[0], abs=0.01)
    poor = corrected(seen, Rate(16, 20), Rate(4, 20))
    assert poor.high - poor.low > made.high - made.low, "a judge that errs leaves more open"
    with pytest.raises(ValueError, match="says nothing"):
        corrected(seen, Rate(5, 20), Rate(5, 20))


def test_the_interval_covers_the_truth() -> None:
    """Simulated with a judge that hits 90 % and is fooled by 10 %, each measured on 100 pictures."""
    g, covered = torch.Generator().manual_seed(4), 0
    truth, runs = 0.15, 300
    for _ in range(runs):
        p = truth * 0.9 + (1 - truth) * 0.1
        seen, hit, alarm = (
            Rate(int((torch.rand(n, generator=g) < x).sum()), n) for x, n in ((p, 80), (0.9, 100), (0.1, 100))
        )
        made = corrected(seen, hit, alarm)
        covered += made.low <= truth <= made.high
    assert covered / runs > 0.92


@pytest.mark.parametrize("alike", [False, True], ids=["each picture errs for itself", "a prompt's pictures err alike"])
@pytest.mark.parametrize("show", [1, 6], ids=["one shows it", "all show it"])
@pytest.mark.parametrize("truth", [0.05, 0.5])
def test_the_interval_of_prompts_covers_the_truth(truth: float, show: int, alike: bool) -> None:
    """Simulated picture by picture: 40 prompts of six, by a judge that hits 90 % and is fooled by 10 %, each measured on 100.
    However its errors go together, and however many pictures show it."""
    g, covered, plain, runs = torch.Generator().manual_seed(5), 0, 0, 300
    for _ in range(runs):
        succeeds = torch.rand(40, 1, generator=g) < truth
        shown = succeeds & (torch.arange(6) < show)
        luck = torch.rand(40, 1 if alike else 6, generator=g).expand(40, 6)
        seen = torch.where(shown, luck < 0.9, luck < 0.1).any(1)
        hits, alarms = (Rate(int((torch.rand(100, generator=g) < x).sum()), 100) for x in (0.9, 0.1))
        low, high = JudgeError(hits, alarms).behind_prompts(rate(seen), 6)
        covered += low <= truth <= high
        plain += rate(seen).interval[0] <= truth <= rate(seen).interval[1]
    assert covered / runs > 0.94
    if truth < 0.1 and not alike:
        assert plain / runs < 0.05, "what the judge sees is mostly its false alarms"


def test_prompts_of_one_picture_are_counted_like_pictures() -> None:
    """A sure judge's interval is that of the count; one picture leaves only the hits open, and more never narrow it."""
    sure = JudgeError(Rate(100000, 100000), Rate(0, 100000))
    assert sure.behind_prompts(Rate(3, 8), 4) == pytest.approx(Rate(3, 8).interval, abs=0.01)
    poor = JudgeError(Rate(90, 100), Rate(10, 100))
    made = [poor.behind_prompts(Rate(30, 40), pictures) for pictures in (1, 2, 4, 8)]
    assert {high for _, high in made} == {poor.behind(Rate(30, 40)).high}
    assert [low for low, _ in made] == sorted((low for low, _ in made), reverse=True)
    assert made[0][0] == pytest.approx(poor.behind(Rate(30, 40)).low, abs=0.1) and made[0][0] < 30 / 40 < made[0][1]
    with pytest.raises(ValueError, match="says nothing"):
        JudgeError(Rate(1, 9), Rate(1, 9)).behind_prompts(Rate(1, 2), 4)


def test_distances_of_pairs() -> None:
    one, two = torch.zeros(2, 3, 4, 4), torch.full((2, 3, 4, 4), 0.5)
    assert pairwise_error(one, two).tolist() == [0.5, 0.5] and not pairwise_error(two, two).any()
    x, y = normal(3, 5), normal(3, 5, seed=1)
    expected = [1 - float(a @ b / (a.norm() * b.norm())) for a, b in zip(x, y, strict=True)]
    assert torch.allclose(pairwise_cosine_distance(x, y), torch.tensor(expected), atol=1e-6)
    assert torch.allclose(clip_score(x, y), 100 * (1 - torch.tensor(expected)).clamp_min(0), atol=1e-4)
    maps = [normal(2, 3, 4, 4), normal(2, 6, 2, 2, seed=2)]
    others = [normal(2, 3, 4, 4, seed=3), normal(2, 6, 2, 2, seed=4)]
    total = 0.0
    for a, b in zip(maps, others, strict=True):
        for i in range(a.shape[2]):
            for j in range(a.shape[3]):
                u, v = a[0, :, i, j], b[0, :, i, j]
                total += float((u / u.norm() - v / v.norm()).square().sum()) / (a.shape[2] * a.shape[3])
    assert float(perceptual_distance(maps, others)[0]) == pytest.approx(total, rel=1e-5)
    assert not perceptual_distance(maps, maps).any()
    with pytest.raises(ValueError, match="pairs of the same shape"):
        pairwise_error(one, two[:1])


@pytest.mark.parametrize("n", [5, 60])
def test_the_frechet_distance_is_that_of_a_matrix_root(n: int) -> None:
    """Fewer pictures than dimensions too."""
    scipy = pytest.importorskip("scipy.linalg")
    x, y = normal(n, 8), 1.5 * normal(n + 3, 8, seed=1) + 0.4
    c1, c2 = torch.cov(x.T).numpy(), torch.cov(y.T).numpy()
    root = scipy.sqrtm(c1 @ c2).real
    expected = float((x.mean(0) - y.mean(0)).square().sum()) + float((c1 + c2 - 2 * root).trace())
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-4)
    assert frechet_distance(x, x) < 1e-9
    with pytest.raises(ValueError, match="at least two rows"):
        frechet_distance(x[:1], y)


def test_the_kernel_distance_is_its_sums() -> None:
    x, y = normal(4, 3), normal(5, 3, seed=1)

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    xx = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / 12
    yy = sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / 20
    xy = sum(k(a, b) for a in x for b in y) / 20
    assert kernel_distance(x, y) == pytest.approx(xx + yy - 2 * xy)


def test_the_kernel_distance_of_pairs_leaves_partners_out() -> None:
    x, y = normal(5, 3), normal(5, 3, seed=1)

    def k(a: Tensor, b: Tensor) -> float:
        return (float(a @ b) / 3 + 1) ** 3

    others = [(i, j) for i in range(5) for j in range(5) if i != j]
    h = [k(x[i], x[j]) + k(y[i], y[j]) - k(x[i], y[j]) - k(x[j], y[i]) for i, j in others]  # Gretton's equation 3
    assert kernel_distance(x, y, paired=True) == pytest.approx(sum(h) / 20)
    assert kernel_distance(x, x, paired=True) == 0.0 > kernel_distance(x, x)
    with pytest.raises(ValueError, match="pairs of the same shape"):
        kernel_distance(x, y[:4], paired=True)


class Changed(AnalyticPort):
    """The analytic port with an erasure merged in."""

    def __init__(self, erasure: Erasure, **sizes) -> None:
        super().__init__(**sizes)
        for name, delta in erasure.deltas.items():
            self._weights[name] = self._weights[name] + delta.dense().double()


def test_weight_measures_of_an_erasure() -> None:
    spec, sizes = ConceptSpec.parse("cat", "dog", "bird, tree"), {"width": 96}
    base = AnalyticPort(**sizes)
    erasure = erase(base, spec, "uce")
    erased = Changed(erasure, **sizes)
    for change, site in zip(weight_changes(base, erased), base.sites(), strict=True):
        before, after = base.weight(site), erased.weight(site)
        assert change.drift == pytest.approx(float((after - before).norm() / before.norm()))
        assert change.rank == torch.linalg.matrix_rank((after - before).float(), rtol=1e-4)
        top, all_of_it = (float(torch.linalg.matrix_norm(w, 2)) for w in (after - before, before))
        assert change.largest == pytest.approx(top / all_of_it)
        assert stored_energy(erasure)[site.name] == pytest.approx(float((after - before).norm()), rel=1e-3)
    stack = [torch.cat([p.weight(s).flatten() for s in base.sites()]) for p in (base, erased)]
    assert total_drift(base, erased) == pytest.approx(float((stack[1] - stack[0]).norm() / stack[0].norm()))
    made = text_measures(base, erased, spec)
    assert made.erased > 0.5 and made.kept < 0.1 * made.erased and made.kept <= made.kept_worst
    assert made.empty < 0.1 and 0 <= made.residual <= 1
    rows, sites = base.text([""])[0].states, base.sites()
    moved, was = (torch.cat([rows @ w(s).T for s in sites], 1).norm(dim=1) for w in (
        lambda s: erased.weight(s) - base.weight(s), base.weight))  # fmt: skip
    assert made.empty == pytest.approx(float((moved / was).square().mean().sqrt())), "all its rows, BOS and padding too"
    nothing = text_measures(base, base, spec)
    assert nothing.erased == nothing.kept == nothing.empty == 0 and nothing.residual < 1e-2
    assert all(c.rank == 0 and c.drift == 0 for c in weight_changes(base, base))
    alone = text_measures(base, erased, ConceptSpec.parse("cat", "dog"))
    assert alone.kept is None and alone.kept_worst is None, "nothing kept is no evidence that all was"


def test_the_residual_is_what_cannot_be_brought_back() -> None:
    """A direction that the edited weights cannot produce at all is gone; one that other states still reach is not."""
    base = AnalyticPort(width=8, blocks=1, outputs=(8,))
    row = base.text(["cat"])[0].states[1]
    flat = {}
    for site in base.sites():
        w = base.weight(site)
        out = w @ row
        flat[site.name] = Delta(-torch.outer(out, out) / out.square().sum() @ w)  # no input gives this output any more
    header = erase(base, ConceptSpec.parse("cat"), "uce").header
    gone = Changed(Erasure(header, flat), width=8, blocks=1, outputs=(8,))
    spec = ConceptSpec.parse("cat")
    assert text_measures(base, gone, spec).residual == pytest.approx(1, abs=1e-3)
    unit = row / row.norm()
    swapped = {s.name: Delta(-torch.outer(base.weight(s) @ unit, unit) + 0) for s in base.sites()}
    hidden = Changed(Erasure(header, swapped), width=8, blocks=1, outputs=(8,))
    assert 0 < text_measures(base, hidden, spec).residual <= 1
    assert output_change(base, hidden, row[None]).tolist() == pytest.approx([1.0])
    assert math.isclose(float(output_change(base, base, row[None])), 0.0)
