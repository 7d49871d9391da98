"""The contract of every registered method, found by enumeration: a new method is tested by being there."""

from __future__ import annotations

import dataclasses
import math
from enum import Enum
from pathlib import Path

import pytest
import torch

from erasure_core import ConceptSpec, Erasure, Family, ModelPort, all_methods, erase, load, save
from erasure_core.analytic import AnalyticPort
from erasure_core.methods import MethodSpec, settings_from

pytestmark = pytest.mark.core
ALL = list(all_methods().values())
SPEC = ConceptSpec.parse("red apple, apple\nfurry cat", "pear", "dog, green tree")
each = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)


def weights(port: AnalyticPort) -> dict[str, bytes]:
    return {name: w.numpy().tobytes() for name, w in port._weights.items()}


def same(one: Erasure, other: Erasure) -> bool:
    pairs = [(d, other.deltas[n]) for n, d in one.deltas.items()]
    return one.header == other.header and all(torch.equal(a.up, b.up) and torch.equal(a.down, b.down) for a, b in pairs)


def test_the_three_methods_are_there_in_order() -> None:
    assert {"uce", "rece", "speed"} <= set(all_methods())
    assert list(all_methods()) == sorted(all_methods())
    assert all(name == m.name for name, m in all_methods().items())


@each
def test_what_people_read(method: MethodSpec) -> None:
    assert method.name.isidentifier() and method.name == method.name.lower()
    assert method.title and method.paper.startswith("https://arxiv.org/abs/")
    assert 40 < len(method.summary) < 300 and method.summary.endswith(".")


@each
def test_every_setting_has_help_a_range_and_a_default_inside(method: MethodSpec) -> None:
    assert dataclasses.is_dataclass(method.settings) and method.settings.__dataclass_params__.frozen
    for field in dataclasses.fields(method.settings):
        low, high, step = (field.metadata[k] for k in ("low", "high", "step"))
        assert len(field.metadata["help"]) > 20, field.name
        if isinstance(field.default, Enum | bool):
            assert low is high is None
        else:
            assert low <= field.default <= high and step > 0, field.name
            assert all(isinstance(v, int) for v in (low, high, step)) or isinstance(field.default, float), field.name


@each
def test_unknown_wrong_and_outlying_settings_are_refused(method: MethodSpec) -> None:
    with pytest.raises(ValueError, match=r"no setting 'nonsense'; there are "):
        settings_from(method, {"nonsense": 1})
    for field in dataclasses.fields(method.settings):
        wrong = ["nonsense", None, [1]]
        if not isinstance(field.default, Enum | bool):
            wrong += [math.nan, math.inf, True, field.metadata["high"] + 1, field.metadata["low"] - 1]
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            wrong += [field.default + 0.5]
        for value in wrong:
            with pytest.raises(ValueError, match=field.name):
                settings_from(method, {field.name: value})


@each
def test_a_choice_by_its_text_is_the_choice(method: MethodSpec, port) -> None:
    for field in dataclasses.fields(method.settings):
        if isinstance(field.default, Enum):
            for member in type(field.default):
                assert getattr(settings_from(method, {field.name: member.value}), field.name) is member
                by_text, by_member = (
                    erase(port, SPEC, method.name, {field.name: v}) for v in (str(member.value), member)
                )
                assert same(by_text, by_member)


@each
def test_both_ends_of_every_range_run(method: MethodSpec, port) -> None:
    for field in dataclasses.fields(method.settings):
        for end in (field.metadata["low"], field.metadata["high"]):
            if end is not None:
                result = erase(port, SPEC, method.name, {field.name: end})
                assert all(torch.isfinite(d.dense()).all() for d in result.deltas.values()), f"{field.name} = {end}"


@each
def test_same_input_same_artefact_and_the_base_untouched(method: MethodSpec, port) -> None:
    before = weights(port)
    assert same(erase(port, SPEC, method.name), erase(AnalyticPort(), SPEC, method.name))
    torch.rand(7)  # the global generator plays no part
    assert same(erase(port, SPEC, method.name), erase(AnalyticPort(), SPEC, method.name))
    assert weights(port) == before
    state = torch.get_rng_state()
    erase(port, SPEC, method.name)
    assert torch.equal(state, torch.get_rng_state())


@each
def test_it_erases(method: MethodSpec) -> None:
    """The outputs of the value layers for the concept go at least half of the way to the replacement's."""
    port = AnalyticPort(width=96)
    result = erase(port, ConceptSpec.parse("cat", "dog", "bird"), method.name)
    cat, dog = (port.text([p])[0].states[1] for p in ("cat", "dog"))
    for site in port.sites():
        if site.role == "text_value":
            w, d = port.weight(site), result.deltas[site.name].dense()
            assert ((w + d) @ cat - w @ dog).norm() < 0.5 * (w @ cat - w @ dog).norm()


@each
def test_progress_rises_to_its_total(method: MethodSpec, port) -> None:
    calls: list[tuple[int, int]] = []
    erase(port, SPEC, method.name, progress=lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[-1][0] == calls[-1][1]


@each
def test_cancelling_at_any_step_leaves_everything_as_it_was(method: MethodSpec, port) -> None:
    class Cancelled(Exception):
        pass

    before, expected, calls = weights(port), erase(port, SPEC, method.name), []
    erase(port, SPEC, method.name, progress=lambda *step: calls.append(step))
    for stop in range(len(calls)):
        seen = iter(range(len(calls)))

        def progress(done: int, total: int, stop: int = stop, seen=seen) -> None:
            if next(seen) == stop:
                raise Cancelled

        with pytest.raises(Cancelled):
            erase(port, SPEC, method.name, progress=progress)
    assert weights(port) == before
    assert torch.is_grad_enabled()
    assert same(erase(port, SPEC, method.name), expected)


@each
def test_it_survives_a_file(method: MethodSpec, port, tmp_path: Path) -> None:
    result = erase(port, SPEC, method.name)
    again = load(save(result, tmp_path / "x.safetensors"))
    assert again.header == result.header
    for name, delta in again.deltas.items():
        dense = result.deltas[name].dense()
        assert (delta.dense() - dense).norm() < 1e-5 * dense.norm()


@each
def test_a_model_without_cross_attention_is_refused_with_a_sentence(method: MethodSpec) -> None:
    class Flux(AnalyticPort):
        def sites(self):
            return []

    port = Flux()
    port.family = Family("flux", 4096, 1, 1)
    with pytest.raises(ValueError, match=r"model: flux has no separate text .* It works on SD 1\.x, SD 2\.x and SDXL"):
        erase(port, SPEC, method.name)


@each
def test_long_prompts_and_many_concepts(method: MethodSpec) -> None:
    port = AnalyticPort(length=77, width=160)
    long = " ".join(f"w{i}" for i in range(300))
    spec = ConceptSpec.parse(f"{long}\n" + "\n".join(f"thing{i}" for i in range(20)), "pear")
    result = erase(port, spec, method.name, {"templates": "none"})
    assert any(d.rank for d in result.deltas.values())
    assert all(torch.isfinite(d.dense()).all() for d in result.deltas.values())


def test_unknown_methods_and_the_port_protocol(port) -> None:
    with pytest.raises(ValueError, match="method: 'magic' is unknown; there are rece, speed, uce"):
        erase(port, SPEC, "magic")
    assert isinstance(port, ModelPort)
