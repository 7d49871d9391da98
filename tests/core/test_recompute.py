"""Training in less memory and in bfloat16: the same gradients, or nearly."""

from __future__ import annotations

import copy

import pytest
import torch

from erasure_core import Delta, Prediction
from erasure_core.operators.changes import FullWeights, Layers, LoRA
from erasure_core.operators.cond import Cond
from erasure_core.operators.gates import GATES
from erasure_core.operators.memory import Placement, PromptMemory
from erasure_core.operators.trainable import TrainableModel, Weights, blocks_of


def model_of(port, **how) -> TrainableModel:
    return TrainableModel(copy.deepcopy(port.unet), port.schedule, Prediction.EPS, (4, 4, 4), **how)


def loss_and_gradients(model: TrainableModel, what, memory=None):
    """Of a loss that reads the student twice and the frozen network once, with the change away from zero."""
    g = torch.Generator().manual_seed(2)
    z, t = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([30, 800])
    one, two = (Cond(torch.randn(2, 6, 16, generator=g)) for _ in range(2))
    parameters = model.train(what, seed=3)
    with torch.no_grad():
        for p in parameters:
            p += 0.05 * torch.randn(p.shape, generator=g).to(p)
    student = model.predict(z, t, one, memory=memory) + 0.5 * model.predict(z, t, two)
    loss = (student - model.predict(z, t, two, Weights.FROZEN)).square().mean()
    return loss.detach(), torch.autograd.grad(loss, [*parameters, *(memory.parameters() if memory else [])])


@pytest.mark.parametrize("what", [FullWeights(Layers.CROSS), LoRA(Layers.ALL, 2)], ids=["full", "lora"])
@pytest.mark.parametrize("with_memory", [False, True])
def test_blocks_that_are_computed_again_see_the_same_change(tiny, what, with_memory: bool) -> None:
    """By the time of the backward pass the change is off, and another prediction's was on meanwhile."""
    seen = []
    for checkpoint in (False, True):
        g = torch.Generator().manual_seed(4)
        memory = PromptMemory(2, 16, Placement.ALL, g, shared=False) if with_memory else None
        with model_of(tiny, checkpoint=checkpoint) as model:
            assert bool(model._blocks) is checkpoint
            seen.append(loss_and_gradients(model, what, memory))
    (plain, slopes), (again, others) = seen
    assert torch.equal(plain, again)
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(slopes, others, strict=True))
    assert all(x.any() for x in slopes)


def test_it_keeps_less(tiny) -> None:
    kept = []
    for checkpoint in (False, True):
        seen: dict[int, int] = {}

        def pack(x, seen=seen):
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with model_of(tiny, checkpoint=checkpoint) as model:
            model.train(FullWeights())
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                out = model.predict(
                    torch.randn(4, 4, 4, 4), torch.zeros(4, dtype=torch.long), Cond(torch.randn(4, 6, 16))
                )
            kept.append(sum(seen.values()))
            del out
    assert kept[1] < kept[0] / 2


def test_closing_gives_the_blocks_back(tiny) -> None:
    model = model_of(tiny, checkpoint=True)
    blocks = blocks_of(model.net)
    assert blocks and all("forward" in vars(b) for b in blocks)
    model.close()
    assert not any("forward" in vars(b) for b in blocks)


def test_bfloat16_is_close_and_latents_stay_float32(tiny) -> None:
    """Matrices may be stored in bfloat16: autocast would round them anyway."""
    with model_of(tiny) as model:
        loss, slopes = loss_and_gradients(model, FullWeights(Layers.CROSS))
    with model_of(tiny, autocast=torch.bfloat16) as model:
        cast, cast_slopes = loss_and_gradients(model, FullWeights(Layers.CROSS))
        assert model.noise(1, torch.Generator()).dtype == torch.float32
    net = copy.deepcopy(tiny.unet)
    for module in net.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(torch.bfloat16)
    with TrainableModel(net, tiny.schedule, Prediction.EPS, (4, 4, 4), autocast=torch.bfloat16) as model:
        stored, _ = loss_and_gradients(model, FullWeights(Layers.CROSS))
        assert all(p.dtype == torch.float32 for p in model.parameters())
    assert torch.equal(stored, cast)
    assert abs(float(cast - loss)) < 0.05 * float(loss)
    whole, other = (torch.cat([x.flatten().double() for x in s]) for s in (slopes, cast_slopes))
    assert torch.nn.functional.cosine_similarity(whole, other, dim=0) > 0.99


def test_on_request_it_computes_in_full_precision(tiny) -> None:
    """Bit for bit what a model without autocast gives, also where the weights were stored in bfloat16."""
    rounded = copy.deepcopy(tiny.unet)
    for module in rounded.modules():
        if isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            module.to(torch.bfloat16)
    with TrainableModel(copy.deepcopy(rounded).float(), tiny.schedule, Prediction.EPS, (4, 4, 4)) as model:
        loss, slopes = loss_and_gradients(model, LoRA(Layers.ALL, 2))
    flags, seen = torch.backends.cudnn, []
    before = flags.allow_tf32
    for checkpoint in (False, True):
        how = {"autocast": torch.bfloat16, "checkpoint": checkpoint}
        with TrainableModel(copy.deepcopy(rounded), tiny.schedule, Prediction.EPS, (4, 4, 4), **how) as model:
            model.precise()
            model.net.register_forward_hook(lambda *_: seen.append(flags.allow_tf32))
            made, others = loss_and_gradients(model, LoRA(Layers.ALL, 2))
        assert torch.equal(made, loss)
        assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-8) for a, b in zip(slopes, others, strict=True))
    assert seen and not any(seen) and flags.allow_tf32 == before


def test_prompts_of_unlike_length_make_one_batch(tiny) -> None:
    """Repeated text states change nothing for attention."""
    g = torch.Generator().manual_seed(6)
    short, long = Cond(torch.randn(1, 6, 16, generator=g)), Cond(torch.randn(1, 9, 16, generator=g))
    z, t = torch.randn(2, 4, 4, 4, generator=g), torch.tensor([30, 800])
    with model_of(tiny) as model:
        both = model.reference(z, t, Cond.cat([short, long]))
        apart = torch.cat([model.reference(z[i : i + 1], t[i : i + 1], c) for i, c in enumerate((short, long))])
    assert Cond.cat([short, long]).context.shape == (2, 18, 16)
    assert torch.allclose(both, apart, atol=1e-5)


@pytest.mark.parametrize(
    ("side", "pictures", "rows"), [(16, 8, 256), (64, 8, 16), (96, 3, 7), (128, 2, 4), (256, 1, 2)]
)
def test_larger_pictures_are_drawn_fewer_at_a_time(tiny, side: int, pictures: int, rows: int) -> None:
    with TrainableModel(copy.deepcopy(tiny.unet), tiny.schedule, Prediction.EPS, (4, side, side)) as model:
        assert (model.at_once, model.rows) == (pictures, rows)


@pytest.mark.parametrize("gated", [False, True])
def test_what_nothing_is_learned_from_is_computed_in_parts(tiny, gated: bool) -> None:
    """Drawing, with prompts, gates and a memory of its own for each picture; a pass with gradients is left whole."""
    words, null = tiny.conditions(["cat", "dog", "small bird", "tree", "stone"]), tiny.conditions([""])[0]
    cond, g = Cond.cat(words), torch.Generator().manual_seed(7)
    if gated:
        cond = Cond(cond.context, {GATES: torch.rand(5, 1, generator=g)})
        null = Cond(null.context, {GATES: torch.zeros(1, 1)})
    memory = PromptMemory(2, 16, Placement.ALL, g, shared=False)
    noise, change = torch.randn(5, 4, 4, 4, generator=g), LoRA(Layers.ALL, 2)
    drawn, seen = [], []
    for rows in (256, 3):
        with model_of(tiny) as model:
            model.net.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
            if gated:
                model.gate([{s.name: Delta(torch.ones(s.d_out, s.d_in)) for s in model.sites[:3]}], [0.0])
            with torch.no_grad():
                for p in model.train(change, seed=3):
                    p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(8))
            model.rows = rows
            drawn.append(model.denoise(noise, [999, 400, 0], cond, null, guidance=3.0, memory=memory))
            passes, seen[:] = seen[:], []
            assert passes == ([10] * 2 if rows == 256 else [3, 3, 3, 1] * 2)
            model.predict(noise, torch.full((5,), 400), cond)
            assert seen == [5]
            seen.clear()
    assert torch.allclose(*drawn, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(drawn[0][:1], drawn[0][1:2], atol=1e-2)
