"""What the page about training speed counts: every pass, what its gradients reached, and which steps it belongs to."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from erasure_core.emojicanvas.bench import passes_page as page_module
from erasure_core.emojicanvas.bench.pass_meter import Back, Interval, Pass, Took
from erasure_core.emojicanvas.bench.passes import Cost, costs, heard
from erasure_core.emojicanvas.bench.passes_page import passes_page, table, verdict
from erasure_core.emojicanvas.bench.rows import Bench, Plan
from erasure_core.emojicanvas.splits import SCORING
from erasure_core.emojicanvas.studio import Sampler
from erasure_core.emojicanvas.testbed import TESTBED
from erasure_core.emojicanvas.weights import BUNDLE, JUDGE
from erasure_core.operators.train_loop import Phase

pytestmark = pytest.mark.core


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(
        Plan(BUNDLE, JUDGE, Sampler(4, 4.0), SCORING, 1, 1, "", tmp_path_factory.mktemp("cells"), 32, ("rose",))
    )


def passes_of(bench: Bench, method: str) -> list[list[Pass]]:
    step = Phase.step
    found = heard(bench, method, 2)
    assert Phase.step is step, "steps are heard only meanwhile"
    return [x.passes for x in found if x.phases]


def test_a_regression_makes_a_student_and_a_frozen_pass_behind_its_sampling(bench) -> None:
    for passes in passes_of(bench, "leco"):
        *drawn, student, frozen = passes
        assert (student.latents, student.back) == (8, Back.OUTPUTS), "the concept and a kept word, four of each"
        assert frozen.back is Back.NOWHERE and not frozen.grad
        assert drawn and all(p.latents == 8 and p.back is Back.NOWHERE for p in drawn), "four, guided"


def test_gradients_are_followed_to_where_they_go(bench) -> None:
    kpop = [p.back for passes in passes_of(bench, "kpop") for p in passes if p.grad]
    assert kpop == [Back.TEXT, Back.TEXT, Back.WEIGHTS, Back.WEIGHTS] * 2, "the memory's step, then the weights'"
    steered = [p.back for passes in passes_of(bench, "forget_me_not") for p in passes if p.grad]
    assert Back.ATTENTION in steered and Back.NOWHERE not in steered
    assert not any(passes_of(bench, "cpe")), "no pass of the network"


def test_a_pass_is_repeated_in_the_type_that_it_computed_in(bench, monkeypatch) -> None:
    small = {"sample_steps": 2, "batch": 1}  # without AVX-512, bfloat16 is twenty times as slow as float32
    monkeypatch.setitem(TESTBED, "leco", {**TESTBED["leco"], **small})
    for half in (True, False):
        monkeypatch.setattr(bench.studio, "bf16", half)
        passes = [p for step in passes_of(bench, "leco") for p in step if p.grad]
        assert passes and all(p.half is half for p in passes)


def test_costs_are_medians_by_kind_of_step() -> None:
    once = [Pass(8, 77, False), Pass(4, 77, True, Back.WEIGHTS)]
    steps = [Interval(("a",), once, Took(s, 2.2), Took(1.0, 2.0)) for s in (9, 9, 9, 1.2, 1.1, 5.0)]
    found = costs(
        "m", [Interval((), once, Took(3, 3), Took(1, 1)), *steps, *[Interval(("b",), [], Took(1, 1), Took(0, 0))] * 4]
    )
    assert found[0] == Cost("m", "a", 3, 1.0, 8.0, 1.0, 4.0, 1.2, 1.0, 1.2, pytest.approx(1.1))
    assert found[1].multiple is None and found[1].steps == 1
    assert "**1.20** | 1.10 |" in table(found) and "- | - |" in table(found)
    assert verdict(found).startswith("**missed**") and "m (a): 1.20" in verdict(found)
    assert verdict(found[1:]).startswith("met")


def test_the_page(bench, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    step = Interval(("train",), [Pass(12, 77, False), Pass(12, 77, True, Back.OUTPUTS)], Took(1.1, 1), Took(1, 1))
    monkeypatch.setattr(page_module, "heard", lambda bench, method, steps: [step] * 5)
    passes_page(bench, ["duo"])
    page = Path("docs/results/passes.md").read_text(encoding="utf-8")
    assert "| duo | train | 1.0 of 12 | 1.0 of 12 | 1100 ms | 1000 ms | 1.10 | 1.00 |" in page
    known = json.loads(Path("docs/results/passes.json").read_text(encoding="utf-8"))
    assert [c["method"] for c in known["steps"]] == ["duo", "suppress mode"]
