"""CPE's layer weights and losses against their equations written out in float64, and the training end to end."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptSpec
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort
from erasure_core.methods import Aids, cpe
from erasure_core.operators.changes import Layers, LoRA
from erasure_core.operators.train_loop import Phase
from erasure_core.operators.trainable import TrainableModel

pytestmark = pytest.mark.core
SPEC = ConceptSpec.parse("cat, kitty\nred house", "dog", "bird")
SMALL = {"stages": 3, "iterations": 3, "attack_steps": 2, "adversaries": 3, "batch": 4, "learning_rate": 1e-3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def blocks(net: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in net.named_modules() if name.endswith("attn2")}


def expected_weights(net: torch.nn.Module, length: int) -> dict[str, float]:
    """By the eigenvalues of W W^T."""

    def largest(w: Tensor) -> float:
        return math.sqrt(float(torch.linalg.eigvalsh(w @ w.T)[-1]))

    found = {}
    for name, block in blocks(net).items():
        out, value, query = (m.weight.double() for m in (block.to_out[0], block.to_v, block.to_q))
        found[name + ".to_k"] = largest(out @ value) * largest(query) / length
        found[name + ".to_v"] = largest(out)
    return found


def test_layer_weights_are_the_lipschitz_bounds(tiny64) -> None:
    with tiny64.trainable() as model:
        made, expected = cpe.layer_weights(model, 6), expected_weights(model.net, 6)
    assert made.keys() == expected.keys() and len(made) == 8
    for name, rho in expected.items():
        assert float(made[name]) == pytest.approx(rho, rel=1e-5)


def test_the_losses_are_the_papers(tiny64) -> None:
    """Column by column with dense matrices W + U D."""
    c_e, c_n, c_a, delta = (normal(2, 6, 16, seed=i) for i in range(4))
    with tiny64.trainable() as model:
        model.train(LoRA(Layers.TEXT, 2))
        with torch.no_grad():
            for i, p in enumerate(model.parameters()):
                p.add_(0.3 * normal(*p.shape, seed=i))
        losses = cpe.Losses(model, 6, 0.7)
        made = torch.stack([
            losses.erase(c_e, c_e, c_n), losses.erase(c_e + delta, c_e, c_n), losses.attack(delta, c_e), losses.anchor(c_a)
        ]).tolist()  # fmt: skip
        deltas, rho = model.deltas(), expected_weights(model.net, 6)
        expected = [0.0] * 4
        for name, weight in rho.items():
            w = model.net.get_submodule(name).weight
            new = w + deltas[name].dense().double()

            def error(reads: Tensor, wanted: Tensor, new: Tensor = new) -> float:
                return float((reads @ new.T - wanted).pow(2).sum()) / wanted.numel()

            away = c_n @ w.T + 0.7 * (c_n @ w.T - c_e @ w.T)
            pairs = ((c_e, away), (c_e + delta, away), (c_e + delta, c_e @ w.T), (c_a, c_a @ w.T))
            expected = [e + weight * error(reads, wanted) for e, (reads, wanted) in zip(expected, pairs, strict=True)]
        for one, other in zip(made, expected, strict=True):
            assert one == pytest.approx(other, rel=1e-5)


def test_it_trains_without_a_pass_of_the_network(tiny, monkeypatch) -> None:
    """The loss of every step goes to the watcher; words, ways around them and anchors all have their part."""
    seen: list[set[str]] = []
    monkeypatch.setattr(type(tiny.unet), "forward", None)
    made = cpe.run(tiny, SPEC, cpe.Settings(**SMALL), lambda *_: None, Aids(watch=lambda m, i, x: seen.append(set(x))))
    assert seen == [
        {"erase 0/erase", "erase 0/anchor"}, {"attack 0/attack"}, {"erase 1/erase", "erase 1/anchor", "erase 1/adverse"},
        {"attack 6/attack"}, {"erase 2/erase", "erase 2/anchor", "erase 2/adverse"},
    ]  # fmt: skip
    assert {d.rank for d in made.deltas.values()} == {8} and len(made.deltas) == 8


def test_it_moves_the_concept_and_holds_the_rest(tiny) -> None:
    settings = cpe.Settings(
        stages=2, iterations=150, attack_steps=30, learning_rate=1e-2, anchor_weight=10.0, negative_guidance=0.0, rank=4
    )
    spec = ConceptSpec.parse("cat", "dog", "bird")
    made = cpe.run(tiny, spec, settings, lambda *_: None, Aids())
    cat, dog, bird = (x.states[1:3].float() for x in tiny.text(["cat", "dog", "bird"]))
    for site in tiny.sites():
        w, d = tiny.weight(site), made.deltas[site.name].dense()
        assert (cat @ (w + d).T - dog @ w.T).norm() < 0.6 * ((cat - dog) @ w.T).norm(), site.name
        assert (bird @ d.T).norm() < 0.3 * (cat @ d.T).norm(), site.name


@pytest.mark.parametrize("batch", [1, 8])
def test_what_a_step_keeps_is_what_the_memory_estimate_is_told(tiny, batch: int, monkeypatch) -> None:
    """Of a network that is stored in half precision: erasing keeps most of many texts, an attack of few."""
    net, most = copy.deepcopy(tiny.unet).to(torch.bfloat16), [0]
    model = TrainableModel(net, tiny.schedule, tiny.prediction, (4, 4, 4), autocast=torch.bfloat16)
    monkeypatch.setattr(tiny, "trainable", lambda: model)
    step = Phase.step

    def watched(self: Phase, i: int, generator: torch.Generator) -> dict[str, Tensor]:
        there = {x.untyped_storage().data_ptr() for x in [*net.parameters(), *model.parameters()]}
        kept: dict[int, torch.UntypedStorage] = {}

        def pack(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in there:
                kept[storage.data_ptr()] = storage
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            made = step(self, i, generator)
        most[0] = max(most[0], sum(storage.nbytes() for storage in kept.values()))
        return made

    monkeypatch.setattr(Phase, "step", watched)
    settings = cpe.Settings(**{**SMALL, "batch": batch, "rank": 1})
    cpe.run(tiny, ConceptSpec.parse("cat", "dog", "bird"), settings, lambda *_: None, Aids())
    told = cpe.keeps(settings, model, length=6)
    assert told <= most[0] < 1.25 * told


def test_nothing_that_is_erased_is_held(tiny) -> None:
    words = cpe.anchors_of(tiny, ConceptSpec.parse("Cat, car", "dog", "bird, tree"))
    assert {"dog", "bird", ""} <= set(words) and not {"cat", "Cat", "car"} & set(words)
    assert words.count("tree") == 1


def test_words_for_what_is_erased_are_not_held() -> None:
    """On the demo model, whose encoder learned what these words mean from captions."""
    words = set(cpe.anchors_of(EmojiCanvasPort(EmojiCanvas.load()), ConceptSpec.parse("Automobile\nkitty")))
    assert not {"car", "cat"} & words and {"rocket", "dog", "house", ""} <= words and len(words) > 200
