"""The noise algebra against the papers' formulas, one by one, and time against both conventions of the literature."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from erasure_core import Prediction
from erasure_core.emojicanvas import diffusion
from erasure_core.schedule import (
    Schedule,
    Space,
    progress_of_steps_done,
    progress_of_steps_remaining,
    space_of,
    spread,
)

pytestmark = pytest.mark.core
SD, FLOW = Schedule.scaled_linear(), Schedule.rectified_flow(shift=3.0)
T = torch.tensor([0, 17, 500, 998])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


X0, N = normal(4, 2, 3, 3, seed=1), normal(4, 2, 3, 3, seed=2)


def by_hand(schedule: Schedule, space: Space) -> Tensor:
    """Each target as its paper writes it, one sample at a time."""
    rows = []
    for i, t in enumerate(T.tolist()):
        a, s = float(schedule.signal[t]), float(schedule.noise[t])
        rows.append({Space.EPS: N[i], Space.X0: X0[i], Space.V: a * N[i] - s * X0[i], Space.FLOW: N[i] - X0[i]}[space])
    return torch.stack(rows)


def test_the_schedule_is_stable_diffusions() -> None:
    assert torch.allclose(SD.signal.square().float(), diffusion.alphas_cumprod(), atol=1e-7)
    assert torch.allclose(SD.signal.square() + SD.noise.square(), torch.ones(1000, dtype=torch.float64))
    x0, n = X0.float(), N.float()
    assert torch.allclose(SD.add_noise(x0, n, T), diffusion.add_noise(x0, n, T), atol=1e-6)


def test_places_become_indices() -> None:
    """One in every part; and one that float32 rounds up to the end of the schedule is its last index."""
    schedule = Schedule.from_alphas_cumprod(torch.linspace(0.99, 0.01, 50))
    last = torch.tensor(7.0) + torch.tensor(1 - 2.0**-24)
    assert float(last / 8) == 1.0
    assert schedule.indices(torch.stack([torch.tensor(0.0), torch.tensor(0.5), last / 8])).tolist() == [0, 25, 49]
    places = spread(10, torch.Generator().manual_seed(1))
    assert (places * 10).long().tolist() == list(range(10)) and len(set((places * 10 % 1).tolist())) == 10


def test_flow_is_a_straight_line_from_noise() -> None:
    sigma = torch.tensor([1, 18, 501, 999], dtype=torch.float64) / 1000
    sigma = (3 * sigma / (1 + 2 * sigma)).view(-1, 1, 1, 1)
    assert torch.allclose(FLOW.add_noise(X0, N, T), (1 - sigma) * X0 + sigma * N)
    assert FLOW.signal[-1] == 0 and FLOW.noise[-1] == 1, "DUO evaluates its SD3 prior at sigma = 1"
    assert torch.allclose(FLOW.network_time(T), 1000 * sigma.flatten().float())
    assert torch.equal(SD.network_time(T), T)


@pytest.mark.parametrize("schedule", [SD, FLOW], ids=["sd", "flow"])
@pytest.mark.parametrize("space", Space)
def test_targets_are_the_papers(schedule: Schedule, space: Space) -> None:
    assert torch.allclose(schedule.target(space, X0, N, T), by_hand(schedule, space))


@pytest.mark.parametrize("schedule", [SD, FLOW], ids=["sd", "flow"])
@pytest.mark.parametrize("source", Space)
@pytest.mark.parametrize("to", Space)
def test_every_space_gives_every_other(schedule: Schedule, source: Space, to: Space) -> None:
    z = schedule.add_noise(X0, N, T)
    converted = schedule.convert(by_hand(schedule, source), z, T, source, to)
    assert torch.allclose(converted, by_hand(schedule, to), atol=1e-9)


def test_combinations_that_sum_to_one_are_the_same_in_every_space() -> None:
    """METHODS 1.2: the x0 loss is the eps loss times (1 - abar) / abar."""
    z, one, two = normal(4, 2, 3, 3, seed=3), normal(4, 2, 3, 3, seed=4), normal(4, 2, 3, 3, seed=5)
    mixed = SD.convert(3 * one - 2 * two, z, T, Space.EPS, Space.X0)
    first, second = (SD.convert(e, z, T, Space.EPS, Space.X0) for e in (one, two))
    assert torch.allclose(mixed, 3 * first - 2 * second, atol=1e-9)
    abar = SD.signal[T].square()
    in_eps, in_x0 = ((x - y).square().mean((1, 2, 3)) for x, y in ((one, two), (first, second)))
    assert torch.allclose(in_x0, in_eps * (1 - abar) / abar)
    assert ((1 - abar) / abar)[-1] > 200


def test_a_step_is_ddim_and_for_flow_eulers() -> None:
    z, prediction = normal(2, 2, 3, 3, seed=6), normal(2, 2, 3, 3, seed=7)
    a, s, a2, s2 = SD.signal[700], SD.noise[700], SD.signal[300], SD.noise[300]
    ddim = a2 * (z - s * prediction) / a + s2 * prediction
    assert torch.allclose(SD.step(prediction, z, 700, 300, Space.EPS), ddim)
    euler = z + (FLOW.noise[300] - FLOW.noise[700]) * prediction
    assert torch.allclose(FLOW.step(prediction, z, 700, 300, Space.FLOW), euler)
    assert torch.allclose(FLOW.step(prediction, z, 700, None, Space.FLOW), z - FLOW.noise[700] * prediction)


def test_a_perfect_network_is_sampled_back_to_the_picture() -> None:
    for schedule, space in ((SD, Space.EPS), (SD, Space.V), (FLOW, Space.FLOW)):
        stops = schedule.trajectory(7)
        z = schedule.add_noise(X0, N, torch.full((4,), stops[0]))
        for t, to in pairwise(stops):
            z = schedule.step(schedule.target(space, X0, N, torch.full((4,), t)), z, t, to, space)
        assert torch.allclose(z, X0, atol=1e-9)


@pytest.mark.parametrize("steps", [30, 50])
def test_steps_done_are_the_diffusers_times(steps: int) -> None:
    descending = list(range(999, -1, -1))
    for k in range(steps):
        assert SD.time_at(progress_of_steps_done(k, steps)) == descending[int(k * 1000 / steps)]


def test_steps_remaining_are_the_compvis_times() -> None:
    for k in range(50):
        inside = {SD.time_at(progress_of_steps_remaining(k, 50, (i + 0.5) / 20)) for i in range(20)}
        assert inside == set(range(20 * k, 20 * k + 20))
        assert SD.time_at(progress_of_steps_remaining(k, 50)) == 20 * k + 19


@given(t=st.integers(0, 999))
def test_time_and_progress_are_inverse(t: int) -> None:
    assert SD.time_at(SD.progress_at(t)) == t


@given(until=st.floats(0, 1), steps=st.integers(1, 60))
def test_a_trajectory_goes_down_to_exactly_where_it_is_told(until: float, steps: int) -> None:
    stops = SD.trajectory(steps, until)
    assert stops[0] == 999
    assert stops[-1] == (None if until == 1 else SD.time_at(until))
    indices = [-1 if s is None else s for s in stops]
    assert all(a > b for a, b in pairwise(indices))
    assert len(stops) - 1 <= steps


def test_progress_outside_is_refused() -> None:
    for wrong in (-0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="progress"):
            SD.time_at(wrong)


def test_spaces_cover_the_predictions() -> None:
    assert [space_of(p) for p in Prediction] == [Space.EPS, Space.V, Space.FLOW]
