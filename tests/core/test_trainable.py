"""The trainable view against networks whose weights really were changed, and the promise that the base never is."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from erasure_core import ConceptSpec, Erasure, Header, Role, load, save
from erasure_core.emojicanvas.model import patched
from erasure_core.operators.changes import FullWeights, Init, Layers, LoRA, truncated
from erasure_core.operators.cond import Cond
from erasure_core.operators.memory import Placement, PromptMemory
from erasure_core.operators.trainable import TrainableModel, Weights, linear_sites

pytestmark = pytest.mark.core


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def shake(model: TrainableModel, scale: float = 0.1) -> None:
    """Any change that training could have made."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(scale * normal(*p.shape, seed=i).to(p))


def inputs(n: int = 3, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Cond]:
    return (
        normal(n, 4, 4, 4, seed=90, dtype=dtype),
        torch.tensor([5, 300, 999][:n]),
        Cond(normal(n, 6, 16, seed=91, dtype=dtype)),
    )


@pytest.mark.parametrize(
    "what", [FullWeights(Layers.ALL), LoRA(Layers.ALL, 3, alpha=1.5), LoRA(Layers.CROSS, 2, init=Init.GAUSSIAN)]
)
def test_the_student_is_the_network_with_its_weights_changed(tiny64, what) -> None:
    z, t, cond = inputs()
    with tiny64.trainable() as model:
        model.train(what)
        base = tiny64.unet(z, t, cond.context)
        assert torch.equal(model.predict(z, t, cond), base), "nothing is changed before training"
        shake(model)
        changed = copy.deepcopy(tiny64.unet)
        for name, change in model._changes[Weights.STUDENT].items():
            dense = (
                change.delta
                if isinstance(what, FullWeights)
                else (what.alpha or what.rank) / what.rank * change.up @ change.down
            )
            changed.get_submodule(name).weight.data += dense.detach()
        student = model.predict(z, t, cond)
        assert torch.allclose(student, changed(z, t, cond.context), atol=1e-12)
        assert not torch.allclose(student, base, atol=1e-3)
        assert torch.equal(model.reference(z, t, cond), base), "the reference is the base network, bit for bit"
    assert tiny64.untouched()


def test_a_lora_predicts_the_same_with_and_without_gradient(tiny64) -> None:
    z, t, cond = torch.randn(2, 4, 4, 4).double(), torch.tensor([10, 700]), Cond(torch.randn(2, 6, 16).double())
    kept: list[torch.Tensor] = []
    with tiny64.trainable() as model:
        for p in model.train(LoRA(Layers.ALL, 3, alpha=1.5)):
            p.data.normal_()
        layer = model.module(model.sites[0].name)
        mine = layer.register_forward_hook(lambda _m, _a, out: kept.append(out))
        learned = model.predict(z, t, cond)
        assert torch.allclose(model.reference(z, t, cond, Weights.STUDENT), learned, atol=1e-10)
        assert not torch.allclose(model.reference(z, t, cond), learned)
        assert len(kept) == 3, "hooks of others hear every pass"
        mine.remove()
    assert "forward" not in layer.__dict__ and tiny64.untouched()


@pytest.mark.parametrize("what", [FullWeights(Layers.TEXT), LoRA(Layers.ALL, 3, alpha=1.0)])
def test_what_is_exported_is_what_was_trained(tiny, what, tmp_path) -> None:
    z, t, cond = inputs(dtype=torch.float32)
    spec = ConceptSpec.parse("cat")
    with tiny.trainable() as model:
        model.train(what)
        shake(model)
        student = model.predict(z, t, cond).detach()
        deltas = model.deltas()
    made = Erasure(Header("test", {}, spec, tiny.family, "0", "0"), deltas)
    read = load(save(made, tmp_path / "x.safetensors"))
    assert {d.rank for d in read.deltas.values()} <= ({3} if isinstance(what, LoRA) else {16, 32})
    for erasure in (made, read):
        with patched(tiny.unet, erasure):
            assert torch.allclose(tiny.unet(z, t, cond.context), student, atol=1e-4)


def test_the_layers_are_the_papers(tiny) -> None:
    names = {layers: {s.name for s in linear_sites(tiny.unet) if layers.covers(s.name)} for layers in Layers}
    blocks = 4
    assert len(names[Layers.TEXT]) == 2 * blocks == sum(s.role is not Role.OTHER for s in linear_sites(tiny.unet))
    assert len(names[Layers.CROSS]) == len(names[Layers.SELF]) == 4 * blocks
    assert names[Layers.CROSS] | names[Layers.NOT_CROSS] == names[Layers.ALL]
    assert len(names[Layers.NOT_CROSS]) == 6 * blocks, "self-attention and the two matrices of the feed-forward"
    assert "middle_block.1.transformer_blocks.0.attn1.to_out.0" in names[Layers.SELF]
    assert [s.name for s in linear_sites(tiny.unet) if s.role is not Role.OTHER] == [s.name for s in tiny.sites()]


def test_a_lora_starts_as_its_trainer_has_it(tiny) -> None:
    with tiny.trainable() as model:
        for init, spread in (
            (Init.KAIMING, lambda d_in, r: d_in**-0.5 / 3**0.5),
            (Init.GAUSSIAN, lambda d_in, r: 1 / r),
        ):
            model.train(LoRA(Layers.ALL, 8, init=init), seed=3)
            downs = [c.down.detach() for c in model._changes[Weights.STUDENT].values()]
            scaled = torch.cat([(d / spread(d.shape[1], 8)).flatten() for d in downs])
            assert float(scaled.std()) == pytest.approx(1, abs=0.05)
            assert all(not c.up.any() for c in model._changes[Weights.STUDENT].values())
            first = [p.clone() for p in model.parameters()]
            assert all(
                torch.equal(a, b)
                for a, b in zip(first, model.train(LoRA(Layers.ALL, 8, init=init), seed=3), strict=True)
            )
            assert not torch.equal(first[0], model.train(LoRA(Layers.ALL, 8, init=init), seed=4)[0])


def test_gradients_reach_the_change_and_the_text_but_never_the_base(tiny) -> None:
    z, t, cond = inputs(dtype=torch.float32)
    with tiny.trainable() as model:
        parameters = model.train(FullWeights(Layers.TEXT))
        context = cond.context.clone().requires_grad_()
        model.predict(z, t, Cond(context)).square().sum().backward()
        assert context.grad is not None and context.grad.any()
        assert all(p.grad is not None and p.grad.any() for p in parameters)
        assert all(p.grad is None and not p.requires_grad for p in model.net.parameters())
        assert not model.reference(z, t, Cond(context)).requires_grad


def test_the_average_is_an_exponential_one(tiny64) -> None:
    with tiny64.trainable() as model:
        model.train(FullWeights(Layers.TEXT))
        model.start_average()
        history = []
        for _ in range(3):
            shake(model)
            model.update_average(0.9)
            history.append([p.detach().clone() for p in model.parameters()])
        for i, p in enumerate(model.parameters(Weights.AVERAGE)):
            assert torch.allclose(p, 0.1 * (history[2][i] + 0.9 * history[1][i] + 0.81 * history[0][i]))
        z, t, cond = inputs()
        student, average = (model.reference(z, t, cond, w) for w in (Weights.STUDENT, Weights.AVERAGE))
        assert not torch.allclose(student, average)


@pytest.mark.parametrize("kind", ["tiny64", "tiny_flow"])
@pytest.mark.parametrize("progress", [0.0, 0.35, 1.0])
def test_denoise_until_is_a_guided_sampler_stopped_half_way(kind: str, progress: float, request) -> None:
    port = request.getfixturevalue(kind)
    one, two = Cond(normal(2, 6, 16, seed=1)), Cond(normal(1, 6, 16, seed=2))
    flow = kind == "tiny_flow"
    with port.trainable() as model:
        made = model.denoise_until(
            one, two, guidance=3.0, progress=progress, steps=5, generator=torch.Generator().manual_seed(8)
        )
    z = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(8)).double()
    times = {0.0: [999], 0.35: [999, 799, 649], 1.0: [999, 799, 599, 399, 199, None]}[progress]
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)
    for t, to in itertools.pairwise(times):
        given = torch.full((2,), float(t + 1) if flow else float(t))
        e1, e0 = port.unet(z, given, one.context), port.unet(z, given, two.context.expand(2, -1, -1))
        e = 3 * e1 - 2 * e0
        if flow:
            z = z + ((0 if to is None else to + 1) - (t + 1)) / 1000 * e
        else:
            x0 = (z - (1 - abar[t]).sqrt() * e) / abar[t].sqrt()
            z = x0 if to is None else abar[to].sqrt() * x0 + (1 - abar[to]).sqrt() * e
    # The network's own time embedding is float32.
    assert torch.allclose(made, z, rtol=1e-5, atol=1e-5)


def test_without_guidance_the_empty_prompt_is_not_read(tiny) -> None:
    one, broken = Cond(normal(1, 6, 16, seed=1)), Cond(torch.full((1, 6, 16), float("nan")))
    with tiny.trainable() as model:
        made = model.denoise_until(
            one, broken, guidance=1.0, progress=0.5, steps=3, generator=torch.Generator().manual_seed(1)
        )
    assert torch.isfinite(made).all()


@pytest.mark.parametrize("placement", Placement)
def test_memory_rows_join_the_softmax(tiny64, placement: Placement) -> None:
    """KPOP against attention written out: every covered block reads L + m rows, the others L."""
    z, t, cond = inputs()
    memory = PromptMemory(3, 16, placement, torch.Generator().manual_seed(1), shared=False, std=1.0).double()
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    with tiny64.trainable() as model:
        hooks = [
            m.register_forward_hook(lambda m, args, out, name=name: seen.update({name: (m, *args, out)}))
            for name, m in model.net.named_modules()
            if name.endswith("attn2")
        ]
        out = model.predict(z, t, cond, memory=memory)
        covered = 0
        for name, (block, x, context, result) in seen.items():
            reads = (
                placement is Placement.ALL or "middle" in name or (placement is Placement.MIDOUT and "output" in name)
            )
            covered += reads
            keys, values = context, context
            if reads:
                keys = torch.cat([context, memory.key.expand(3, -1, -1)], 1)
                values = torch.cat([context, memory.value.expand(3, -1, -1)], 1)
            q, k, v = (a @ w.weight.T for a, w in ((x, block.to_q), (keys, block.to_k), (values, block.to_v)))
            heads = []
            for h in range(block.heads):
                part = slice(16 * h, 16 * h + 16)
                scores = torch.einsum("bid,bjd->bij", q[..., part], k[..., part]) / 16**0.5
                weights = scores.exp() / scores.exp().sum(-1, keepdim=True)
                heads.append(weights @ v[..., part])
            assert torch.allclose(F.linear(torch.cat(heads, -1), block.to_out[0].weight, block.to_out[0].bias), result)
        assert covered == {"mid": 1, "midout": 3, "all": 4}[placement]
        for hook in hooks:
            hook.remove()
        assert not torch.allclose(out, model.predict(z, t, cond)), "and without it they are gone again"
        assert torch.equal(model.predict(z, t, cond), tiny64.unet(z, t, cond.context))


def test_a_shared_memory_is_a_longer_prompt(tiny64) -> None:
    z, t, cond = inputs()
    memory = PromptMemory(2, 16, Placement.ALL, torch.Generator().manual_seed(1), shared=True).double()
    assert len(list(memory.parameters())) == 1
    longer = torch.cat([cond.context, memory.key.expand(3, -1, -1)], 1)
    with tiny64.trainable() as model:
        assert torch.allclose(model.predict(z, t, cond, memory=memory), tiny64.unet(z, t, longer))


def test_extras_are_passed_and_batched(tiny) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.transformer_blocks = torch.nn.Linear(4, 4)

        def forward(self, z: Tensor, t: Tensor, context: Tensor, y: Tensor) -> Tensor:
            return z * y.view(-1, 1, 1, 1) + context.mean()

    with TrainableModel(Net(), tiny.schedule, tiny.prediction, (1, 2, 2)) as model:
        cond = Cond(torch.zeros(1, 2, 4), {"y": torch.tensor([2.0])})
        assert torch.equal(
            model.predict(torch.ones(3, 1, 2, 2), torch.zeros(3).long(), cond), torch.full((3, 1, 2, 2), 2.0)
        )
        both = Cond.cat([cond, Cond(torch.zeros(1, 2, 4), {"y": torch.tensor([3.0])})])
        assert torch.equal(
            model.predict(torch.ones(2, 1, 2, 2), torch.zeros(2).long(), both)[:, 0, 0, 0], torch.tensor([2.0, 3.0])
        )
        with pytest.raises(ValueError, match="a batch of 2 for 3 latents"):
            model.predict(torch.ones(3, 1, 2, 2), torch.zeros(3).long(), both)


def test_truncated_is_the_best_approximation_of_its_rank(tiny) -> None:
    from erasure_core import Delta

    dense = normal(20, 12)
    small = truncated(Delta(dense), 0.9)
    s = torch.linalg.svdvals(dense)
    assert small.down is not None and float(s[: small.rank].square().sum() / s.square().sum()) >= 0.9
    assert float(s[: small.rank - 1].square().sum() / s.square().sum()) < 0.9
    assert float((small.dense() - dense).norm()) == pytest.approx(float(s[small.rank :].norm()))
    assert truncated(Delta(dense), 1.0).down is None
    assert truncated(Delta(torch.zeros(4, 3)), 0.9).rank == 0


def test_clear_refusals(tiny) -> None:
    with tiny.trainable() as model:
        with pytest.raises(ValueError, match="rank must be at least 1"):
            model.train(LoRA(rank=0))
        with pytest.raises(ValueError, match="it needs 1 to 1000 rows, got 0"):
            PromptMemory(0, 16, Placement.ALL, torch.Generator(), shared=True)
    plain = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with (
        pytest.raises(ValueError, match="no linear layers"),
        TrainableModel(plain, tiny.schedule, tiny.prediction, (1, 1, 1)) as model,
    ):
        model.train(FullWeights())
