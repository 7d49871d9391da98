"""SPEED against its formula as printed: a dense projector, M by an explicit solve, the bracket written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptError, ConceptSpec, ModelPort, Role, erase
from erasure_core.analytic import AnalyticPort
from erasure_core.concept import TEMPLATES, Rows, edit_rows
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort
from erasure_core.methods.speed import centres, weakest_input

pytestmark = pytest.mark.core
FEW = TEMPLATES["few"]
PLAIN = {"filter": False, "augment": 0, "energy": 1.0}
SPEC = ConceptSpec.parse("red apple, apple\nfurry cat", "pear", "dog, green tree")


def projector(retained: Tensor, threshold: float) -> Tensor:
    """P on the directions whose share of the rows' mean square is at most ``threshold``, from the rows' own SVD."""
    width = retained.shape[1]
    _, s, vh = torch.linalg.svd(retained, full_matrices=True)
    values = torch.zeros(width, dtype=retained.dtype)
    values[: len(s)] = s.square() / len(retained)
    used = vh[values > max(threshold, 1e-14) * float(retained.square().sum()) / len(retained)]
    return torch.eye(width, dtype=retained.dtype) - used.T @ used


def printed(w: Tensor, c1: Tensor, anchors: Tensor, p: Tensor, k2: Tensor, r: float) -> Tensor:
    """dW = W (C*C1^T - C1C1^T) P [I - M K2 (K2^T P M K2)^-1 K2^T P] M, with columns and means over them."""
    n, eye = c1.shape[1], torch.eye(w.shape[1], dtype=w.dtype)
    moment, cross = c1 @ c1.T / n, anchors @ c1.T / n
    m = torch.linalg.solve(moment @ p + r * eye, eye)
    middle = k2.T @ p @ m @ k2
    noise = 1e-10 * float(
        k2.square().sum() * m.norm()
    )  # rows of the empty prompt that P already removes make it singular
    inner = torch.linalg.pinv(middle, atol=noise, rtol=0)
    return w @ (cross - moment) @ p @ (eye - m @ k2 @ inner @ k2.T @ p) @ m


def ingredients(port: AnalyticPort, spec: ConceptSpec = SPEC, rule: Rows = Rows.SUMMARY):
    rows = edit_rows(port, spec, rule=rule, templates=("{}", "a {}", "a picture of {}"))
    return rows, port.text([""])[0].states, float(rows.source.square().sum()) / len(rows.source)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.fixture
def roomy() -> AnalyticPort:
    """Wider than the kept rows, so that the null space is not empty; layers with fewer and with more outputs."""
    return AnalyticPort(width=64, blocks=2, outputs=(40, 80))


@pytest.mark.parametrize(("r", "threshold"), [(1e-3, 1e-4), (0.5, 0.0), (1e-2, 1e-2)])
@pytest.mark.parametrize("params", ["values", "keys and values"])
def test_every_weight_is_the_printed_one(roomy, r: float, threshold: float, params: str) -> None:
    settings = {**PLAIN, "retain_scale": r, "threshold": threshold, "params": params}
    result = erase(roomy, SPEC, "speed", settings)
    rows, empty, unit = ingredients(roomy)
    p = projector(rows.keep, threshold)
    sites = [s for s in roomy.sites() if s.role is Role.TEXT_VALUE or params != "values"]
    assert list(result.deltas) == [s.name for s in sites]
    for site in sites:
        w = roomy.weight(site)
        assert (
            relative(result.deltas[site.name].dense(), printed(w, rows.source.T, rows.target.T, p, empty.T, r * unit))
            < 1e-8
        )


MANY = ConceptSpec.parse("red apple\nfurry cat\nold boat\nglass house", "pear\ndog\ncar\ntree", "bird, fish")


@pytest.mark.parametrize(
    ("spec", "rule", "count"), [(SPEC, Rows.LAST, 9), (SPEC, Rows.SUMMARY, 54), (MANY, Rows.SUMMARY, 72)]
)
def test_few_rows_and_more_rows_than_columns(roomy, spec: ConceptSpec, rule: Rows, count: int) -> None:
    result = erase(roomy, spec, "speed", {**PLAIN, "rows": rule.value})
    rows, empty, unit = ingredients(roomy, spec, rule)
    assert len(rows.source) == count
    p = projector(rows.keep, 1e-4)
    for name, delta in result.deltas.items():
        w = next(roomy.weight(s) for s in roomy.sites() if s.name == name)
        expected = printed(w, rows.source.T, rows.target.T, p, empty.T, 1e-3 * unit)
        assert relative(delta.dense(), expected) < 1e-8


def influence_filter(retained: Tensor, w: Tensor, rows, unit: float) -> Tensor:
    """IPF: W_e = W (C*C1^T - C1C1^T)(I + C1C1^T)^-1; rows that it moves more than the mean. I is r's default: 1e-3 of the rows'
    mean square."""
    n, eye = len(rows.source), torch.eye(w.shape[1], dtype=w.dtype)
    moment = rows.source.T @ rows.source / n
    cross = rows.target.T @ rows.source / n
    unconstrained = torch.linalg.solve(1e-3 * unit * eye + moment, w @ (cross - moment), left=False)
    influence = torch.stack([(unconstrained @ row).norm() for row in retained])
    return retained[influence > influence.mean()]


def test_with_the_influence_filter(roomy) -> None:
    result = erase(roomy, SPEC, "speed", {"augment": 0, "energy": 1.0})
    rows, empty, unit = ingredients(roomy)
    for name, delta in result.deltas.items():
        w = next(roomy.weight(s) for s in roomy.sites() if s.name == name)
        kept = influence_filter(rows.keep, w, rows, unit)
        assert 0 < len(kept) < len(rows.keep)
        expected = printed(w, rows.source.T, rows.target.T, projector(kept, 1e-4), empty.T, 1e-3 * unit)
        assert relative(delta.dense(), expected) < 1e-8


@pytest.mark.parametrize("seed", [0, 5])
def test_with_augmentation_and_filter(seed: int) -> None:
    """Layers with more outputs than inputs have one weakest direction, which an SVD finds as well."""
    port = AnalyticPort(width=64, blocks=1, outputs=(96,))
    for name, weight in port._weights.items():
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        s[-1] *= 0.1  # so that the code's 30 steps reach the direction exactly
        port._weights[name] = u @ torch.diag(s) @ vh
    result = erase(port, SPEC, "speed", {"augment": 3, "seed": seed, "energy": 1.0})
    rows, empty, unit = ingredients(port)
    generator = torch.Generator().manual_seed(seed)
    (site,) = [s for s in port.sites() if s.role is Role.TEXT_VALUE]
    w = port.weight(site)
    torch.randn(64, dtype=torch.float64, generator=generator)  # the start of the code's iteration
    direction = torch.linalg.svd(w).Vh[-1]
    kept = influence_filter(rows.keep, w, rows, unit)
    # The paper's normal vectors times direction direction^T: only their component along the direction counts.
    noise = torch.randn(3 * len(kept), dtype=torch.float64, generator=generator)
    copies = torch.stack([kept[i // 3] + noise[i] * direction for i in range(3 * len(kept))])
    retained = torch.cat([kept, influence_filter(copies, w, rows, unit)])
    expected = printed(w, rows.source.T, rows.target.T, projector(retained, 1e-4), empty.T, 1e-3 * unit)
    assert relative(result.deltas[site.name].dense(), expected) < 1e-7


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("d_out", "d_in"), [(20, 40), (60, 40)])
def test_the_weakest_input_is_the_last_singular_direction(d_out: int, d_in: int, dtype: torch.dtype) -> None:
    w = torch.randn(d_out, d_in, dtype=dtype)
    found = weakest_input(w, torch.Generator().manual_seed(0))
    smallest = float(torch.linalg.svdvals(w).min()) if d_out >= d_in else 0.0
    assert float(found.norm()) == pytest.approx(1)
    assert float((w.double() @ found).norm()) == pytest.approx(smallest, abs=1e-5)


@pytest.mark.parametrize("rank", [1, 500])
def test_the_weakest_input_of_a_tall_layer_that_hears_nothing_of_some(rank: int) -> None:
    """At the size of SD 1.5's, in float32, where sums round by more than what is left."""
    w = torch.randn(1280, rank) @ torch.randn(rank, 768)
    found = weakest_input(w, torch.Generator().manual_seed(0))
    assert float(found.norm()) == pytest.approx(1)
    assert float((w.double() @ found).norm() / torch.linalg.matrix_norm(w.double(), 2)) < 1e-3


def test_the_weakest_input_of_a_layer_with_dependent_columns() -> None:
    w = torch.randn(20, 40, dtype=torch.float64)
    w[:, 5] = w[:, 6] = 0
    found = weakest_input(w, torch.Generator().manual_seed(0))
    assert float(found.norm()) == pytest.approx(1)
    assert float((w @ found).norm()) < 1e-9


def outputs_moved(port: AnalyticPort, result, states: Tensor) -> float:
    pairs = [(port.weight(s), result.deltas[s.name].dense()) for s in port.sites() if s.name in result.deltas]
    return max(float(((states @ d.T).norm(dim=1) / (states @ w.T).norm(dim=1)).max()) for w, d in pairs)


def test_kept_rows_and_the_empty_prompt_do_not_move_and_the_concept_does(roomy) -> None:
    result = erase(roomy, SPEC, "speed", {**PLAIN, "threshold": 0.0, "params": "keys and values", "rows": "last"})
    rows = edit_rows(roomy, SPEC, rule=Rows.LAST, templates=("{}", "a {}", "a picture of {}"))
    empty = roomy.text([""])[0].states
    assert outputs_moved(roomy, result, rows.keep) < 1e-6
    assert outputs_moved(roomy, result, empty) < 1e-6
    pairs = [(roomy.weight(s), result.deltas[s.name].dense()) for s in roomy.sites()]
    for w, d in pairs:
        before = ((rows.source - rows.target) @ w.T).norm()
        after = (rows.source @ (w + d).T - rows.target @ w.T).norm()
        assert after < 0.5 * before


def test_the_empty_prompt_does_not_move_with_default_settings(roomy) -> None:
    result = erase(roomy, SPEC, "speed")
    rows, empty, _ = ingredients(roomy)
    assert outputs_moved(roomy, result, empty) < 1e-6
    assert outputs_moved(roomy, result, rows.source) > 0.1


def test_the_papers_four_rows_of_the_empty_prompt(roomy) -> None:
    """BOS and three centres stay exactly; the rows between them need not."""
    settings = {**PLAIN, "threshold": 0.0, "empty_prompt": "bos and 3 centres", "rows": "last"}
    result = erase(roomy, SPEC, "speed", settings)
    _, empty, _ = ingredients(roomy)
    middle = centres(empty[1:], 3)
    assert outputs_moved(roomy, result, torch.cat([empty[:1], middle])) < 1e-6
    assert outputs_moved(roomy, result, empty) > 1e-4


def test_centres_are_a_fixed_point_of_k_means() -> None:
    rows = torch.cat([torch.randn(9, 5) + 20 * torch.eye(5)[i] for i in range(3)]).double()
    middle = centres(rows, 3)
    nearest = (rows[:, None] - middle).norm(dim=2).argmin(1)
    for i in range(3):
        assert torch.allclose(middle[i], rows[nearest == i].mean(0))
    assert sorted(torch.bincount(nearest).tolist()) == [9, 9, 9]


def test_everyday_words_are_not_held() -> None:
    """They would fill the space that it may erase in."""
    port = AnalyticPort(width=64, blocks=2)
    plain, both = (erase(port, ConceptSpec.parse("cat", "", "dog", everyday=e), "speed", PLAIN) for e in (False, True))
    assert all(torch.equal(d.dense(), both.deltas[name].dense()) for name, d in plain.deltas.items())


@pytest.mark.parametrize("keep", ["dog", "\n".join(f"word {i}" for i in range(30))])
def test_where_nothing_is_free_it_says_so(keep: str) -> None:
    """Twelve rows of the empty prompt fill a text width of ten, and so do thirty kept words: nothing can move."""
    port = AnalyticPort(width=10, blocks=1)
    with pytest.raises(ConceptError, match=r"^keep: .* leave no direction.*Keep fewer words"):
        erase(port, ConceptSpec.parse("cat", "", keep), "speed", {**PLAIN, "threshold": 0.0})


def changes(port: ModelPort, spec: ConceptSpec, settings: dict) -> tuple[list[float], list[float]]:
    """How far each layer's answers to kept and to erased rows move, as shares of their size."""
    made, rows = erase(port, spec, "speed", settings).deltas, edit_rows(port, spec, rule=Rows.SUMMARY, templates=FEW)
    sites = [s for s in port.sites() if s.name in made]
    both = [
        (x @ made[s.name].dense().double().T).norm() / (x @ port.weight(s).double().T).norm()
        for x in (rows.keep, rows.source)
        for s in sites
    ]
    return [float(x) for x in both[: len(sites)]], [float(x) for x in both[len(sites) :]]


TEN = "dog, tiger, horse, house, car, rocket, rose, beer, frog, penguin"


@pytest.mark.parametrize("filtered", [False, True])
def test_kept_words_hardly_change_at_the_defaults(port, filtered: bool) -> None:
    """A little where every direction of the text is used, as by the demo model's encoder; not at all where some aren't."""
    canvas = EmojiCanvasPort(EmojiCanvas.load())
    for concept in ("cat, kitty", "bomb, explosive"):
        kept, erased = changes(canvas, ConceptSpec.parse(concept, "", TEN), {"filter": filtered})
        assert max(kept) < (0.09 if filtered else 0.04) and min(erased) > 0.5
        assert min(kept) > 0.01, "not at all would be said otherwise"
    kept, erased = changes(port, ConceptSpec.parse("cat, kitty", "", "dog, tree"), {"filter": filtered})
    assert max(kept) < (0.2 if filtered else 1e-6) and min(erased) > 0.3


def test_a_threshold_of_zero_leaves_no_room_on_a_trained_encoder() -> None:
    with pytest.raises(ConceptError, match="keep: 10 kept words leave no direction in which SPEED could erase"):
        erase(
            EmojiCanvasPort(EmojiCanvas.load()),
            ConceptSpec.parse("cat", "", TEN),
            "speed",
            {"threshold": 0.0, "filter": False},
        )
