"""RECE against the published equations with per-layer sums over the current weights, dense and unfactored.

The code uses that every edit is W (I + G); the oracle here does not: it carries the list of edited matrices and sums
over them in every round.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptSpec, erase
from erasure_core.analytic import AnalyticPort
from erasure_core.concept import Rows, edit_rows
from erasure_core.methods.rece import Derivation, derive
from erasure_core.operators.linear_edit import mean_square, solve

pytestmark = pytest.mark.core
MODES = [d.value for d in Derivation]


def printed_rows(now: list[Tensor], first: list[Tensor], c: Tensor, guide: Tensor, damping: float, mode: str) -> Tensor:
    """c' per row, as METHODS 2.4 prints it: A = sum_i W_i^T W_i, M = sum_i W_i^T W_i^o."""
    a = sum(w.T @ w for w in now)
    m = sum(w.T @ o for w, o in zip(now, first, strict=True))
    eye = torch.eye(a.shape[0], dtype=a.dtype)
    unit = float(torch.trace(a)) / len(a)  # the documented departure: lambda is relative to trace(A) / D
    lam = damping * unit
    match mode:
        case "regzero":
            inverse, rhs = lam * eye + a, m @ c.T
        case "surrogate, output":
            inverse, rhs = (1 + damping) * a, (m + damping * a) @ c.T
        case "surrogate, input":
            inverse, rhs = lam * eye + a, (lam * eye + m) @ c.T
        case "surrogate, both":
            inverse, rhs = lam * eye + (1 + damping) * a, (lam * eye + m + damping * a) @ c.T
        case "standard":
            inverse, rhs = lam * eye + a, lam * guide.T + m @ c.T
    return torch.linalg.solve(inverse + 1e-12 * unit * eye, rhs).T


def printed_edit(w: Tensor, c: Tensor, to: Tensor, held: Tensor, ridge: float, k: float) -> Tensor:
    """W <- (l W + W v^T C' + k W P^T P)(l I + C'^T C' + k P^T P)^-1, anchored to the current W."""
    eye = torch.eye(w.shape[1], dtype=w.dtype)
    value = ridge * w + w @ to.T @ c + k * w @ held.T @ held
    return torch.linalg.solve(ridge * eye + c.T @ c + k * held.T @ held, value, left=False)


def oracle(port: AnalyticPort, spec: ConceptSpec, mode: str, rounds: int, damping: float, ridge: float, k: float):
    rows = edit_rows(port, spec, rule=Rows.SUMMARY, templates=("{}", "a {}", "a picture of {}"))
    absolute = ridge * float(rows.source.square().sum()) / len(rows.source)
    first = [port.weight(s) for s in port.sites()]
    now = [printed_edit(w, rows.source, rows.target, rows.held, absolute, k) for w in first]
    held = torch.cat([rows.held, rows.target, rows.source])
    for _ in range(rounds):
        derived = printed_rows(now, first, rows.source, rows.target, damping, mode)
        now = [printed_edit(w, derived, rows.target, held, absolute, k) for w in now]
        held = torch.cat([held, derived])
    return now


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("rounds", "damping", "ridge", "k"), [(1, 0.1, 1e-3, 1.0), (3, 1e-3, 1e-2, 0.3)])
def test_every_weight_after_every_round(
    port, spec, mode: str, rounds: int, damping: float, ridge: float, k: float
) -> None:
    if mode == "surrogate, output":
        rounds, ridge = (
            1,
            1.0,
        )  # nothing damps this mode: behind a firm edit A is singular to working precision, as printed
    settings = {
        "rounds": rounds,
        "damping": damping,
        "ridge": ridge,
        "keep_weight": k,
        "derivation": mode,
        "energy": 1.0,
    }
    result = erase(port, spec, "rece", settings)
    for site, expected in zip(port.sites(), oracle(port, spec, mode, rounds, damping, ridge, k), strict=True):
        delta = expected - port.weight(site)
        assert (result.deltas[site.name].dense() - delta).norm() < 1e-8 * delta.norm(), site


@pytest.mark.parametrize("mode", MODES)
def test_with_more_rows_than_columns(mode: str) -> None:
    """72 rows at a width of 48, which the code replaces by fewer where it may."""
    port = AnalyticPort(width=48, blocks=3)
    spec = ConceptSpec.parse("red apple\nfurry cat\nold boat\nglass house", "pear\ndog\ncar\ntree", "bird, fish")
    damping, ridge = (0.1, 1.0) if mode == "surrogate, output" else (0.1, 1e-3)
    settings = {"rounds": 2, "damping": damping, "ridge": ridge, "derivation": mode, "energy": 1.0}
    result = erase(port, spec, "rece", settings)
    for site, expected in zip(port.sites(), oracle(port, spec, mode, 2, damping, ridge, 1.0), strict=True):
        delta = expected - port.weight(site)
        assert (result.deltas[site.name].dense() - delta).norm() < 1e-8 * delta.norm(), site


def test_energy_shortens_what_is_stored(port, spec) -> None:
    whole, less = (erase(port, spec, "rece", {"energy": energy}).deltas for energy in (1.0, 0.9))
    for name, delta in less.items():
        assert delta.rank < whole[name].rank
        assert (delta.dense() - whole[name].dense()).norm() < 0.5 * whole[name].dense().norm()


def test_no_rounds_is_uce(port, spec) -> None:
    rece, uce = erase(port, spec, "rece", {"rounds": 0, "energy": 1.0}), erase(port, spec, "uce", {"energy": 1.0})
    for name, delta in uce.deltas.items():
        assert torch.allclose(rece.deltas[name].dense(), delta.dense(), rtol=0, atol=1e-12)


class Derived:
    """One UCE edit of one concept, and everything that the derivation is about."""

    def __init__(self, port: AnalyticPort, mode: str, damping: float) -> None:
        self.rows = edit_rows(port, ConceptSpec.parse("cat", "dog", "bird"), rule=Rows.SUMMARY, templates=("{}",))
        self.first = [port.weight(s) for s in port.sites()]
        ridge = 1e-3 * mean_square(self.rows.source)
        self.edit = solve(self.rows.source, self.rows.target, self.rows.held, ridge=ridge)
        self.now = [w + w @ self.edit.dense() for w in self.first]
        heard = self.edit.after(sum(w.T @ w for w in self.first))
        a = self.edit.after(heard.T)
        self.found = derive(self.rows.source, self.rows.target, heard, a, damping, Derivation(mode))

    def miss(self, x: Tensor) -> Tensor:
        """How far the edited layers' outputs for ``x`` are from the original ones for the concept."""
        c = self.rows.source
        return sum((x @ w.T - c @ o.T).square().sum() for w, o in zip(self.now, self.first, strict=True))


@pytest.mark.parametrize("mode", ["regzero", "surrogate, input", "standard"])
def test_the_derived_rows_bring_the_concept_back(port, mode: str) -> None:
    d = Derived(port, mode, 1e-6)
    assert d.miss(d.found) < 1e-4 * d.miss(d.rows.source), (
        "the concept's own words no longer do it, the derived ones do"
    )


@pytest.mark.parametrize("mode", MODES)
def test_the_derived_rows_minimise_their_objective(port, mode: str) -> None:
    """Stationary in sum_i ||W_i x - W_i^o c||^2 plus the mode's own pull."""
    damping = 0.3
    d = Derived(port, mode, damping)
    c, guide = d.rows.source, d.rows.target
    unit = sum(float(w.square().sum()) for w in d.now) / c.shape[1]
    x = d.found.clone().requires_grad_()
    outputs = sum((x @ w.T - c @ w.T).square().sum() for w in d.now)
    pulls = {
        "regzero": damping * unit * x.square().sum(),
        "surrogate, output": damping * outputs,
        "surrogate, input": damping * unit * (x - c).square().sum(),
        "surrogate, both": damping * outputs + damping * unit * (x - c).square().sum(),
        "standard": damping * unit * (x - guide).square().sum(),
    }
    (slope,) = torch.autograd.grad(d.miss(x) + pulls[mode], x)
    (scale,) = torch.autograd.grad(d.miss(x), x)
    assert slope.norm() < 1e-8 * scale.norm()
    assert scale.norm() > 1e-3, "the pull matters, so this test can tell the modes apart"


def test_damping_shrinks_the_derived_rows(port) -> None:
    sizes = [float(Derived(port, "regzero", damping).found.norm()) for damping in (1e-3, 1e-1, 10.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[2] < 0.3 * sizes[0]


def test_a_round_erases_what_was_derived_and_undoes_nothing(port) -> None:
    spec = ConceptSpec.parse("cat", "dog", "bird")
    d = Derived(port, "regzero", 1e-3)
    result = erase(port, spec, "rece", {"rounds": 1, "damping": 1e-3, "templates": "none", "energy": 1.0})
    after = [port.weight(s) + result.deltas[s.name].dense() for s in port.sites()]

    def distance(weights: list[Tensor], x: Tensor) -> float:
        """From the outputs that x now has to the replacement's."""
        pairs = zip(weights, d.first, strict=True)
        return sum(float((x @ w.T - d.rows.target @ o.T).square().sum()) for w, o in pairs)

    assert distance(after, d.found) < 0.05 * distance(d.now, d.found), "the derived rows now give the replacement"
    assert distance(after, d.rows.source) < 0.05 * distance(d.first, d.rows.source), "so do the concept's own still"


@pytest.mark.parametrize("rounds", [1, 2, 3, 5])
def test_later_rounds_do_not_undo_earlier_ones(rounds: int) -> None:
    """What the first round found stays erased: its outputs stay near the replacement's."""
    port = AnalyticPort(width=160)
    d = Derived(port, "regzero", 0.1)
    settings = {"rounds": rounds, "templates": "none", "energy": 1.0}
    result = erase(port, ConceptSpec.parse("cat", "dog", "bird"), "rece", settings)
    after = [port.weight(s) + result.deltas[s.name].dense() for s in port.sites()]

    def distance(weights: list[Tensor]) -> float:
        pairs = zip(weights, d.first, strict=True)
        return sum(float((d.found @ w.T - d.rows.target @ o.T).square().sum()) for w, o in pairs)

    assert distance(after) < 0.1 * distance(d.now)
