"""The contract of every registered method, found by enumeration: a new method is tested by being there.

Closed-form methods run on the analytic port, trained ones for a few steps on the tiny trainable one.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure_core import ConceptSpec, Delta, Erasure, Family, ModelPort, TextStates, all_methods, erase, load, save
from erasure_core.analytic import AnalyticPort
from erasure_core.emojicanvas.text import TextConfig, TextEncoder
from erasure_core.methods import Aids, MethodSpec, Progress, settings_from
from erasure_core.operators.checkpoint import Checkpoint
from erasure_core.operators.search import TokenSlot
from erasure_core.operators.train_loop import Trainer, TrainingFailedError
from erasure_core.operators.trainable import TrainableModel
from erasure_core.pairs import ConceptPairs

pytestmark = pytest.mark.core
ALL = list(all_methods().values())
SPEC = ConceptSpec.parse("red apple, apple\nfurry cat", "pear", "dog, green tree")
QUICK = {
    "iterations": 2, "sample_steps": 2, "rounds": 1, "mine_steps": 2, "pictures": 2, "looks": 1, "anchors": 1, "nearest": 4,
    "vocabulary": "house, tree, river, stone, bread", "learning_rate": 1e-3, "stages": 2, "attack_steps": 2,
}  # fmt: skip
"""What makes a training short; a method takes those that it has."""
each = pytest.mark.parametrize("method", ALL, ids=lambda m: m.name)
each_closed = pytest.mark.parametrize("method", [m for m in ALL if not m.trains], ids=lambda m: m.name)
each_trained = pytest.mark.parametrize("method", [m for m in ALL if m.trains], ids=lambda m: m.name)


@pytest.fixture
def make(tiny) -> Callable[[MethodSpec], Any]:
    """A new port that the method works on."""
    return lambda method: type(tiny)() if method.trains else AnalyticPort()


def run(
    port: Any,
    method: MethodSpec,
    settings: Mapping[str, Any] | None = None,
    spec: ConceptSpec = SPEC,
    progress: Progress | None = None,
    **aids: Any,
) -> Erasure:
    """A short run with pairs for those that need them, and a text encoder for those that search for words."""
    names = {f.name for f in dataclasses.fields(method.settings)} if method.trains else set()
    chosen = {**{k: v for k, v in QUICK.items() if k in names}, **(settings or {})}
    unsafe, safe = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    pairs = ConceptPairs(unsafe, safe, (("apple", "pear"),), port.family)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        encoder = TextEncoder(TextConfig(16, 2, 2)).requires_grad_(False)
    ids = torch.tensor([[49406, 320, 1000, 2000, 3000, 49407]])
    everything = Aids(pairs=pairs, slot=lambda n: TokenSlot(encoder, ids, range(1, 5)[:n]), **aids)
    return erase(port, spec, method.name, chosen, progress, everything)


def weights(port: Any) -> dict[str, bytes]:
    named = port._weights if isinstance(port, AnalyticPort) else port.unet.state_dict()
    return {name: w.numpy().tobytes() for name, w in named.items()}


def same(one: Erasure, other: Erasure) -> bool:
    def equal(a: Delta, b: Delta) -> bool:
        return torch.equal(a.up, b.up) and (a.down is b.down is None or torch.equal(a.down, b.down))

    return one.header == other.header and all(equal(d, other.deltas[n]) for n, d in one.deltas.items())


def finite(erasure: Erasure) -> bool:
    return all(torch.isfinite(d.dense()).all() for d in erasure.deltas.values())


def test_the_methods_are_there_in_order() -> None:
    assert {"uce", "rece", "speed", "esd", "duo", "kpop", "dark_miner"} <= set(all_methods())
    assert list(all_methods()) == sorted(all_methods())
    assert all(name == m.name for name, m in all_methods().items())


@each
def test_what_people_read(method: MethodSpec) -> None:
    assert method.name.isidentifier() and method.name == method.name.lower()
    assert method.title and re.match(r"https://(arxiv\.org/abs/|openreview\.net/forum|github\.com/)", method.paper)
    assert 40 < len(method.summary) < 300 and method.summary.endswith(".")


@each
def test_every_setting_has_help_a_range_and_a_default_inside(method: MethodSpec) -> None:
    assert dataclasses.is_dataclass(method.settings) and method.settings.__dataclass_params__.frozen
    for field in dataclasses.fields(method.settings):
        low, high, step = (field.metadata[k] for k in ("low", "high", "step"))
        assert len(field.metadata["help"]) > 10, field.name
        if isinstance(field.default, Enum | bool | str):
            assert low is high is None
        else:
            assert low <= field.default <= high and step > 0, field.name
            assert all(isinstance(v, int) for v in (low, high, step)) or isinstance(field.default, float), field.name


@each
def test_unknown_wrong_and_outlying_settings_are_refused(method: MethodSpec) -> None:
    with pytest.raises(ValueError, match=r"no setting 'nonsense'; there are "):
        settings_from(method, {"nonsense": 1})
    for field in dataclasses.fields(method.settings):
        wrong = [None, [1]]
        if isinstance(field.default, Enum) or not isinstance(field.default, str):
            wrong += ["nonsense"]
        if not isinstance(field.default, Enum | bool | str):
            wrong += [math.nan, math.inf, True, field.metadata["high"] + 1, field.metadata["low"] - 1]
        if isinstance(field.default, int) and not isinstance(field.default, bool):
            wrong += [field.default + 0.5]
        for value in wrong:
            with pytest.raises(ValueError, match=field.name):
                settings_from(method, {field.name: value})


@each
def test_a_choice_by_its_text_is_the_choice(method: MethodSpec, make) -> None:
    for field in dataclasses.fields(method.settings):
        if isinstance(field.default, Enum):
            for member in type(field.default):
                assert getattr(settings_from(method, {field.name: member.value}), field.name) is member
                assert settings_from(method, {field.name: member}) == settings_from(method, {field.name: member.value})
                if member is not field.default:  # which all other tests run
                    assert finite(run(make(method), method, {field.name: str(member.value)}))


@each
def test_both_ends_of_every_range_run(method: MethodSpec, make) -> None:
    """Of trained methods all low ends in one run; the high end of a whole number, but the seed's, is an amount of work and is
    only checked to be accepted."""
    ends = [(f, end, f.metadata[end]) for f in dataclasses.fields(method.settings) for end in ("low", "high")]
    ends = [(field, end, value) for field, end, value in ends if value is not None]
    runs = [{field.name: value} for field, end, value in ends]
    if method.trains:
        runs = [{field.name: value for field, end, value in ends if end == "low"}]
        runs += [
            {f.name: v} for f, end, v in ends if end == "high" and (isinstance(f.default, float) or f.name == "seed")
        ]
    for field, _, value in ends:
        assert getattr(settings_from(method, {field.name: value}), field.name) == value
    for values in runs:
        try:
            result = run(make(method), method, values)
        except TrainingFailedError as error:
            assert method.trains and "Lower the learning rate" in str(error), values
        else:
            assert finite(result), values


@each
def test_same_input_same_artefact_and_the_base_untouched(method: MethodSpec, make) -> None:
    port = make(method)
    before = weights(port)
    state = torch.get_rng_state()
    first = run(port, method)
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(7)  # the global generator plays no part
    assert same(first, run(make(method), method))
    assert any(d.dense().any() for d in first.deltas.values())
    assert weights(port) == before
    assert not method.trains or port.untouched()


@each_closed
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
def test_progress_rises_to_its_total(method: MethodSpec, make) -> None:
    calls: list[tuple[int, int]] = []
    run(make(method), method, progress=lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    assert calls[0][0] == 0 and calls[-1][0] == calls[-1][1]


@pytest.mark.parametrize("name", ["adversarial", "concept_ablation", "forget_me_not"])
def test_pictures_that_it_draws_first_are_told_of(name: str, make) -> None:
    """Before any step, and whoever listens gets the same erasure."""
    method, calls = all_methods()[name], []
    made = run(
        make(method),
        method,
        progress=lambda done, total: calls.append(("step", done, total)),
        drawing=lambda done, total: calls.append(("drawing", done, total)),
    )
    kinds = [kind for kind, *_ in calls]
    assert kinds == sorted(kinds) and kinds[0] == "drawing" and kinds[-1] == "step"
    assert all(0 <= done < total for kind, done, total in calls if kind == "drawing")
    assert same(made, run(make(method), method))


@each
def test_cancelling_at_any_step_leaves_everything_as_it_was(method: MethodSpec, make) -> None:
    class Cancelled(Exception):
        pass

    port, calls = make(method), []
    before = weights(port)
    expected = run(port, method, progress=lambda *step: calls.append(step))
    for stop in range(len(calls)):
        seen = iter(range(len(calls)))

        def progress(done: int, total: int, stop: int = stop, seen=seen) -> None:
            if next(seen) == stop:
                raise Cancelled

        with pytest.raises(Cancelled):
            run(port, method, progress=progress)
    assert weights(port) == before
    assert not method.trains or port.untouched()
    assert torch.is_grad_enabled()
    assert same(run(port, method), expected)


@each
def test_it_survives_a_file(method: MethodSpec, make, tmp_path: Path) -> None:
    result = run(make(method), method)
    again = load(save(result, tmp_path / "x.safetensors"))
    assert again.header == result.header
    assert set(again.deltas) == {name for name, d in result.deltas.items() if d.rank}
    for name, delta in again.deltas.items():
        dense = result.deltas[name].dense()
        assert (delta.dense() - dense).norm() <= 1e-5 * dense.norm()


@each
def test_a_model_without_cross_attention_is_refused_with_a_sentence(method: MethodSpec, make, monkeypatch) -> None:
    port = make(method)
    monkeypatch.setattr(port, "sites", lambda: [])
    port.family = Family("flux", 4096, 1, 1)
    with pytest.raises(ValueError, match=r"model: flux has no separate text .* It works on SD 1\.x, SD 2\.x and SDXL"):
        run(port, method)


@each
def test_long_prompts_and_many_concepts(method: MethodSpec, make) -> None:
    port = make(method) if method.trains else AnalyticPort(length=77, width=160)
    long = " ".join(f"w{i}" for i in range(300))
    spec = ConceptSpec.parse(f"{long}\n" + "\n".join(f"thing{i}" for i in range(20)), "pear")
    result = run(port, method, {} if method.trains else {"templates": "none"}, spec)
    assert any(d.rank for d in result.deltas.values())
    assert finite(result)


@pytest.mark.parametrize(("name", "ranks"), [("spm", 3), ("cpe", 3), ("leco", 1), ("adversarial", 1)])
def test_whose_rank_is_each_concepts(name: str, ranks: int, make) -> None:
    method = all_methods()[name]
    assert method.rank_each is (ranks > 1)
    one, three = (
        run(make(method), method, {"rank": 2}, ConceptSpec.parse(text, "pear", "dog"))
        for text in ("apple", "apple\ncat\nhouse")
    )
    assert max(d.rank for d in three.deltas.values()) == ranks * max(d.rank for d in one.deltas.values()) == 2 * ranks


@each_trained
def test_every_concept_has_its_own_steps(method: MethodSpec, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five concepts in the steps of one are met so seldom that most of them stay. DUO looks at pairs, not at words."""
    steps: list[int] = []
    run_ = Trainer.run
    monkeypatch.setattr(Trainer, "run", lambda self, *x, **y: steps.append(self.iterations) or run_(self, *x, **y))
    run(make(method), method, spec=ConceptSpec.parse("red apple, apple", "pear", "dog"))
    alone, steps[:] = sum(steps), []
    run(make(method), method, spec=ConceptSpec.parse("red apple, apple\nfurry cat\nred house", "pear", "dog"))
    assert sum(steps) == (1 if method.needs_pairs else 3) * alone > 0


@each_trained
def test_prompts_of_several_sections(method: MethodSpec, make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text encoders lay the sections of a long prompt end to end: texts of unlike length, in one step and one table."""
    port = make(method)
    text = port.text

    def sections(prompts: Sequence[str]) -> list[TextStates]:
        made = text(prompts)
        long = [len(x.prompt.split()) > 2 for x in made]
        return [
            TextStates(x.prompt, x.states.repeat(2, 1), x.kinds.repeat(2)) if more else x
            for x, more in zip(made, long, strict=True)
        ]

    monkeypatch.setattr(port, "text", sections)
    spec = ConceptSpec.parse("small red apple, apple\nfurry cat", "big old pear", "dog, very green tree")
    names = {f.name for f in dataclasses.fields(method.settings)}
    more = {"batch": 3, "vocabulary": "house, tree by the river, stone", "pictures": 4}
    dark = (torch.randn(6, 16), torch.randn(12, 16))
    assert finite(run(port, method, {k: v for k, v in more.items() if k in names}, spec, dark=dark))


@each
def test_dark_embeddings_are_erased_too(method: MethodSpec, make) -> None:
    """All methods take them; those that read text do something else with them than without (DUO reads none)."""
    port = make(method)
    like = port.text(["x"])[0].states
    dark = torch.randn(2, *like.shape, generator=torch.Generator().manual_seed(3)).to(like)
    result = run(port, method, dark=tuple(dark))
    assert finite(result)
    assert same(result, run(make(method), method, dark=tuple(dark)))
    if not method.needs_pairs:
        assert not same(result, run(make(method), method))


@each_trained
def test_cut_off_and_resumed_it_ends_as_if_it_had_not_been(method: MethodSpec, make, tmp_path: Path) -> None:
    """Bit for bit, from any of its iterations or rounds; a state of other settings is not taken up."""
    state = tmp_path / "state.safetensors"
    keep = Checkpoint(state, seconds=0.0)
    longer = {} if method.name in ("cpe", "dark_miner") else {"iterations": 4}
    calls: list[int] = []
    expected = run(make(method), method, longer, progress=lambda done, _: calls.append(done))

    class Gone(Exception):
        pass

    def cut(at: int) -> Progress:
        def progress(done: int, total: int) -> None:
            if done >= at:
                raise Gone

        return progress

    for at in range(1, calls[-1] + 1):
        with pytest.raises(Gone):
            run(make(method), method, longer, progress=cut(at), checkpoint=keep)
    assert state.is_file()
    left = state.read_bytes()
    seen: list[int] = []
    made = run(make(method), method, longer, progress=lambda done, _: seen.append(done), checkpoint=keep)
    assert same(made, expected) and not state.exists()
    assert len(seen) < len(calls), "it went on from where it was"

    other = {**longer, "seed": 1}
    state.write_bytes(left)
    made = run(make(method), method, other, checkpoint=keep)
    assert same(made, run(make(method), method, other)) and not state.exists()
    state.write_bytes(left[:-3])
    assert same(run(make(method), method, longer, checkpoint=keep), expected), "a broken file is none"


@each_trained
def test_texts_are_read_before_the_network_is_opened(method: MethodSpec, make, read_late) -> None:
    port = make(method)
    late = read_late(port)
    run(port, method)
    assert not late and port.replicas


@each_trained
def test_whether_a_method_computes_in_full_precision_is_declared(method: MethodSpec, make, monkeypatch) -> None:
    """The memory estimate goes by it."""
    asked = []
    monkeypatch.setattr(TrainableModel, "precise", lambda self: asked.append(self))
    run(make(method), method)
    assert bool(asked) is method.precise


@each
def test_whether_a_method_asks_a_judge_is_declared(method: MethodSpec, make) -> None:
    asked = []

    def look(latents: torch.Tensor) -> torch.Tensor:
        asked.append(len(latents))
        return torch.ones(len(latents))

    run(make(method), method, looks=(look,))
    assert bool(asked) is method.asks_judge
    assert ("judge" in method.ignores(SPEC, Aids(looks=(look,)))) is (not method.asks_judge)


@each_trained
def test_no_step_waits_for_the_device(method: MethodSpec, tiny, waits, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device tensors have no contents: whatever reads one, or brings one to the host, fails. What is brought to
    the device is counted, but for the first step, which may set things up."""
    if method.name == "dark_miner":
        pytest.skip("it looks at what it found between its loops; they are those of search and train_loop")

    class Ended(Exception):
        pass

    def progress(done: int, total: int) -> None:
        waits.on = done > 0
        if done == total:
            raise Ended

    net = copy.deepcopy(tiny.unet).to("meta")
    monkeypatch.setattr(tiny, "trainable", lambda: TrainableModel(net, tiny.schedule, tiny.prediction, (4, 4, 4)))
    monkeypatch.setattr(Trainer, "_read", lambda *_: None)  # once in many steps, on purpose
    with pytest.raises(Ended), waits:
        run(tiny, method, progress=progress)
    assert waits.seen == 0


@each_trained
def test_training_is_watched_and_refused_where_it_cannot_be(method: MethodSpec, make, port) -> None:
    seen: list[Mapping[str, float]] = []
    run(make(method), method, watch=lambda model, done, losses: seen.append(losses))
    assert seen and all(math.isfinite(v) for losses in seen for v in losses.values())
    with pytest.raises(ValueError, match=rf"model: {method.title} trains, which AnalyticPort can't do"):
        run(port, method)
    if method.needs_pairs:
        with pytest.raises(ValueError, match=rf"pairs: {method.title} learns from pairs of pictures"):
            erase(make(method), SPEC, method.name)


PARTS = ("replace_with", "keep", "keep_everyday", "dark")


def part_of(name: str, port: Any) -> tuple[ConceptSpec, dict[str, Any]]:
    """A request with one part filled in beside the concept, and the aids of it."""
    texts = {"replace_with": "pear", "keep": "dog"}
    spec = ConceptSpec.parse(
        "apple", **({name: texts[name]} if name in texts else {}), everyday=name == "keep_everyday"
    )
    states = port.text(["brown bread"])[0].states
    return spec, {"dark": (states,)} if name == "dark" else {}


@each
def test_what_a_method_does_not_look_at_changes_nothing_and_is_told_apart(method: MethodSpec, make) -> None:
    plain = run(make(method), method, spec=ConceptSpec.parse("apple"))
    for part in PARTS:
        unread = part in method.unread
        spec, aids = part_of(part, make(method))
        made = run(make(method), method, spec=spec, **aids)
        unchanged = all(torch.equal(d.dense(), made.deltas[n].dense()) for n, d in plain.deltas.items())
        always = method.name == "cpe" and part == "keep_everyday"  # it holds them in any case
        assert unchanged == (unread or always)
        assert made.header.spec == spec and (part in made.header.unread) == unread
        assert (part in method.ignores(spec, Aids(**aids))) == unread


def test_a_summary_names_only_what_was_held(port, tmp_path: Path) -> None:
    spec = ConceptSpec.parse("cat", "dog", "bird", everyday=True)
    assert "kept: bird, everyday words" in erase(port, spec, "uce").summary()
    fast = erase(port, spec, "speed")
    assert "kept: bird\n" in fast.summary() and fast.header.spec == spec, "merging goes by what was asked for"
    save(fast, tmp_path / "fast.safetensors")
    assert load(tmp_path / "fast.safetensors").header == fast.header
    methods = all_methods()
    assert methods["uce"].ignores(spec, Aids()) == ()
    assert methods["duo"].ignores(spec, Aids()) == ("replace_with", "keep", "keep_everyday")
    pairs = ConceptPairs(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), (("a", "b"),), port.family)
    assert methods["speed"].ignores(spec, Aids(pairs=pairs)) == ("keep_everyday", "pairs")
    assert methods["duo"].ignores(ConceptSpec.parse("cat"), Aids(pairs=pairs)) == ()


def test_unknown_methods_and_the_port_protocol(port) -> None:
    with pytest.raises(ValueError, match=r"method: 'magic' is unknown; there are .*, rece, .*, uce"):
        erase(port, SPEC, "magic")
    assert isinstance(port, ModelPort)


def test_embeddings_of_a_concept_that_is_not_there(make) -> None:
    for owners, sentence in (
        ((2,), "owners: 2 is no number of the 2 concepts"),
        ((0, 1), "don't match up"),
        ((-1,), "don't"),
    ):
        with pytest.raises(ValueError, match=sentence):
            run(make(all_methods()["uce"]), all_methods()["uce"], dark=(torch.zeros(6, 16),), owners=owners)
