"""The closed-form operator against an augmented least-squares problem solved by QR, matrix by matrix."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from erasure_core.operators.linear_edit import ContextMap, compress, gram, mean_square, solve

pytestmark = pytest.mark.core
D = 24


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def least_squares(w0: Tensor, c: Tensor, to: Tensor, p: Tensor, ridge: float, e: float, k: float) -> Tensor:
    """The W' that minimises the printed objective: one tall system, no normal equations, no inverse."""
    weights = torch.cat(
        [torch.full((rows,), value, dtype=torch.float64) for rows, value in ((len(c), e), (len(p), k), (D, ridge))]
    ).sqrt()
    inputs = torch.cat([c, p, torch.eye(D, dtype=torch.float64)])
    outputs = torch.cat([to @ w0.T, p @ w0.T, w0.T])
    return torch.linalg.lstsq(weights[:, None] * inputs, weights[:, None] * outputs, driver="gels").solution.T


@pytest.mark.parametrize(("n", "m"), [(1, 1), (3, 5), (8, 15), (8, 16), (20, 30), (40, 0), (2, 0)])
@pytest.mark.parametrize(("ridge", "e", "k"), [(0.5, 1.0, 1.0), (1e-3, 2.5, 0.1), (1e-2, 0.3, 7.0)])
def test_solves_the_printed_objective(n: int, m: int, ridge: float, e: float, k: float) -> None:
    c, to, p, w0 = normal(n, D, seed=1), normal(n, D, seed=2), normal(m, D, seed=3), normal(10, D, seed=4)
    edit = solve(c, to, p, ridge=ridge, erase_weight=e, keep_weight=k).truncated(1.0)
    expected = least_squares(w0, c, to, p, ridge, e, k)
    delta = edit.delta(w0, edit.right).dense()
    assert relative(delta, expected - w0) < 1e-8
    assert edit.rank <= n, "the change never has more ranks than edited rows"


@pytest.mark.parametrize(("n", "m"), [(3, 5), (10, 13), (1, 0)])
def test_both_branches_agree(n: int, m: int) -> None:
    """Kept rows of zeros change nothing, but make the system tall, so the other branch solves it."""
    c, to, p = normal(n, D, seed=1), normal(n, D, seed=2), normal(m, D, seed=3)
    small = solve(c, to, p, ridge=1e-2, erase_weight=0.7, keep_weight=1.3)
    tall = solve(
        c, to, torch.cat([p, torch.zeros(D, D, dtype=torch.float64)]), ridge=1e-2, erase_weight=0.7, keep_weight=1.3
    )
    assert n + m < D
    assert relative(small.dense(), tall.dense()) < 1e-9


def test_a_weak_ridge_sends_every_row_to_its_target_and_holds_the_kept() -> None:
    c, to, p, w = normal(4, D, seed=1), normal(4, D, seed=2), normal(6, D, seed=3), normal(10, D, seed=4)
    edited = solve(c, to, p, ridge=1e-10).after(w)
    assert relative(c @ edited.T, to @ w.T) < 1e-6
    assert relative(p @ edited.T, p @ w.T) < 1e-6
    other = normal(1, D, seed=9)
    assert relative(other @ edited.T, other @ w.T) > 1e-2, "a random row is not held"


def test_the_minimum_is_one() -> None:
    c, to, p, w = normal(4, D, seed=1), normal(4, D, seed=2), normal(6, D, seed=3), normal(10, D, seed=4)

    def objective(x: Tensor) -> Tensor:
        return (
            2 * (c @ x.T - to @ w.T).square().sum()
            + 0.5 * (p @ x.T - p @ w.T).square().sum()
            + 0.1 * (x - w).square().sum()
        )

    edit = solve(c, to, p, ridge=0.1, erase_weight=2, keep_weight=0.5)
    best = (w + w @ edit.dense()).requires_grad_()
    (slope,) = torch.autograd.grad(objective(best), best)
    assert slope.norm() < 1e-9 * objective(w).sqrt()
    assert objective(best) < objective(w)


def test_targets_equal_to_sources_change_nothing() -> None:
    c, p = normal(4, D, seed=1), normal(3, D, seed=2)
    assert solve(c, c, p, ridge=0.1).truncated(1.0).rank == 0


@pytest.mark.parametrize("m", [2, 60])
def test_erase_weight_zero_changes_nothing(m: int) -> None:
    edit = solve(normal(4, D, seed=1), normal(4, D, seed=2), normal(m, D, seed=3), ridge=0.1, erase_weight=0.0)
    assert torch.equal(edit.dense(), torch.zeros(D, D, dtype=torch.float64))


@pytest.mark.parametrize("ridge", [0.0, -1.0, float("nan")])
def test_a_ridge_that_is_not_positive_is_refused(ridge: float) -> None:
    with pytest.raises(ValueError, match="ridge must be positive"):
        solve(normal(2, D), normal(2, D), normal(2, D), ridge=ridge)


def test_then_is_the_product_of_both_edits() -> None:
    one = compress(normal(D, 3, seed=1), normal(3, D, seed=2))
    two = compress(normal(D, 5, seed=3), normal(5, D, seed=4))
    eye = torch.eye(D, dtype=torch.float64)
    both = one.then(two)
    assert relative(eye + both.dense(), (eye + one.dense()) @ (eye + two.dense())) < 1e-12
    assert both.rank == 8
    assert relative(ContextMap.zero(D).then(two).dense(), two.dense()) < 1e-12
    assert relative(two.then(ContextMap.zero(D)).dense(), two.dense()) < 1e-12


def test_apply_to_rows_is_what_the_edited_layer_reads() -> None:
    edit, rows, w = compress(normal(D, 3, seed=1), normal(3, D, seed=2)), normal(7, D, seed=3), normal(10, D, seed=4)
    edited = w + edit.delta(w, edit.right).dense()
    assert relative(edit.apply_to_rows(rows) @ w.T, rows @ edited.T) < 1e-12


@given(n=st.integers(0, 30), true_rank=st.integers(0, 10), seed=st.integers(0, 1000))
def test_compress_keeps_the_product_and_drops_what_is_not_there(n: int, true_rank: int, seed: int) -> None:
    mix = normal(true_rank, n, seed=seed)
    left, right = normal(D, true_rank, seed=seed + 1) @ mix, normal(n, D, seed=seed + 2)
    small = compress(left, right)
    assert small.rank == min(n, true_rank)
    assert (small.dense() - left @ right).norm() <= 1e-8 * (left @ right).norm()
    balance = (small.left.norm(dim=0) / small.right.norm(dim=1)).log().abs() if small.rank else torch.zeros(1)
    assert balance.max() < 1e-6, "both factors carry the same size, so float16 holds either"


def test_mean_square_is_the_trace_over_the_rows() -> None:
    rows = normal(5, D, seed=1)
    assert mean_square(rows) == pytest.approx(float(torch.trace(rows.T @ rows)) / 5, rel=1e-12)
    assert mean_square(rows * 3) == pytest.approx(9 * mean_square(rows), rel=1e-12)


def test_dense_maps_act_like_factored_ones() -> None:
    one = compress(normal(D, 3, seed=1), normal(3, D, seed=2))
    two = compress(normal(D, 5, seed=3), normal(5, D, seed=4))
    solid_one, solid_two = ContextMap(one.dense(), None), ContextMap(two.dense(), None)
    rows, expected = normal(7, D, seed=5), one.then(two).dense()
    for first in (one, solid_one):
        for second in (two, solid_two):
            assert relative(first.then(second).dense(), expected) < 1e-12
    assert relative(solid_one.after(rows), one.after(rows)) < 1e-12
    assert relative(solid_one.apply_to_rows(rows), one.apply_to_rows(rows)) < 1e-12
    assert solid_one.truncated(1.0).rank == 3


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize(("width", "decay"), [(24, 0.7), (500, 0.93), (500, 0.999)])
def test_truncation_holds_its_share_in_about_the_fewest_factors(energy: float, width: int, decay: float) -> None:
    """Whether all singular values are looked at, or a random range of 128, or that was not enough."""
    u, v = torch.linalg.qr(normal(width, width, seed=1)).Q, torch.linalg.qr(normal(width, width, seed=2)).Q
    s = decay ** torch.arange(width, dtype=torch.float64)
    whole = u @ torch.diag(s) @ v
    small = ContextMap(whole, None).truncated(energy)
    shares = s.square().cumsum(0) / s.square().sum()
    kept = 1 - (whole - small.dense()).square().sum() / whole.square().sum()
    assert kept > energy - 1e-6, "less than all is looked at in float32"
    if energy < 1:
        fewest = int((shares < energy).sum()) + 1
        assert fewest <= small.rank <= fewest + 2


@pytest.mark.parametrize(("n", "width"), [(30, 7), (3, 300), (400, 513)])
def test_gram_is_the_product(n: int, width: int) -> None:
    rows = normal(n, width, seed=1)
    assert relative(gram(rows), rows.T @ rows) < 1e-14
