"""The contract of every registered attack, found by enumeration: a new attack is tested by being there."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptSpec
from erasure_core.attacks import (
    AttackSpec,
    AttackTarget,
    Found,
    Knowledge,
    Sampler,
    all_attacks,
    asking,
    attack,
    evaluate,
)
from erasure_core.attacks.sneaky_prompt import by_policy
from erasure_core.methods import settings_from
from erasure_core.operators.memory import Placement, PromptMemory

pytestmark = pytest.mark.core
ALL = list(all_attacks().values())
SPEC = ConceptSpec.parse("cat, kitty", "", "dog, tree")
QUICK = {
    "steps": 2, "times": 2, "generations": 2, "population": 6, "rounds": 2, "candidates": 4, "tries": 8, "tokens": 2,
    "pictures": 2, "batch": 2, "queries": 3, "variants": 2, "captions": 2, "look_every": 2, "rank": 2, "strengths": 2,
}  # fmt: skip
"""What makes an attack short; an attack takes those that it has."""
each = pytest.mark.parametrize("chosen", ALL, ids=lambda a: a.name)
each_white = pytest.mark.parametrize(
    "chosen", [a for a in ALL if a.knowledge is Knowledge.WHITE_BOX], ids=lambda a: a.name
)


def unsure(latents: Tensor) -> Tensor:
    """A judge that never recognises the concept, and prefers bright pictures."""
    return 0.3 * torch.sigmoid(latents.mean((1, 2, 3))).cpu()


def target_of(typing, **changes: Any) -> AttackTarget:
    erased, base = typing.erased(), typing()
    values = {"erased": erased, "base": base, "prompts": ("a cat", "one kitty here"), "words": erased.words_of(),
              "sampler": Sampler(3, 2.0, 4), **changes}  # fmt: skip
    return AttackTarget(**values)


def quick(chosen: AttackSpec, **more: Any) -> dict[str, Any]:
    fields = {f.name: f.default for f in dataclasses.fields(chosen.settings)}
    made = {k: v for k, v in QUICK.items() if k in fields}
    if isinstance(fields.get("words"), str):
        made["words"] = "puss, gato, feline, mouser"
    return {**made, **more}


def run(typing, chosen: AttackSpec, settings: Mapping[str, Any] | None = None, progress=None, **changes: Any) -> Found:
    if chosen.needs_look:
        changes.setdefault("look", unsure)
    return attack(target_of(typing, **changes), SPEC, chosen.name, {**quick(chosen), **(settings or {})}, progress)


def tensors(found: Found) -> list[Tensor]:
    made = [x for way in found.ways for x in (way.states, way.noise, way.picture, way.mask) if x is not None]
    return made + [d.dense() for d in found.change.values()]


def same(one: Found, two: Found) -> bool:
    texts = [[(w.label, w.prompt, w.strength, w.guidance) for w in f.ways] for f in (one, two)]
    a, b = tensors(one), tensors(two)
    return (
        texts[0] == texts[1] and len(a) == len(b) and all(map(torch.equal, a, b)) and one.losses == two.losses
        and one.queries == two.queries
    )  # fmt: skip


def test_the_suite_is_there_in_order() -> None:
    assert {
        "concept_inversion", "free_embedding", "mma_diffusion", "p4d", "rece_residual", "reentry", "relearning", "ring_a_bell",
        "sneaky_prompt", "synonyms", "tina", "unlearn_diff_atk",
    } <= set(all_attacks())  # fmt: skip
    assert list(all_attacks()) == sorted(all_attacks())
    assert all(name == a.name for name, a in all_attacks().items())
    assert {a.name for a in ALL if a.given} == {"reentry", "tina"}, "they begin with a picture of the concept"
    assert {a.name for a in ALL if a.teaches} == {"free_embedding"}, "docs/results/never_learned.md"


@each
def test_what_people_read(chosen: AttackSpec) -> None:
    assert chosen.name.isidentifier() and chosen.name == chosen.name.lower()
    assert chosen.title and chosen.paper.startswith("https://arxiv.org/abs/")
    assert 40 < len(chosen.summary) < 300 and chosen.summary.endswith(".")
    assert chosen.budget in {f.name for f in dataclasses.fields(chosen.settings)}


@each
def test_the_nodes_help_page_lists_every_setting(chosen: AttackSpec) -> None:
    """The one that effort scales first."""
    page = (Path(__file__).parents[2] / "web" / "docs" / "ErasureAttack.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| \*{chosen.name}\* \| (`.*) \|$", page, re.MULTILINE)
    listed = re.findall(r"`(\w+)`", row)
    assert listed[0] == chosen.budget
    assert sorted(listed) == sorted(f.name for f in dataclasses.fields(chosen.settings))


@each
def test_every_setting_has_help_a_range_and_a_default_inside(chosen: AttackSpec) -> None:
    assert dataclasses.is_dataclass(chosen.settings) and chosen.settings.__dataclass_params__.frozen
    for field in dataclasses.fields(chosen.settings):
        low, high, step = (field.metadata[k] for k in ("low", "high", "step"))
        assert len(field.metadata["help"]) > 20, field.name
        if isinstance(field.default, Enum | bool | str):
            assert low is high is None
        else:
            assert low <= field.default <= high and step > 0, field.name
            with pytest.raises(ValueError, match=field.name):
                settings_from(chosen, {field.name: math.nan})
            with pytest.raises(ValueError, match=field.name):
                settings_from(chosen, {field.name: high + 1})


@each
@pytest.mark.parametrize("given", [False, True])
def test_texts_are_read_before_a_network_is_opened(chosen: AttackSpec, given: bool, typing, read_late) -> None:
    """But for those of a judge's questions, which are made there."""
    if chosen.needs_look:
        pytest.skip("it draws what it has just written")
    pictures = torch.randn(3, 4, 4, 4) if given else None
    target = target_of(typing, pictures=pictures)
    target = dataclasses.replace(target, negative=target.erased.conditions(["a cat here"])[0])
    late = read_late(target.erased, target.base)
    attack(target, SPEC, chosen.name, quick(chosen))
    assert not late


@each
def test_the_same_seed_gives_the_same_find(chosen: AttackSpec, typing) -> None:
    one, target = run(typing, chosen), target_of(typing, look=unsure if chosen.needs_look else None)
    torch.rand(7)  # the global generator plays no part
    state = torch.get_rng_state()
    assert same(one, attack(target, SPEC, chosen.name, quick(chosen))) and torch.equal(state, torch.get_rng_state())
    assert one.ways and all(torch.isfinite(x).all() for x in tensors(one)) and all(math.isfinite(x) for x in one.losses)
    if "seed" in {f.name for f in dataclasses.fields(chosen.settings)}:
        assert not same(one, run(typing, chosen, {"seed": 5}))


@each
def test_neither_model_is_touched(chosen: AttackSpec, typing) -> None:
    target = target_of(typing, look=unsure)
    before = [{k: v.clone() for k, v in port.unet.state_dict().items()} for port in (target.erased, target.base)]
    encoder = {k: v.clone() for k, v in target.erased.encoder.state_dict().items()}
    attack(target, SPEC, chosen.name, quick(chosen))
    for port, old in zip((target.erased, target.base), before, strict=True):
        assert port.untouched() and all(torch.equal(v, old[k]) for k, v in port.unet.state_dict().items())
    assert all(torch.equal(v, encoder[k]) for k, v in target.erased.encoder.state_dict().items())
    assert (
        not any(p.requires_grad for p in target.erased.encoder.parameters()) and not torch.is_inference_mode_enabled()
    )


@each
def test_progress_rises_to_its_total_and_cancels_anywhere(chosen: AttackSpec, typing) -> None:
    class Cancelled(Exception):
        pass

    calls: list[tuple[int, int]] = []
    run(typing, chosen, progress=lambda done, total: calls.append((done, total)))
    assert len({total for _, total in calls}) == 1 and calls[-1][0] == calls[-1][1]
    assert [done for done, _ in calls] == sorted(done for done, _ in calls)
    for stop in {0, len(calls) // 2, len(calls) - 1}:
        left = iter(range(stop + 1))

        def progress(done: int, total: int, left=left, stop=stop) -> None:
            if next(left) == stop:
                raise Cancelled

        target = target_of(typing, look=unsure if chosen.needs_look else None)
        with pytest.raises(Cancelled):
            attack(target, SPEC, chosen.name, quick(chosen), progress)
        assert target.erased.untouched() and target.base.untouched() and torch.is_grad_enabled()


@each
def test_the_budget_bounds_the_work(chosen: AttackSpec, typing) -> None:
    """Passes of the network and of the text encoder, and finds: more with more budget, and at most in proportion."""

    def work(budget: int) -> tuple[int, ...]:
        target = target_of(typing, look=unsure if chosen.needs_look else None)
        found = attack(target, SPEC, chosen.name, quick(chosen, **{chosen.budget: budget}))
        return target.erased.passes[0], target.erased.encoded[0], len(found.ways)

    small, large = work(2), work(4)
    assert small != large and all(b <= 2 * a for a, b in zip(small, large, strict=True))


@each
def test_what_was_found_is_drawn_and_judged(chosen: AttackSpec, typing) -> None:
    target = target_of(typing, look=unsure)
    found = attack(target, SPEC, chosen.name, quick(chosen))
    result = evaluate(target, found, lambda latents: torch.linspace(0, 1, len(latents)), pictures=3)
    assert len(result.probabilities) == len(found.ways) == len(result.by_way) == len(result.succeeded)
    assert result.rate.n == len(result.latents) == sum(1 if way.noise is not None else 3 for way in found.ways)
    assert torch.isfinite(result.latents).all() and result.best in found.ways
    assert result.at(0.0).share == 1 and result.at(1.1).hits == 0
    again = evaluate(target, found, lambda latents: torch.zeros(len(latents)), pictures=3)
    assert torch.equal(again.latents, result.latents) and target.erased.untouched()


@each
def test_prompts_that_were_found_are_what_was_searched(chosen: AttackSpec, typing) -> None:
    """Typed text gives back the tokens: every word of a found prompt is one that the tokenizer knows."""
    if not chosen.needs_words:
        pytest.skip("it writes no prompts")
    target = target_of(typing, look=unsure)
    for way in attack(target, SPEC, chosen.name, quick(chosen)).ways:
        if way.states is None:
            assert target.words is not None
            ids = target.words.content(way.prompt)
            assert target.words.spell(ids) == way.prompt and 3 not in ids, "no unknown words"
            assert len(ids) <= target.words.room


@each_white
def test_a_memory_is_read(chosen: AttackSpec, typing) -> None:
    """With a memory the erased model is another one, and a white-box attack sees it."""
    if chosen.name == "rece_residual":
        pytest.skip("it reads weights, not predictions")
    memory = PromptMemory(2, 16, Placement.ALL, torch.Generator().manual_seed(3), shared=True, std=2.0, length=10)
    memory.requires_grad_(False)
    plain, read = run(typing, chosen), run(typing, chosen, memory=memory)
    assert plain.losses != read.losses or not all(map(torch.equal, tensors(plain), tensors(read)))


def test_what_is_missing_is_named(typing) -> None:
    with pytest.raises(ValueError, match="attack: 'magic' is unknown; there are concept_inversion, "):
        attack(target_of(typing), SPEC, "magic")
    with pytest.raises(ValueError, match="P4D writes prompts and needs the model's text encoder"):
        attack(target_of(typing, words=None), SPEC, "p4d")
    with pytest.raises(ValueError, match="SneakyPrompt learns from a judge's answers"):
        attack(target_of(typing), SPEC, "sneaky_prompt")
    with pytest.raises(ValueError, match="other text states than the model reads"):
        attack(target_of(typing, words=typing(seed=9).words_of()), SPEC, "p4d")
    with pytest.raises(ValueError, match="no prompts"):
        target_of(typing, prompts=())
    with pytest.raises(ValueError, match="synonyms: no words"):
        attack(target_of(typing), SPEC, "synonyms", {"words": "cat, Kitty"})
    with pytest.raises(ValueError, match="no setting 'nonsense'"):
        attack(target_of(typing), SPEC, "p4d", {"nonsense": 1})


def test_a_model_against_itself_scores_its_own_rate(typing) -> None:
    """Asking the base twice gives the same pictures, and no attack is made of nothing."""
    base = typing()
    target = target_of(typing, erased=base, base=base, words=base.words_of())
    one, two = (evaluate(target, asking(target), unsure, pictures=3) for _ in range(2))
    assert torch.equal(one.latents, two.latents) and one.rate == two.rate
    other = evaluate(target, asking(target), unsure, pictures=3, seed=1)
    assert not torch.equal(one.latents, other.latents)
    residual = attack(target, SPEC, "rece_residual", {"damping": 1e-10, "variants": 1})
    for way, cond in zip(residual.ways, base.conditions(target.prompts), strict=True):
        assert torch.allclose(way.states, cond.context[0], atol=1e-3), "nothing was erased, nothing is left over"


def test_a_policy_leaves_the_seeds_of_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda _: pytest.fail("seeded"))
    before = torch.random.get_rng_state()
    by_policy(lambda chosen: 0.0, 5, all_attacks()["sneaky_prompt"].settings(queries=2), "test", lambda answer: False)
    assert torch.equal(torch.random.get_rng_state(), before)
