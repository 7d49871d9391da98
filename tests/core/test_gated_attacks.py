"""Gated erasures under attack: every prompt meets the gates that it opens, as in the model that is patched for it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from attack_targets import quiet
from torch import Tensor

from erasure_core import (
    AttackTarget,
    ConceptSpec,
    Delta,
    Erasure,
    GatedPort,
    WrongModelError,
    erase,
    gate_strengths,
    gated,
)
from erasure_core.analytic import AnalyticPort
from erasure_core.attacks import Sampler, Way, all_attacks, asking, attack, evaluate
from erasure_core.attacks.target import Found
from erasure_core.emojicanvas.bench.red_team import words_of
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort

pytestmark = pytest.mark.core
ASKED = ("a cat", "a drawing of a beer")


@pytest.fixture(scope="module")
def model() -> EmojiCanvas:
    return EmojiCanvas.load()


@pytest.fixture(scope="module")
def erasures(model: EmojiCanvas) -> list[Erasure]:
    """Of a cat and of a beer, in all layers, one of them dense; strong enough to be seen."""
    port, g, made = EmojiCanvasPort(model), torch.Generator().manual_seed(3), []
    for word, dense in (("cat", False), ("beer", True)):
        header = erase(port, ConceptSpec.parse(word), "uce").header
        deltas = {}
        for site in port.linears():
            up, down = torch.randn(site.d_out, 2, generator=g), torch.randn(2, site.d_in, generator=g)
            delta = Delta(0.05 * up, down / site.d_in**0.5)
            deltas[site.name] = Delta(delta.dense()) if dense else delta
        made.append(Erasure(header, deltas))
    return made


def patched(model: EmojiCanvas, erasures: list[Erasure], prompt: str) -> EmojiCanvasPort:
    """What the node Gate Erasures makes for one prompt: weights."""
    return EmojiCanvasPort(model, gated(EmojiCanvasPort(model), erasures, prompt))


def drawn(port, prompt: str, cond=None) -> Tensor:
    null, cond = port.conditions([""])[0], cond or port.conditions([prompt])[0]
    with port.trainable() as net:
        noise = net.noise(1, torch.Generator().manual_seed(1))
        return net.denoise(noise, net.schedule.trajectory(3), cond, null, guidance=4.0)


@pytest.mark.parametrize("prompt", [*ASKED, "a kitty with a crown", "a house", "beer"])
def test_a_prompt_is_drawn_as_by_the_model_that_is_patched_for_it(model, erasures, prompt: str) -> None:
    port = GatedPort(EmojiCanvasPort(model), erasures, ASKED)
    expected = drawn(patched(model, erasures, prompt), prompt)
    assert torch.allclose(drawn(port, prompt), expected, atol=1e-4)
    if max(gate_strengths(port, erasures, prompt)) > 0.5:
        assert (expected - drawn(EmojiCanvasPort(model), prompt)).abs().max() > 1e-2, "the erasure is seen"


def test_prompts_side_by_side_have_each_their_own(model, erasures) -> None:
    port = GatedPort(EmojiCanvasPort(model), erasures, ASKED)
    prompts = ["a cat", "a beer", "a house"]
    target = AttackTarget(port, EmojiCanvasPort(model), ASKED, sampler=Sampler(3, 4.0, 8))
    found = Found(tuple(Way(p, p) for p in prompts))
    together = evaluate(target, found, lambda z: torch.zeros(len(z)), pictures=2).latents
    for i, prompt in enumerate(prompts):
        alone = AttackTarget(patched(model, erasures, prompt), target.base, ASKED, sampler=target.sampler)
        expected = evaluate(alone, Found((Way(prompt, prompt),)), lambda z: torch.zeros(len(z)), pictures=2).latents
        assert torch.allclose(together[2 * i : 2 * i + 2], expected, atol=1e-4), prompt


def test_states_that_were_found_are_read_as_if_the_asked_prompt_stood_at_the_gate(model, erasures) -> None:
    plain = EmojiCanvasPort(model)
    port = GatedPort(plain, erasures, ["a cat"])
    states = plain.conditions(["a crown"])[0].context
    with_them = port.conditions([""])[0].with_context(states)
    expected = drawn(patched(model, erasures, "a cat"), "", plain.conditions(["a crown"])[0])
    assert torch.allclose(drawn(port, "", with_them), expected, atol=1e-4)
    for site in plain.linears()[:6]:
        assert torch.allclose(port.weight(site), patched(model, erasures, "a cat").weight(site), atol=1e-5)
    widest = GatedPort(plain, erasures, ASKED).asked
    assert widest == [max(m) for m in zip(*(gate_strengths(plain, erasures, p) for p in ASKED), strict=True)]


def test_weights_that_are_patched_for_a_prompt_already_are_counted(model, erasures) -> None:
    """As in ComfyUI, where the MODEL that comes in carries the erasures as one prompt opens them."""
    plain, first = EmojiCanvasPort(model), "a kitty with a crown"
    port = GatedPort(patched(model, erasures, first), erasures, ASKED, gate_strengths(plain, erasures, first))
    for prompt in ("a beer", "a house", first):
        assert torch.allclose(drawn(port, prompt), drawn(patched(model, erasures, prompt), prompt), atol=1e-4)
    site = plain.linears()[0]
    assert torch.allclose(port.weight(site), GatedPort(plain, erasures, ASKED).weight(site), atol=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradients_flow_through_the_gates_that_were_open(model, erasures, checkpointed: bool) -> None:
    prompt = "a kitty"
    grads = []
    for port in (GatedPort(EmojiCanvasPort(model), erasures, [prompt]), patched(model, erasures, prompt)):
        (cond,) = port.conditions([prompt])
        with port.trainable() as net:
            z, t = net.noise(1, torch.Generator().manual_seed(2)), torch.tensor([500])
            states = cond.context.clone().requires_grad_()
            if checkpointed:
                net._blocks = [m for m in net.net.modules() if type(m).__name__ == "TransformerBlock"]
                net.checkpoint = True
                for block in net._blocks:
                    block.forward = net._recomputed(block.forward)
            loss = net.predict(z, t, cond.with_context(states)).square().sum()
            net.predict(z, t, port.conditions(["a house"])[0])  # other gates, before the backward pass
            grads.append(torch.autograd.grad(loss, states)[0])
    assert torch.allclose(*grads, rtol=1e-3, atol=1e-4 * float(grads[0].abs().max()))


QUICK = {
    "concept_inversion": {"steps": 1},
    "free_embedding": {"steps": 1, "starts": 1, "pictures": 2},
    "mma_diffusion": {"rounds": 1, "tries": 4, "candidates": 4},
    "p4d": {"steps": 1, "pictures": 1},
    "relearning": {"steps": 1},
    "ring_a_bell": {"generations": 1, "population": 4},
    "sneaky_prompt": {"queries": 2, "words": 1},
    "synonyms": {"words": "kitty"},
    "tina": {"pictures": 1},
    "unlearn_diff_atk": {"steps": 1, "times": 1, "tokens": 2},
}


@pytest.mark.parametrize("name", all_attacks())
def test_every_attack_meets_the_gates(model, erasures, name: str) -> None:
    """And what it finds as text is drawn with the gates that this text opens."""
    base = EmojiCanvasPort(model)
    port = GatedPort(base, erasures[:1], ["a cat"])
    target = AttackTarget(
        port,
        base,
        ("a cat",),
        words=words_of(model),
        look=lambda z: torch.full((len(z),), 0.3),
        sampler=Sampler(2, 4.0, 4),
    )
    open_ = replace(target, erased=patched(model, erasures[:1], "a cat"))
    spec, chosen = ConceptSpec.parse("cat", keep="dog, house"), QUICK.get(name, {})
    found, alike = (attack(t, spec, name, chosen, quiet) for t in (target, open_))
    assert found.ways
    assert found.losses == pytest.approx(alike.losses, rel=1e-3, abs=1e-6), "searched as the asked prompt is read"
    for way in found.ways:
        typed = way.states is None
        one = replace(found, ways=(way,))
        there = replace(target, erased=patched(model, erasures[:1], way.prompt if typed else "a cat"))
        here, expected = (evaluate(t, one, target.look, pictures=1).latents for t in (target, there))
        assert torch.allclose(here, expected, atol=1e-4), way.label


def test_a_search_for_words_looks_at_them_with_the_gates_that_they_open(model, erasures) -> None:
    """The gate is open to the attacked prompt, and not as far to what is found: that is how a prompt gets past it."""
    base, seen = EmojiCanvasPort(model), []
    port = GatedPort(base, erasures[:1], ["a cat"])
    target = AttackTarget(
        port, base, ("a cat",), words=words_of(model), sampler=Sampler(2, 4.0, 4),
        look=lambda z: torch.full((len(z),), 0.3), watch=lambda cond, _: seen.append(float(cond.extra["gates"])),
    )  # fmt: skip
    found = attack(target, ConceptSpec.parse("cat"), "p4d", {**QUICK["p4d"], "tokens": 8}, quiet)
    (own,) = (float(c.extra["gates"]) for c in port.conditions([found.ways[0].prompt]))
    assert seen and all(gate == pytest.approx(own, abs=1e-5) for gate in seen)
    assert own < 0.9 * port.asked[0]


def test_without_a_text_the_gates_are_those_of_the_empty_prompt(model, erasures) -> None:
    """As in the model that Gate Erasures patches for it, backwards from a picture and forwards again."""
    base, g = EmojiCanvasPort(model), torch.Generator().manual_seed(4)
    target = AttackTarget(
        GatedPort(base, erasures[:1], ["a cat"]), base, ("a cat",), sampler=Sampler(2, 4.0, 4),
        pictures=torch.randn(1, 4, 16, 16, generator=g),
    )  # fmt: skip
    made = {}
    for name, port in (("here", target.erased), *((p, patched(model, erasures[:1], p)) for p in ("", "a cat"))):
        there = replace(target, erased=port)
        found = attack(there, ConceptSpec.parse("cat"), "tina", {}, quiet)
        made[name] = found.ways[0].noise, evaluate(there, found, lambda z: torch.zeros(len(z)), pictures=1).latents
    assert all(torch.allclose(here, typed, atol=1e-4) for here, typed in zip(made["here"], made[""], strict=True))
    assert not torch.allclose(made["here"][0], made["a cat"][0], atol=1e-2)


def test_nothing_is_gated_where_no_gate_is(model) -> None:
    base = EmojiCanvasPort(model)
    (cond,) = base.conditions(["a cat"])
    assert AttackTarget(base, base, ("a cat",)).as_typed(cond, "a house") is cond


def test_states_that_stand_for_one_of_several_prompts_meet_its_gates(model, erasures) -> None:
    base = EmojiCanvasPort(model)
    target = AttackTarget(GatedPort(base, erasures, ASKED), base, ASKED, sampler=Sampler(2, 4.0, 4))
    states = base.conditions(["a crown"])[0].context[0]
    one = Found((Way("x", states=states, attacks=(ASKED[0],)),))
    there = replace(target, erased=patched(model, erasures, ASKED[0]))
    here, expected = (evaluate(t, one, lambda z: torch.zeros(len(z)), pictures=1).latents for t in (target, there))
    assert torch.allclose(here, expected, atol=1e-4)


def test_asking_is_of_the_gated_model(model, erasures) -> None:
    base = EmojiCanvasPort(model)
    target = AttackTarget(GatedPort(base, erasures, ASKED), base, ASKED, sampler=Sampler(2, 4.0, 4))
    here = evaluate(target, asking(target), lambda z: torch.zeros(len(z)), pictures=1).latents
    there = torch.cat([
        evaluate(
            AttackTarget(patched(model, erasures, p), base, (p,), sampler=target.sampler), Found((Way(p, p),)),
            lambda z: torch.zeros(len(z)), pictures=1,
        ).latents
        for p in ASKED
    ])  # fmt: skip
    assert torch.allclose(here, there, atol=1e-4)


def test_none_and_strangers_are_refused(model, erasures) -> None:
    with pytest.raises(ValueError, match="at least one"):
        GatedPort(EmojiCanvasPort(model), [], ASKED)
    stranger = erase(AnalyticPort(), ConceptSpec.parse("cat"), "uce")
    with pytest.raises(WrongModelError):
        GatedPort(EmojiCanvasPort(model), [stranger], ASKED)
