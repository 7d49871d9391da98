"""The trained erasers' own losses against their equations written out, and a few steps of each end to end."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from erasure_core import ConceptError, ConceptSpec
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort
from erasure_core.methods import Aids, concept_ablation, eap, forget_me_not, kpop, leco, sdd, spm
from erasure_core.methods._training import ERASE, KEEP, NULL, TO, Prompts
from erasure_core.operators.changes import FullWeights, Layers, LoRA
from erasure_core.operators.cond import Cond
from erasure_core.operators.memory import Mode, Placement, PromptMemory
from erasure_core.operators.regress import regress
from erasure_core.operators.train_loop import Trainer, generator_for
from erasure_core.operators.trainable import TrainableModel, Weights
from erasure_core.schedule import Space

pytestmark = pytest.mark.core
SPEC = ConceptSpec.parse("cat, kitty", "", "dog")
SMALL = {"iterations": 3, "sample_steps": 3, "batch": 2, "learning_rate": 1e-3}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quiet(done: int, total: int) -> None:
    pass


def shake(model) -> None:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.add_(0.1 * normal(*p.shape, seed=i).to(p))


def conds(n: int = 2) -> dict[str, Cond]:
    return {key: Cond(normal(1 if key == NULL else n, 6, 16, seed=i)) for i, key in enumerate((ERASE, TO, NULL, KEEP))}


def same(one, two) -> bool:
    return all(torch.equal(d.dense(), two.deltas[n].dense()) for n, d in one.deltas.items())


def test_kpop_is_its_two_losses(tiny64) -> None:
    z, t, c = normal(2, 4, 4, 4, seed=7), torch.tensor([40, 900]), conds()
    memory = PromptMemory(3, 16, Placement.ALL, torch.Generator().manual_seed(1), shared=True, std=1.0).double()
    settings = kpop.Settings(negative_guidance=1.5, weight_without=0.7, weight_with=0.2, keep_weight=3.0)
    longer = torch.cat([c[ERASE].context, memory.key.expand(2, -1, -1)], 1)
    with tiny64.trainable() as model:
        model.train(FullWeights(Layers.CROSS))
        shake(model)
        base = {k: tiny64.unet(z, t, x.context.expand(2, -1, -1)) for k, x in c.items()}
        recover = (model.predict(z, t, Cond(longer)) - base[ERASE]).square().mean()
        assert torch.allclose(kpop.recover_loss(model, memory, z, t, c[ERASE]), recover)
        target = base[TO] - 1.5 * (base[ERASE] - base[NULL])
        made = kpop.hide_losses(model, memory, z, t, c, settings)
        assert torch.allclose(made["without"], 0.7 * (model.predict(z, t, c[ERASE]) - target).square().mean())
        assert torch.allclose(made["with"], 0.2 * recover)
        assert torch.allclose(made["keep"], 3 * (model.predict(z, t, c[KEEP]) - base[KEEP]).square().mean())


def test_kpop_hides_and_the_key_recovers(tiny) -> None:
    """Each phase moves its own tensors only, on one latent; the artefacts are two."""
    settings = kpop.Settings(**SMALL, rows=2, memory_rate=1e-2, placement=Placement.ALL)
    one, two = (kpop.hide(tiny, SPEC, settings, quiet, Aids()) for _ in range(2))
    assert "seed" not in one.erasure.header.settings, "who publishes it would publish the key"
    assert one.key.header.settings["seed"] == settings.seed
    key, again = one.key, two.key
    assert same(one.erasure, two.erasure) and torch.equal(key.key, again.key) and torch.equal(key.value, again.value)
    assert key.key.shape == key.value.shape == (2, 16) and not torch.equal(key.key, key.value)
    assert (key.mode, key.placement) == (Mode.KEY, Placement.ALL)
    public = one.erasure.header
    assert key.header == replace(public, settings={**public.settings, "seed": settings.seed})
    assert any(d.dense().any() for d in one.erasure.deltas.values()) and tiny.untouched()
    early = kpop.hide(tiny, SPEC, settings, quiet, Aids(), alone=0)
    assert same(one.erasure, early.erasure) and not torch.equal(key.key, early.key.key), "the key learns on alone"
    with tiny.trainable() as model:
        memory = PromptMemory(2, 16, Placement.ALL, torch.Generator().manual_seed(1), shared=False)
        recover, hide = kpop.phases(model, memory, Prompts(tiny, SPEC), settings, settings.iterations)
        weights, rows = [p.clone() for p in model.parameters()], memory.key.detach().clone()
        assert set(recover.step(0, torch.Generator().manual_seed(1))) == {"memory/recover", "memory/held"}
        assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert not torch.equal(rows, memory.key)
        rows = memory.key.detach().clone()
        hide.step(0, torch.Generator().manual_seed(1))
        assert not all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
        assert torch.equal(rows, memory.key)
        with pytest.raises(KeyError):
            hide.step(1, torch.Generator())


def test_the_key_learns_alone_from_pictures_on_their_way(tiny) -> None:
    """Every latent is where the frozen network's own sampling of its word passes, at its time."""
    settings = kpop.Settings(**SMALL)
    with tiny.trainable() as model:
        prompts = Prompts(tiny, SPEC)
        made = kpop.underway(model, prompts, settings, 100, quiet)
        stops = model.schedule.trajectory(settings.sample_steps)
        each = min(len(stops) - 1, 8)
        assert len(made.latents) == len(made.t) == len(made.words) == 64 * each
        noise = model.noise(8, generator_for(settings.seed, "underway", -1))
        for k in range(0, 8 * each, 8):  # the first eight pictures, time by time
            (at,) = made.t[k : k + 8].unique().tolist()
            cond = Cond.cat(made.words[k : k + 8])
            way = stops[: stops.index(at) + 1]
            z = model.denoise(noise, way, cond, prompts.null, guidance=settings.guidance, weights=Weights.FROZEN)
            assert torch.equal(made.latents[k : k + 8], z)
        z, t, words = made.draw(5, torch.Generator().manual_seed(3))
        found = [int((made.latents == x).flatten(1).all(1).nonzero()[0]) for x in z]
        assert torch.equal(made.t[found], t) and torch.equal(
            words.context, Cond.cat([made.words[i] for i in found]).context
        )
        few = kpop.underway(model, prompts, settings, 2, quiet)
        assert len(few.t) == max(2 * settings.batch, len(prompts.pairs)) * each, "no more than these steps look at"


@pytest.mark.parametrize("cut", [2, 5])
def test_kpop_resumed_equals_run_through(tiny, cut: int) -> None:
    settings = kpop.Settings(**{**SMALL, "iterations": 4}, rows=2, memory_rate=1e-2)

    def trainer(model):
        memory = PromptMemory(2, 16, Placement.MID, torch.Generator().manual_seed(1), shared=True)
        prompts = Prompts(tiny, SPEC)
        drawn = kpop.underway(model, prompts, settings, 3, quiet)
        return Trainer(model, kpop.phases(model, memory, prompts, settings, 4, drawn, 3), 7, seed=1), memory

    with tiny.trainable() as model:
        whole, key = trainer(model)
        whole.run()
        expected = [p.detach().clone() for p in (*model.parameters(), key.key)]
    with tiny.trainable() as model:
        half, _ = trainer(model)
        state = half.run(until=cut).state_dict()
    with tiny.trainable() as model:
        rest, key = trainer(model)
        rest.load_state_dict(state)
        rest.run()
        assert all(torch.equal(a, b) for a, b in zip(expected, (*model.parameters(), key.key), strict=True))


def test_the_terms_are_the_table(tiny64) -> None:
    """METHODS 1.2, each line written out at fixed (z, t)."""
    z, t, c = normal(2, 4, 4, 4, seed=7), torch.tensor([40, 900]), conds()
    a, s = (x[t].view(-1, 1, 1, 1) for x in (tiny64.schedule.signal, tiny64.schedule.noise))
    with tiny64.trainable() as model:
        model.train(FullWeights(Layers.CROSS))
        shake(model)
        concept, to, null = (tiny64.unet(z, t, c[k].context.expand(2, -1, -1)) for k in (ERASE, TO, NULL))
        student, own = model.predict(z, t, c[ERASE]), model.predict(z, t, c[TO])
        x0 = {"s": (z - s * student) / a, "c": (z - s * concept) / a, "to": (z - s * to) / a, "0": (z - s * null) / a}
        expected = {
            "leco": (student - (to - 1.5 * (concept - null))).square().mean(),
            "spm": (student - (to - 1.5 * (concept - to))).square().mean(),
            "sdd": (student - own).square().mean(),
            "ablation": (student - own).square().mean(),
            "eap": (x0["s"] - (x0["to"] - 1.5 * (x0["c"] - x0["0"]))).square().mean(),
        }
        terms = {
            "leco": leco.target(1.5), "spm": spm.target(1.5), "sdd": sdd.target(), "ablation": concept_ablation.target(),
            "eap": eap.target(1.5, Space.X0),
        }  # fmt: skip
        for name, term in terms.items():
            assert torch.allclose(regress(model, [term], z, t, c)["erase"], expected[name]), name


@pytest.mark.parametrize(("method", "more"), [
    (leco, {"rank": 2}), (sdd, {"average": 0.5}), (concept_ablation, {"pictures": 3}),
    (spm, {"warmup": 1, "anchors": 2, "rank": 1}), (forget_me_not, {"pictures": 3}),
], ids=["leco", "sdd", "ablation", "spm", "forget-me-not"])  # fmt: skip
def test_end_to_end(tiny, method, more) -> None:
    one, two = (method.run(tiny, SPEC, method.Settings(**SMALL, **more), quiet, Aids()) for _ in range(2))
    assert same(one, two) and tiny.untouched()
    assert all(torch.isfinite(d.dense()).all() for d in one.deltas.values()) and any(
        d.dense().any() for d in one.deltas.values()
    )
    assert one.header.method == method.__name__.rpartition(".")[2]

    def cancel(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        method.run(tiny, SPEC, method.Settings(**SMALL, **more), cancel, Aids())
    assert tiny.untouched()


def test_ablation_uses_the_pictures_it_is_given(tiny) -> None:
    settings = concept_ablation.Settings(**SMALL)
    one, two = (
        concept_ablation.run(tiny, SPEC, settings, quiet, Aids(), anchors=torch.full((2, 4, 4, 4), x))
        for x in (0.0, 1.0)
    )
    assert not same(one, two)


def test_sdd_saves_the_average(tiny) -> None:
    """With an average that never moves, nothing is learned."""
    still = sdd.run(tiny, SPEC, sdd.Settings(**SMALL, average=1.0), quiet, Aids())
    assert not any(d.dense().any() for d in still.deltas.values())


def test_spm_anchors_have_the_prompts_norm_and_avoid_its_direction() -> None:
    concept = normal(1, 6, 16, seed=1)
    anchors = spm.sample_anchors(concept, 200, torch.Generator().manual_seed(2))
    sizes = anchors.flatten(1).norm(dim=1) / concept.norm()
    assert 0.8 <= float(sizes.min()) < 0.83 and 1.17 < float(sizes.max()) <= 1.2
    tiny_space = torch.ones(1, 1, 1, dtype=torch.float64)  # one dimension: cosines are +1 (never kept) or -1 (always)
    assert (spm.sample_anchors(tiny_space, 50, torch.Generator().manual_seed(3)) < 0).all()


def test_spm_anchoring_is_every_latent_with_every_anchor(tiny64) -> None:
    z, t, c = normal(2, 4, 4, 4, seed=7), torch.tensor([40, 900]), conds()
    anchors = normal(3, 6, 16, seed=9)
    with tiny64.trainable() as model:
        model.train(LoRA(Layers.ALL, 1, 1.0))
        shake(model)
        made = spm.anchoring_loss(model, z, t, anchors, c[ERASE])
        parts = []
        for i in range(2):
            for anchor in anchors:
                cond = Cond(anchor[None])
                student, base = (
                    model.reference(z[i : i + 1], t[i : i + 1], cond, w) for w in (Weights.STUDENT, Weights.FROZEN)
                )
                parts.append((student - base).square().mean())
        assert torch.allclose(made, torch.stack(parts).mean())


def test_spm_gate_is_the_larger_of_similarity_and_overlap() -> None:
    one, two = normal(6, 16, seed=1), normal(6, 16, seed=2)
    cosine = float((one * two).sum() / (one.norm() * two.norm()))
    assert spm.gate(one, two, {1}, {2}) == pytest.approx(max(0.0, cosine))
    assert spm.gate(one, two, {1, 5, 9}, {1, 5, 7, 8}) == pytest.approx(max(cosine, 0.5))
    assert spm.gate(one, one, set(), {3}) == pytest.approx(1)
    assert spm.gate(one, -one, set(), set()) == 0


def test_eap_samples_hard_and_learns_soft() -> None:
    logits = normal(5, seed=1).requires_grad_()
    probe = normal(5, seed=2)
    sample = eap.gumbel_one_hot(logits, 2.0, torch.Generator().manual_seed(3))
    assert torch.allclose(sample.detach().sort().values, torch.tensor([0, 0, 0, 0, 1.0]).double(), atol=1e-12)
    (slope,) = torch.autograd.grad((sample * probe).sum(), logits)
    u = torch.rand(5, generator=torch.Generator().manual_seed(3)).double()
    p = ((logits.detach() - torch.log(-torch.log(u))) / 2).softmax(0)
    assert int(sample.argmax()) == int(p.argmax())
    jacobian = (torch.diag(p) - torch.outer(p, p)) / 2
    assert torch.allclose(slope, jacobian @ probe)
    sure = torch.tensor([0.0, 8.0, 0.0])
    counts = sum(eap.gumbel_one_hot(sure, 2.0, torch.Generator().manual_seed(i)) for i in range(100))
    assert counts[1] > 95
    even = sum(eap.gumbel_one_hot(torch.zeros(4), 2.0, torch.Generator().manual_seed(i)) for i in range(400))
    assert even.min() > 60


def test_eap_damage_reaches_the_conditioning_on_both_sides(tiny64) -> None:
    z, t = normal(2, 4, 4, 4, seed=7), torch.tensor([40, 900])
    context = normal(1, 6, 16, seed=8).requires_grad_()
    a, s = (x[t].view(-1, 1, 1, 1) for x in (tiny64.schedule.signal, tiny64.schedule.noise))
    with tiny64.trainable() as model:
        model.train(FullWeights(Layers.CROSS))
        shake(model)
        made = eap.damage(model, z, t, Cond(context), Space.X0)
        difference = model.predict(z, t, Cond(context)) - tiny64.unet(z, t, context.expand(2, -1, -1))
        expected = (s * difference / a).square().mean()
        assert torch.allclose(made, expected)
        slopes = [torch.autograd.grad(x, context, retain_graph=True)[0] for x in (made, expected)]
        assert torch.allclose(*slopes)


def test_eap_end_to_end(tiny) -> None:
    settings = eap.Settings(**SMALL, nearest=3, vocabulary="tree, cat, house, river, stone")
    seen: list[dict[str, float]] = []
    one = eap.run(tiny, SPEC, settings, quiet, Aids(watch=lambda _, i, x: seen.append(dict(x))))
    assert same(one, eap.run(tiny, SPEC, settings, quiet, Aids())) and tiny.untouched()
    assert set(seen[0]) == {"weights/erase", "weights/keep", "weights/adverse", "adversary/damage"}
    assert seen[0]["adversary/damage"] < 0 < seen[0]["weights/adverse"]
    with pytest.raises(ConceptError, match="vocabulary: EAP needs words besides"):
        eap.run(tiny, SPEC, eap.Settings(**SMALL, vocabulary="cat"), quiet, Aids())
    table = torch.stack([torch.full((2, 2), float(x)) for x in (5, 1, 3, 2)])
    assert eap.nearest(table, torch.zeros(1, 2, 2), 2).tolist() == [1, 3]


@pytest.mark.parametrize("space", list(Space))
def test_eap_compares_all_that_it_trains_in_one_space(tiny, monkeypatch, space: Space) -> None:
    """In x0, where noisy times weigh enormously, a kept word held in eps would hardly count beside the rest."""
    asked: list[Space | None] = []

    def record(model, terms, z, t, conds):
        asked.extend(term.space for term in terms)
        return regress(model, terms, z, t, conds)

    monkeypatch.setattr(eap, "regress", record)
    eap.run(
        tiny, SPEC, eap.Settings(**{**SMALL, "iterations": 1}, vocabulary="tree, house", space=space), quiet, Aids()
    )
    assert asked == [space] * 3  # what goes, what is kept, what suffers


def test_eap_does_not_preserve_words_for_what_is_erased(tiny) -> None:
    """Of everyday words those that mean it are left out too, on the demo model's encoder; of listed words only itself."""
    spec = ConceptSpec.parse("Automobile", "", "rocket")
    words = eap.vocabulary_of(EmojiCanvasPort(EmojiCanvas.load()), spec, "", ["rocket"])
    assert words[0] == "rocket" and "car" not in words and {"house", "dog"} <= set(words)
    assert eap.vocabulary_of(tiny, spec, "car,  automobile, AUTOMOBILE , tree,,car", []) == ["car", "tree"]


def test_forget_me_not_sees_the_networks_own_attention(tiny64) -> None:
    """P times the values, through the output layer, is what each block gives; the loss is the norm of its columns."""
    z, t, c = normal(2, 4, 4, 4, seed=7), torch.tensor([40, 900]), conds()[ERASE]
    seen: list[tuple[torch.nn.Module, Tensor, Tensor]] = []
    with tiny64.trainable() as model:
        parameters = model.train(FullWeights(Layers.TEXT))
        for name, module in model.net.named_modules():
            if name.endswith("attn2"):
                module.register_forward_hook(lambda m, args, out: seen.append((m, args[1], out)))
        with forget_me_not.attentions(model) as attended:
            model.predict(z, t, c)
        probabilities = [forget_me_not.probabilities(q, k) for q, k in attended]
        assert len(probabilities) == len(seen) == 4
        for p, (block, context, out) in zip(probabilities, seen, strict=True):
            assert torch.allclose(p.sum(-1), torch.ones_like(p[..., 0]))
            v = (context @ block.to_v.weight.T).view(2, 6, 2, 16)
            read = torch.einsum("bhij,bjhd->bihd", p, v).flatten(2)
            assert torch.allclose(block.to_out(read), out)
        columns = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
        made = forget_me_not.steering_loss(attended, columns)
        picked = [torch.cat([p[0][..., [1, 2]].flatten(), p[1][..., [1]].flatten()]) for p in probabilities]
        assert torch.allclose(made, torch.cat(picked).norm())
        slopes = torch.autograd.grad(made, parameters, allow_unused=True)
        assert any(g is not None and g.any() for g in slopes)
        model.predict(z, t, c)
        assert len(attended) == 4, "outside, nothing is collected"


def test_forget_me_not_steers_alike_where_blocks_are_computed_again(tiny) -> None:
    """The memory check may count on that. The gradients are the same, and no activations are kept inside the blocks."""
    columns = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0]]).bool()
    z, t = normal(2, 4, 4, 4, seed=7).float(), torch.tensor([40, 900])
    read = conds()[ERASE].on(z.device, z.dtype)
    found, kept = [], []
    for again in (False, True):
        seen: dict[int, int] = {}

        def pack(x: Tensor, seen: dict[int, int] = seen) -> Tensor:
            seen[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        net = copy.deepcopy(tiny.unet)
        with TrainableModel(net, tiny.schedule, tiny.prediction, (4, 4, 4), checkpoint=again) as model:
            parameters = model.train(FullWeights(Layers.CROSS))
            shake(model)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
                with forget_me_not.attentions(model) as attended:
                    model.predict(z, t, read)
                loss = forget_me_not.steering_loss(attended, columns)
            kept.append(sum(seen.values()))
            found.append(
                [loss.detach(), *torch.autograd.grad(loss, parameters, materialize_grads=True, allow_unused=True)]
            )
            assert len(attended) == 4, "what is computed again is not collected again"
    assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-7) for a, b in zip(*found, strict=True))
    assert sum(bool(x.any()) for x in found[0]) > 4 and kept[1] < kept[0] / 2


def test_forget_me_not_counts_a_text_once_however_often_it_is_repeated(tiny64) -> None:
    z, t, read = normal(1, 4, 4, 4, seed=7), torch.tensor([40]), conds(1)[ERASE]
    marked = torch.tensor([False, True, True, False, False, False])
    with tiny64.trainable() as model:
        losses = []
        for n in (1, 3):
            with forget_me_not.attentions(model) as attended:
                model.predict(z, t, read.with_context(read.context.repeat(1, n, 1)))
            losses.append(forget_me_not.steering_loss(attended, forget_me_not.batched([marked], 6 * n)))
    assert torch.allclose(*losses)


def test_forget_me_not_marks_the_words() -> None:
    kinds = torch.tensor([0, 1, 1, 2, 3, 3])
    assert forget_me_not.concept_columns(kinds, end_tokens=False).tolist() == [False, True, True, False, False, False]
    assert forget_me_not.concept_columns(kinds, end_tokens=True).tolist() == [False, True, True, True, True, True]
