"""SDEdit against its equations, pairs against what a judge says of them, their files against damage."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Sequence

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from erasure_core import ConceptPairs, ConceptSpec, Family, FileError, WrongModelError, erase
from erasure_core.methods import Aids
from erasure_core.operators.cond import Cond
from erasure_core.pair_files import load_pairs, save_pairs
from erasure_core.pairs import NoPairsError, make_pairs, pair_noise, pair_up, sdedit

pytestmark = pytest.mark.core
FAMILY = Family("tiny", 16, 1, 1)
SCENES = (("a cat, sleeping", "a dog, sleeping"), ("a cat, sleeping", "a house"))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def made_by(port, **changed) -> ConceptPairs:
    unsafe, safe, null = port.conditions(["cat", "dog", ""])
    settings = {"count": 3, "steps": 4, "guidance": 3.0, "seed": 5, "family": port.family} | changed
    with port.trainable() as model:
        return make_pairs(model, unsafe, safe, null, scenes=[("cat", "dog")], **settings)


# SDEdit


@pytest.mark.parametrize(("kind", "strength", "times"), [
    ("tiny64", 0.75, [749, 499, 249, None]),
    ("tiny64", 0.6, [599, 499, 249, None]),
    ("tiny64", 1.0, [999, 749, 499, 249, None]),
    ("tiny_flow", 0.75, [749, 499, 249, None]),
])  # fmt: skip
def test_sdedit_noises_to_its_strength_and_denoises_what_is_left(
    kind: str, strength: float, times: list, request
) -> None:
    port = request.getfixturevalue(kind)
    z0, n = normal(2, 4, 4, 4, seed=1), normal(2, 4, 4, 4, seed=2)
    safe, unsafe = Cond(normal(1, 6, 16, seed=3)), Cond(normal(1, 6, 16, seed=4))
    with port.trainable() as model:
        made = sdedit(model, z0, n, safe, unsafe, strength=strength, guidance=3.0, steps=4)
    flow = kind == "tiny_flow"
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    abar = torch.cumprod(1 - betas, 0)

    def scales(t: int | None) -> tuple[float, float]:
        if t is None:
            return 1.0, 0.0
        sigma = (t + 1) / 1000
        return (1 - sigma, sigma) if flow else (float(abar[t].sqrt()), float((1 - abar[t]).sqrt()))

    a, s = scales(times[0])
    z = a * z0 + s * n
    for t, to in itertools.pairwise(times):
        a, s = scales(t)
        given = torch.full((2,), float(t + 1) if flow else float(t))
        out = [port.unet(z, given, c.context.expand(2, -1, -1)) for c in (safe, unsafe)]
        guided = 3 * out[0] - 2 * out[1]
        x0, noise = (z - s * guided, z + a * guided) if flow else ((z - s * guided) / a, guided)
        a, s = scales(to)
        z = a * x0 + s * noise
    assert torch.allclose(made, z, atol=1e-9)


def test_strength_zero_gives_the_picture_back(tiny64) -> None:
    z0, cond = normal(2, 4, 4, 4), Cond(normal(1, 6, 16))
    with tiny64.trainable() as model:
        assert torch.equal(sdedit(model, z0, z0, cond, cond, strength=0, guidance=3.0, steps=4), z0)
        with pytest.raises(ValueError, match="strength must lie between 0 and 1"):
            sdedit(model, z0, z0, cond, cond, strength=1.1, guidance=3.0, steps=4)


def test_more_strength_moves_further(tiny64) -> None:
    pairs = [made_by(tiny64, strength=s, guidance=1.0) for s in (0.0, 0.25, 0.75, 1.0)]
    moved = [float((p.unsafe - p.safe).norm()) for p in pairs]
    assert moved[0] == 0 and moved == sorted(moved)


# Pairs


def test_both_members_have_one_noise(tiny64) -> None:
    """The unsafe member is what the sampler makes of the noise; the safe one is SDEdit's with the same noise."""
    pairs = made_by(tiny64)
    unsafe, safe, null = tiny64.conditions(["cat", "dog", ""])
    with tiny64.trainable() as model:
        noise = torch.cat([pair_noise(5, (i, 0), (4, 4, 4)) for i in range(3)]).double()
        drawn = model.denoise(noise, model.schedule.trajectory(4), unsafe, null, guidance=3.0)
        edited = sdedit(model, drawn, noise, safe, unsafe, strength=0.75, guidance=3.0, steps=4)
    assert torch.equal(pairs.unsafe, drawn.float()) and torch.equal(pairs.safe, edited.float())
    assert tiny64.untouched()


def test_seeds_own_the_pairs(tiny) -> None:
    one, again, other, more = made_by(tiny), made_by(tiny), made_by(tiny, seed=6), made_by(tiny, count=5)
    assert torch.equal(one.unsafe, again.unsafe) and torch.equal(one.safe, again.safe)
    assert not torch.allclose(one.unsafe, other.unsafe)
    assert torch.allclose(more.unsafe[:3], one.unsafe, atol=1e-5), "a pair does not depend on the number of others"
    assert made_by(tiny, seed=2**64 - 1, count=1).unsafe.isfinite().all()


def scripted(verdicts: dict[int, tuple[str, str]]):
    """draw, edit, look of 1 x 1 latents (pair, noise, is safe).

    Verdicts by pair: whether the unsafe and the safe picture of each noise show the concept; the last one goes on.
    """
    asked: list[tuple[bool, int, int]] = []

    def make(safe: bool, keys: Sequence[tuple[int, int]]) -> Tensor:
        asked.extend((safe, *key) for key in keys)
        return torch.tensor([[n, a, safe] for n, a in keys]).float()[:, :, None, None]

    def look(latents: Tensor) -> Tensor:
        rows = latents[:, :, 0, 0].int().tolist()
        shows = [verdicts[n][safe][min(a, len(verdicts[n][safe]) - 1)] == "y" for n, a, safe in rows]
        return torch.tensor([0.9 if y else 0.1 for y in shows])

    return (lambda keys: make(False, keys)), (lambda _, keys: make(True, keys)), look, asked


def test_members_are_redrawn_until_the_judge_agrees() -> None:
    verdicts = {
        0: ("y", "n"),
        1: ("ny", "yyn"),  # unsafe at the second noise, safe only at the third
        2: ("n", "n"),
        3: ("y", "y"),
    }
    draw, edit, look, asked = scripted(verdicts)
    unsafe, safe, tally = pair_up(4, draw, edit, look, threshold=0.5, max_redraws=2, at_once=3)
    assert unsafe[:, :2, 0, 0].tolist() == [[0, 0], [1, 1]] and safe[:, :2, 0, 0].tolist() == [[0, 0], [1, 2]]
    assert (tally.asked, tally.made, tally.unseen, tally.stubborn) == (4, 2, (2,), (3,))
    assert (tally.unsafe_redraws, tally.safe_redraws) == (1 + 2, 1 + 2)
    assert max(noise for _, pair, noise in asked if pair == 3) == 2, "capped"
    said = tally.report(2)
    assert "2 of 4 pairs made" in said and "1 (pair 3)" in said and "1 (pair 4)" in said


def test_without_a_judge_nothing_is_redrawn() -> None:
    draw, edit, _, asked = scripted({})
    unsafe, _, tally = pair_up(3, draw, edit, None, threshold=0.5, max_redraws=9)
    assert len(unsafe) == 3 and len(asked) == 6
    assert "no judge looked" in tally.report(9)


def test_given_pictures_are_not_redrawn() -> None:
    draw, edit, look, asked = scripted({0: ("n", "n"), 1: ("y", "n")})
    unsafe, _, tally = pair_up(2, draw, edit, look, threshold=0.5, max_redraws=5, drawn=False)
    assert len(unsafe) == 1 and tally.unseen == (0,)
    assert [key for key in asked if not key[0]] == [(False, 0, 0), (False, 1, 0)]


def test_a_safe_member_is_redrawn_until_the_rest_stays() -> None:
    draw, edit, look, _ = scripted({0: ("ny", "n"), 1: ("y", "n")})

    def alike(unsafe: Tensor, safe: Tensor) -> Tensor:
        assert torch.equal(unsafe[:, 0], safe[:, 0]), "pair by pair"
        return (safe[:, 1, 0, 0] >= 2) & (safe[:, 0, 0, 0] == 0)

    _, safe, tally = pair_up(2, draw, edit, look, threshold=0.5, max_redraws=3, alike=alike)
    assert safe[:, :2, 0, 0].tolist() == [[0, 2]] and tally.stubborn == (1,)
    assert "and the rest stayed" in tally.report(3) and "or lost the rest" in tally.report(3)


def test_redraws_climb_to_the_weakest_edit_that_works(tiny64, monkeypatch) -> None:
    used: list[float] = []
    monkeypatch.setattr("erasure_core.pairs.sdedit", lambda *a, strength, **k: (used.append(strength), sdedit(
        *a, strength=strength, **k))[1])  # fmt: skip

    def weak(unsafe: Tensor, safe: Tensor) -> Tensor:
        return torch.full((len(safe),), len(used) >= 3)

    pairs = made_by(tiny64, count=2, strength=0.5, strongest=0.9, max_redraws=4, alike=weak)
    assert used == pytest.approx([0.5, 0.6, 0.7]) and "strength 0.5 to 0.9" in pairs.note
    assert pairs.tally is not None and pairs.tally.safe_redraws == 4
    with pytest.raises(ValueError, match="strongest must lie between"):
        made_by(tiny64, strength=0.5, strongest=0.4)
    used.clear()
    with pytest.raises(NoPairsError) as caught:
        made_by(tiny64, count=1, strength=0.5, strongest=0.9, max_redraws=2, alike=lambda a, b: torch.zeros(len(b)) > 0)
    assert used == pytest.approx([0.5, 0.7, 0.9]) and caught.value.tally.stubborn == (0,)


def test_scenes_take_turns(tiny64) -> None:
    """Pair k is what scene k % m makes of the noise of pair k."""
    cat, dog, house, null = tiny64.conditions(["cat", "dog", "house", ""])
    settings = {"steps": 4, "guidance": 3.0, "seed": 5, "family": tiny64.family}
    scenes, names = [(cat, dog), (cat, house), (dog, house)], [("cat", "dog"), ("cat", "house"), ("dog", "house")]
    with tiny64.trainable() as model:
        conds = [Cond.cat(c) for c in zip(*scenes, strict=True)]
        mixed = make_pairs(model, *conds, null, count=5, scenes=names, **settings)
        assert [mixed.scene(k) for k in range(5)] == [*names, *names[:2]]
        for number, scene in enumerate([0, 1, 2, 0, 1]):
            alone = make_pairs(model, *scenes[scene], null, count=5, scenes=names[:1], **settings)
            for member in ("unsafe", "safe"):
                assert torch.allclose(getattr(mixed, member)[number], getattr(alone, member)[number], atol=1e-6)
        with pytest.raises(ValueError, match="1 unsafe and 2 safe conditionings for 2 scenes"):
            make_pairs(model, cat, Cond.cat([dog, house]), null, count=1, scenes=names[:2], **settings)


def test_a_pair_that_is_left_out_moves_no_scene() -> None:
    draw, edit, look, _ = scripted({0: ("y", "n"), 1: ("n", "n"), 2: ("y", "y"), 3: ("y", "n")})
    unsafe, _, tally = pair_up(4, draw, edit, look, threshold=0.5, max_redraws=0, scenes=2)
    assert tally.numbers == (0, 3) and unsafe[:, 0, 0, 0].tolist() == [0, 3]


def test_a_batch_is_of_one_scene() -> None:
    draw, edit, look, _ = scripted({n: ("ny", "n") for n in range(7)})
    batches: list[list[int]] = []

    def noted(keys: Sequence[tuple[int, int]]) -> Tensor:
        batches.append([number for number, _ in keys])
        return draw(keys)

    unsafe, _, tally = pair_up(7, noted, edit, look, threshold=0.5, max_redraws=1, scenes=3, at_once=2)
    assert batches == 2 * [[0, 3], [6], [1, 4], [2, 5]] and tally.unsafe_redraws == 7
    assert unsafe[:, 0, 0, 0].tolist() == list(range(7)), "in the order of their numbers"


def test_a_judge_that_is_never_satisfied() -> None:
    draw, edit, look, _ = scripted({0: ("n", "n")})
    with pytest.raises(NoPairsError, match=r"no pair passed. 0 of 1 pairs made.*after 3 redraws"):
        pair_up(1, draw, edit, look, threshold=0.5, max_redraws=3)


def test_real_pictures(tiny64) -> None:
    given = normal(2, 4, 4, 4)
    pairs = made_by(tiny64, originals=given)
    assert torch.equal(pairs.unsafe, given.float()) and not torch.allclose(pairs.safe, pairs.unsafe)


def test_progress_counts_draws_and_can_cancel(tiny) -> None:
    seen: list[tuple[int, int]] = []
    made_by(tiny, count=5, progress=lambda *at: seen.append(at))
    assert seen == [(4, 10), (5, 10), (9, 10), (10, 10)]

    def stop(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        made_by(tiny, progress=stop)
    assert tiny.untouched()


@pytest.mark.parametrize("wrong", [{"count": 0}, {"count": 1025}, {"max_redraws": -1}, {"max_redraws": 101}])
def test_numbers_out_of_range(tiny, wrong: dict) -> None:
    with pytest.raises(ValueError, match="count must be 1 to 1024 and max_redraws 0 to 100"):
        made_by(tiny, **wrong)


def test_duo_learns_from_them(tiny) -> None:
    pairs = made_by(tiny)
    settings = {"iterations": 2, "batch": 2, "rank": 2}
    erasure = erase(tiny, ConceptSpec.parse("cat"), "duo", settings, aids=Aids(pairs=pairs))
    assert any(d.up.any() for d in erasure.deltas.values())


def test_shapes_and_families_are_checked() -> None:
    one = torch.zeros(2, 4, 4, 4)
    for shown in ((0,), (0, 1), (0, -1)):
        with pytest.raises(ValueError, match="2 pairs and 1 scenes don't match up"):
            ConceptPairs(one, one, (("a", "b"),), FAMILY, shown=shown)
    with pytest.raises(ValueError, match="must be the same"):
        ConceptPairs(torch.zeros(2, 4, 4, 4), torch.zeros(1, 4, 4, 4), (("a", "b"),), FAMILY)
    with pytest.raises(WrongModelError, match=r"made with tiny .* but this is sd15"):
        ConceptPairs(torch.zeros(1, 4, 4, 4), torch.zeros(1, 4, 4, 4), (("a", "b"),), FAMILY).check_fits(
            Family("sd15", 768, 2, 4)
        )


# Files


@pytest.fixture
def pairs() -> ConceptPairs:
    unsafe, safe = normal(3, 4, 4, 6).float(), normal(3, 4, 4, 6, seed=1).float()
    return ConceptPairs(unsafe, safe, SCENES, FAMILY, "3 of 3 pairs made\nseed 1", (1, 0, 1))


def test_saved_and_read(pairs: ConceptPairs, tmp_path) -> None:
    read = load_pairs(save_pairs(pairs, tmp_path / "p.safetensors"))
    assert torch.equal(read.unsafe, pairs.unsafe) and torch.equal(read.safe, pairs.safe)
    assert (read.scenes, read.shown, read.family) == (SCENES, (1, 0, 1), FAMILY) and read.scene(2) == SCENES[1]
    assert "3 of 3 pairs made" in read.note
    lines = read.summary().splitlines()
    assert lines[0] == "3 pairs of 2 scenes" and "'a cat, sleeping' -> 'a dog, sleeping'" in lines[1]
    assert [p.name for p in tmp_path.iterdir()] == ["p.safetensors"]


def test_nothing_is_half_written(pairs: ConceptPairs, tmp_path) -> None:
    with pytest.raises(FileError, match="could not be written"):
        save_pairs(pairs, tmp_path / "nowhere" / "p.safetensors")
    broken = ConceptPairs(pairs.unsafe * float("nan"), pairs.safe, (("a", "b"),), FAMILY)
    with pytest.raises(FileError, match="unsafe has values that are not numbers"):
        save_pairs(broken, tmp_path / "p.safetensors")
    with pytest.raises(FileError, match="is empty"):
        save_pairs(ConceptPairs(pairs.unsafe, pairs.safe, (("", "b"),), FAMILY), tmp_path / "p.safetensors")
    assert not list(tmp_path.iterdir())


def rewritten(path, tensors: dict | None = None, header=None) -> None:
    with safe_open(path, framework="pt") as f:
        metadata = f.metadata()
    kept = load_file(path) if tensors is None else tensors
    save_file(kept, path, metadata if header is None else header(metadata))


@pytest.mark.parametrize(("damage", "sentence"), [
    (lambda p: p.write_bytes(p.read_bytes()[:200]), "cut off"),
    (lambda p: p.write_bytes(p.read_bytes()[:-4]), "damaged safetensors file"),
    (lambda p: p.write_bytes(b""), "empty or cut off"),
    (lambda p: p.write_bytes(b"PK\x03\x04" + bytes(100)), "pickled file"),
    (lambda p: p.write_bytes(struct.pack("<Q", 1 << 40) + b"{" + bytes(20)), "header claims"),
    (lambda p: p.unlink(), "no such file"),
    (lambda p: rewritten(p, header=lambda m: {"format": "pt"}), "not a set of pairs"),
    (lambda p: rewritten(p, header=lambda m: m | {"concept_pairs": "[" * 5000}), "header"),
    (lambda p: rewritten(p, header=lambda m: m | {"concept_pairs": "{}"}), "header"),
    (lambda p: rewritten(p, header=lambda m: {k: v for k, v in m.items() if k != "concept_pairs_scenes"}), "scenes"),
    (lambda p: rewritten(p, header=lambda m: m | {"concept_pairs_scenes": "[" * 5000}), "scenes"),
    (lambda p: rewritten(p, header=lambda m: m | {"concept_pairs_scenes": '{"scenes": [["a"]], "shown": []}'}), "prompt"),
    (lambda p: rewritten(p, header=lambda m: m | {"concept_pairs_scenes": '{"scenes": [], "shown": []}'}), "don't match up"),
    (lambda p: rewritten(p, header=lambda m: m | {"concept_pairs_scenes": '{"scenes": [["a", "b"]], "shown": [0, 0, 9]}'}),
     "don't match up"),
    (lambda p: rewritten(p, {"unsafe": torch.ones(1, 4, 4, 4)}), "holds 'unsafe' and 'safe'"),
    (lambda p: rewritten(p, {k: torch.ones(1, 4, 4, 4) for k in ("unsafe", "safe", "more")}), "holds 'unsafe' and 'safe'"),
    (lambda p: rewritten(p, {"unsafe": torch.ones(1, 4, 4, 4), "safe": torch.ones(2, 4, 4, 4)}), "must be the same"),
    (lambda p: rewritten(p, {k: torch.ones(4, 4, 4) for k in ("unsafe", "safe")}), "shape"),
    (lambda p: rewritten(p, {k: torch.ones(1, 4, 4, 4, dtype=torch.int32) for k in ("unsafe", "safe")}), "type I32"),
    (lambda p: rewritten(p, {k: torch.full((1, 4, 4, 4), float("inf")) for k in ("unsafe", "safe")}), "not numbers"),
    (lambda p: rewritten(p, {k: torch.ones(1025, 1, 1, 1) for k in ("unsafe", "safe")}), "at most 1024"),
])  # fmt: skip
def test_files_that_are_refused(pairs: ConceptPairs, tmp_path, damage, sentence: str) -> None:
    path = save_pairs(pairs, tmp_path / "p.safetensors")
    damage(path)
    with pytest.raises(FileError, match=sentence):
        load_pairs(path)


def test_scenes_of_several_concepts_are_each_judged_by_their_own() -> None:
    """The judge of the first would leave out every pair of the second."""
    draw, edit, look, _ = scripted({0: ("y", "n"), 1: ("n", "n"), 2: ("y", "n"), 3: ("n", "n")})

    def other(latents: torch.Tensor) -> torch.Tensor:
        return 1 - look(latents)

    unsafe, _, tally = pair_up(4, draw, edit, [look, look], threshold=0.5, max_redraws=0, scenes=2)
    assert tally.numbers == (0, 2) and len(unsafe) == 2
    _, _, tally = pair_up(4, draw, edit, [look, other], threshold=0.5, max_redraws=0, scenes=2)
    assert tally.unseen == () and tally.stubborn == (1, 3), "what isn't seen is seen by the other, before and after"
    nothing = ConceptPairs(
        torch.zeros(2, 4, 4, 4), torch.zeros(2, 4, 4, 4), (("a", "b"), ("c", "d")), FAMILY, "", (1, 1)
    )
    assert nothing.summary().splitlines()[:3] == ["2 pairs of 2 scenes", "  none: 'a' -> 'b'", "  2: 'c' -> 'd'"]
