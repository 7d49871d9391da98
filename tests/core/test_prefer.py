"""DUO against its formula written with log-sigmoid, one pair at a time, and its gradient by hand."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptSpec, erase
from erasure_core.methods import Aids, duo
from erasure_core.operators.changes import FullWeights, Layers
from erasure_core.operators.cond import Cond
from erasure_core.operators.prefer import PairErrors, draw_times, preference_loss, preference_losses, scaled_by_beta
from erasure_core.operators.train_loop import Trainer
from erasure_core.operators.trainable import TrainableModel
from erasure_core.pairs import ConceptPairs

pytestmark = pytest.mark.core
SMALL = {"iterations": 6, "rank": 4, "batch": 2, "base_learning_rate": 1e-2, "base_prior_weight": 10.0, "beta": 100.0}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def shake(model) -> None:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.05 * normal(*p.shape, seed=i).to(p))


@pytest.mark.parametrize("kind", ["tiny64", "tiny_flow"])
@pytest.mark.parametrize("beta", [1.0, 500.0])
def test_the_loss_is_the_papers(kind: str, beta: float, request) -> None:
    port = request.getfixturevalue(kind)
    unsafe, safe, n = (normal(3, 4, 4, 4, seed=i) for i in (1, 2, 3))
    times = torch.tensor([3, 400, 749]), torch.tensor([10, 20, 600])
    read = {
        "unsafe": Cond(normal(3, 6, 16, seed=4)),
        "safe": Cond(normal(1, 6, 16, seed=5)),
        "": Cond(normal(1, 6, 16)),
    }
    with port.trainable() as model:
        model.train(FullWeights(Layers.SELF))
        shake(model)
        made = preference_losses(model, unsafe, safe, n, times, tuple(read.values()), beta=beta, prior_weight=7.0)

        def error(x: Tensor, i: int, t: Tensor, which, cond: Cond) -> Tensor:
            """The mean squared error of one member: eps against noise, flow against noise - x0."""
            t = t[i : i + 1]
            if kind == "tiny64":
                betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
                abar = torch.cumprod(1 - betas, 0)[t]
                z, target = abar.sqrt() * x[i : i + 1] + (1 - abar).sqrt() * n[i : i + 1], n[i : i + 1]
            else:
                sigma = (t + 1).double() / 1000
                z, target = (1 - sigma) * x[i : i + 1] + sigma * n[i : i + 1], n[i : i + 1] - x[i : i + 1]
            return (which(z, t, cond) - target).pow(2).sum() / target.numel()

        total = torch.zeros((), dtype=torch.float64)
        for i in range(3):
            d_plus = error(safe, i, times[1], model.predict, read["safe"]) - error(
                safe, i, times[1], model.reference, read["safe"])  # fmt: skip
            d_minus = error(unsafe, i, times[0], model.predict, read["unsafe"].row(i)) - error(
                unsafe, i, times[0], model.reference, read["unsafe"].row(i))  # fmt: skip
            total = total - torch.log(torch.sigmoid(-beta * (d_plus - d_minus))) / 3
        last = torch.full((3,), 999)
        prior = 7 * (model.predict(n, last, read[""]) - model.reference(n, last, read[""])).pow(2).mean()
        # The batched time embedding is float32.
        assert torch.allclose(made["preference"], total, rtol=1e-6)
        assert torch.allclose(made["prior"], prior, rtol=1e-6) and made["prior"] > 0
        slopes = [
            torch.autograd.grad(x, model.parameters()[0], retain_graph=True)[0] for x in (made["preference"], total)
        ]
        assert torch.allclose(*slopes, rtol=1e-5, atol=1e-12)


def test_before_training_the_loss_is_log_two(tiny64) -> None:
    x, n, null = normal(2, 4, 4, 4, seed=1), normal(2, 4, 4, 4, seed=2), Cond(normal(1, 6, 16))
    with tiny64.trainable() as model:
        model.train(FullWeights(Layers.SELF))
        t = torch.tensor([1, 2])
        made = preference_losses(model, x, -x, n, (t, t), (null,) * 3, beta=500.0, prior_weight=1e6)
    assert made["preference"].item() == pytest.approx(math.log(2)) and made["prior"].item() == 0


def test_the_gradient_by_hand() -> None:
    """dL/d(error) = +-beta sigmoid(beta margin) / B: the frozen network only sets how much each pair still counts."""
    safe, unsafe = normal(4, seed=1).requires_grad_(), normal(4, seed=2).requires_grad_()
    errors = PairErrors(safe, unsafe, normal(4, seed=3), normal(4, seed=4))
    one, other = torch.autograd.grad(preference_loss(errors, 3.0), (safe, unsafe))
    margin = (safe - errors.frozen_safe - unsafe + errors.frozen_unsafe).detach()
    expected = 3.0 / (1 + torch.exp(-3.0 * margin)) / 4
    assert torch.allclose(one, expected) and torch.allclose(other, -expected)


def test_it_stays_finite_where_log_sigmoid_would_not() -> None:
    zero = torch.zeros(2, dtype=torch.float32)
    errors = PairErrors(torch.tensor([1.0, -1.0]), zero, zero, zero)
    assert float(preference_loss(errors, 1e4)) == pytest.approx(5e3)


def test_times_are_shared_or_drawn_apart() -> None:
    unsafe, safe = draw_times(4000, torch.Generator().manual_seed(1), shared=True)
    assert torch.equal(unsafe, safe) and int(unsafe.min()) >= 0 and 700 < int(unsafe.max()) < 750
    unsafe, safe = draw_times(4000, torch.Generator().manual_seed(1), shared=False)
    assert (
        not torch.equal(unsafe, safe) and abs(float(torch.corrcoef(torch.stack([unsafe, safe]).double())[0, 1])) < 0.05
    )


def test_the_scaling_rule_gives_the_papers_settings() -> None:
    assert scaled_by_beta(3e-4, 1e6, 500) == pytest.approx((6e-5, 5e6))
    assert scaled_by_beta(3e-4, 1e6, 1000) == pytest.approx((3e-5, 1e7))


def test_pictures_are_read_with_their_own_prompts(tiny, monkeypatch) -> None:
    """One in five with none, and the noise always so; which pair has which scene does not depend on its place."""
    scenes = (("a cat", "a dog"), ("a cat", "a house"), ("a pony", ""))
    shown = (2, 0, 1, 1)
    members = torch.arange(4.0)[:, None, None, None].expand(4, 4, 4, 4)
    pairs = ConceptPairs(members, members, scenes, tiny.family, shown=shown)
    words = ["", "a cat", "a dog", "a house", "a pony"]
    prompts = {word: Cond(torch.full((1, 6, 16), float(i))) for i, word in enumerate(words)}
    seen: list[tuple] = []

    def noted(model, unsafe, safe, noise, times, read, **_):
        assert torch.equal(unsafe, safe) and not read[2].context.any()
        for x, *conds in zip(
            unsafe[:, 0, 0, 0].tolist(), *(c.context[:, 0, 0].tolist() for c in read[:2]), strict=True
        ):
            seen.append((shown[int(x)], *(words[int(c)] for c in conds)))
        return {}

    monkeypatch.setattr(duo, "preference_losses", noted)
    with tiny.trainable() as model:
        loss = duo.phase(model, pairs, prompts, duo.Settings(batch=8, own_prompts=True)).loss
        generator = torch.Generator().manual_seed(0)
        for i in range(100):
            loss(i, generator)
    bare = [s for s in seen if s[1] == "" == s[2]]
    assert all(s[1:] == scenes[s[0]] for s in seen if s not in bare) and {s[0] for s in seen} == {0, 1, 2}
    assert len(bare) / len(seen) == pytest.approx(0.2, abs=0.05)


def test_the_prior_is_not_rounding_noise(tiny) -> None:
    """At DUO's defaults, a few steps from zero, on a model that computes in bfloat16: what float32 gives."""
    unsafe, safe = torch.randn(2, 2, 4, 4, 4, generator=torch.Generator().manual_seed(1))
    pairs, null = ConceptPairs(unsafe, safe, (("cat", ""),), tiny.family), tiny.conditions([""])[0]
    priors, gradients = [], []
    for autocast in (None, torch.bfloat16):
        net = copy.deepcopy(tiny.unet)
        with TrainableModel(net, tiny.schedule, tiny.prediction, (4, 4, 4), autocast=autocast) as model:
            phase = duo.phase(model, pairs, {"": null}, duo.Settings())
            made = phase.loss(0, torch.Generator().manual_seed(2))
            assert made["prior"] == 0, "of unchanged weights"
            with torch.no_grad():
                for i, p in enumerate(phase.parameters):
                    p.add_(3e-5 * normal(*p.shape, seed=i).to(p))
            prior = phase.loss(0, torch.Generator().manual_seed(2))["prior"]
            priors.append(prior.detach())
            gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(prior, phase.parameters)]))
    assert 0 < priors[0] < 1 and torch.allclose(*priors, rtol=1e-3)
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999
    light = duo.Settings(base_prior_weight=100.0, beta=50.0)
    with TrainableModel(net, tiny.schedule, tiny.prediction, (4, 4, 4), autocast=torch.bfloat16) as model:
        duo.phase(model, pairs, {"": null}, light)
        assert model.autocast is torch.bfloat16, "rounding weighs nothing in a light prior"


def test_duo_end_to_end(tiny) -> None:
    """The student comes to prefer the safe members; the same seed gives the same file; nothing else is touched."""
    g = torch.Generator().manual_seed(3)
    unsafe = torch.randn(3, 4, 4, 4, generator=g)
    safe = unsafe + 0.5 * torch.randn(3, 4, 4, 4, generator=g)
    pairs = ConceptPairs(unsafe, safe, (("cat", ""),), tiny.family)
    spec, losses = ConceptSpec.parse("cat"), []
    settings = duo.Settings(**SMALL)

    def run(seed: int = 0, progress=lambda done, total: None, report=None):
        chosen = duo.Settings(**SMALL, seed=seed)
        return duo.run(tiny, spec, chosen, progress, Aids(pairs=pairs, watch=report))

    one, two, other = run(), run(), run(1)
    assert set(one.deltas) == {s.name for s in tiny.trainable().sites if ".attn1." in s.name}
    assert all(d.rank == 4 for d in one.deltas.values()), "stored as the LoRA that it is"
    assert all(
        torch.equal(d.up, two.deltas[n].up) and torch.equal(d.down, two.deltas[n].down) for n, d in one.deltas.items()
    )
    assert not all(torch.equal(d.up, other.deltas[n].up) for n, d in one.deltas.items())
    tiny.replicas.pop(-1)  # the one that is still open
    with tiny.trainable() as model:
        phase = duo.phase(model, pairs, {"": tiny.conditions([""])[0]}, settings)
        Trainer(model, [phase], 30).run(watch=lambda _, i, x: losses.append(x["duo/preference"]), every=10)
    assert losses[-1] < losses[0] and losses[-1] < math.log(2)

    class Cancelled(Exception):
        pass

    def cancel(done: int, total: int) -> None:
        if done == 2:
            raise Cancelled

    with pytest.raises(Cancelled):
        run(progress=cancel)
    assert tiny.untouched()
    with pytest.raises(ValueError, match="pairs:"):
        ConceptPairs(unsafe, safe[:2], (("cat", ""),), tiny.family)
    with pytest.raises(ValueError, match="Connect Make SDEdit Pair"):
        erase(tiny, spec, "duo")
