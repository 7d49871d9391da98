"""Shares and their intervals, against scipy's."""

import pytest
import torch
from scipy.stats import binomtest

from erasure_core.metrics.rates import Rate, pooled, rate


@pytest.mark.parametrize(("hits", "n"), [(0, 1), (1, 1), (0, 40), (3, 40), (40, 40), (517, 1200)])
def test_interval_is_wilsons(hits: int, n: int) -> None:
    expected = binomtest(hits, n).proportion_ci(0.95, method="wilson")
    assert Rate(hits, n).interval == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_counting_and_pooling() -> None:
    first = rate(torch.tensor([[True, False], [True, True]]))
    assert (first.hits, first.n) == (3, 4)
    together = pooled([first, Rate(0, 6), Rate(0, 0)])
    assert (together.hits, together.n) == (3, 10)
    assert Rate.from_json(together.to_json()) == together


def test_nothing_counted_has_no_share() -> None:
    assert str(Rate(0, 0)) == "-"
    assert Rate(0, 0).interval == (0.0, 1.0)


def test_impossible_counts_are_refused() -> None:
    with pytest.raises(ValueError, match="5 of 4"):
        Rate(5, 4)
