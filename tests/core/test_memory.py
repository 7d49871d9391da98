"""Prompt memory: rows behind the text against a plain softmax, strengths, files, and learning to suppress."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from erasure_core import ConceptSpec, Family, FileError, Header, WrongModelError
from erasure_core import suppress as module
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort, reading
from erasure_core.methods import Aids
from erasure_core.operators.checkpoint import Checkpoint
from erasure_core.operators.cond import Cond
from erasure_core.operators.memory import (
    Mode,
    Placement,
    PromptMemory,
    SavedMemory,
    extended,
    load_memory,
    quarters_of,
    read_memory_header,
    save_memory,
)  # fmt: skip

pytestmark = pytest.mark.core
SPEC = ConceptSpec.parse("cat, kitty", "", "dog")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def saved(rows: int = 3, width: int = 16, **changes: object) -> SavedMemory:
    header = Header("suppress", {"rows": rows}, SPEC, Family("tiny", width, 1, 1), "0" * 16, "1")
    key, value = (normal(rows, width, seed=s).float() for s in (1, 2))
    return replace(SavedMemory(header, Mode.SUPPRESS, Placement.ALL, 6, key, value), **changes)


@pytest.mark.parametrize("strengths", [(1.0,), (0.25,), (0.5,), (1.75,), (3.0,), (0.75, 1.5), (1.0, 0.0), (0.0,)])
@pytest.mark.parametrize("repeated", [1, 2, 3])
def test_strength_scales_the_odds_of_the_rows(strengths: tuple[float, ...], repeated: int) -> None:
    """Against a softmax with log(strength) added to the rows' logits, at any repetition of the text."""
    q, text = normal(1, 5, 8, seed=1), normal(1, 6, 8, seed=2)
    keys, values = ([normal(m, 8, seed=s + m) for m in (2, 3)][: len(strengths)] for s in (10, 20))
    logits, rows = [q @ text.mT], [text]
    for strength, k, v in zip(strengths, keys, values, strict=True):
        if strength:
            logits.append(q @ k.T + torch.tensor(strength, dtype=torch.float64).log())
            rows.append(v[None])
    expected = torch.cat(logits, 2).softmax(2) @ torch.cat(rows, 1)

    context = text.repeat(1, repeated, 1)
    quarters = [quarters_of(s) for s in strengths]
    k, v = (extended(context, [(r, 6, n) for r, n in zip(x, quarters, strict=True)]) for x in (keys, values))
    assert torch.allclose((q @ k.mT).softmax(2) @ v, expected)
    if strengths == (1.0,):
        assert k.shape[1] == repeated * 8, "at strength 1 nothing is longer than it must be"
    if strengths == (0.0,):
        assert k is context


def test_a_batch_reads_the_same_rows_in_its_own_type() -> None:
    context = normal(3, 6, 8).bfloat16()
    made = extended(context, [(normal(2, 8, seed=3), 77, 4)])
    assert made.shape == (3, 8, 8) and made.dtype == torch.bfloat16
    assert torch.equal(made[:, :6], context) and torch.equal(made[0, 6:], made[2, 6:])


@pytest.mark.parametrize("strength", [-0.25, 0.3, 1.01])
def test_other_strengths_are_refused(strength: float) -> None:
    with pytest.raises(ValueError, match="it counts rows in quarters"):
        quarters_of(strength)


def test_placements() -> None:
    blocks = ("input_blocks.1.1.x", "middle_block.1.x", "output_blocks.0.1.x")
    covered = {p: [p.covers(b) for b in blocks] for p in Placement}
    assert covered == {
        Placement.MID: [False, True, False],
        Placement.MIDOUT: [False, True, True],
        Placement.ALL: [True] * 3,
    }


def test_rows_start_as_text_that_is_there_already() -> None:
    """So attention gives at first almost what it gives without them."""
    states = 5 * normal(7, 400, seed=1).float()
    memory = PromptMemory.beside(states, 6, Placement.ALL, torch.Generator().manual_seed(1), shared=False)
    for rows in (memory.key.detach(), memory.value.detach()):
        off = rows - states[1:]
        assert float(off.std()) == pytest.approx(0.5, rel=0.1)
    assert memory.length == 7 and not torch.equal(memory.key, memory.value)
    shared = PromptMemory.beside(states, 2, Placement.ALL, torch.Generator().manual_seed(1), shared=True)
    assert shared.key is shared.value and float((shared.key.detach() - states[[1, 6]]).std()) < 1
    with pytest.raises(ValueError, match="1 to 1000 rows"):
        PromptMemory.beside(states, 0, Placement.ALL, torch.Generator(), shared=False)


# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return save_memory(saved(), tmp_path / "m.safetensors")


def rewritten(file: Path, tensors: dict[str, Tensor] | None = None, **changes: object) -> Path:
    """The file with other tensors or header fields (``...`` removes one)."""
    with safe_open(file, framework="pt") as f:
        metadata, own = f.metadata(), {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
    header = {k: v for k, v in {**json.loads(metadata["prompt_memory"]), **changes}.items() if v is not ...}
    save_file(own if tensors is None else tensors, file, {**metadata, "prompt_memory": json.dumps(header)})
    return file


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("placement", list(Placement))
def test_round_trip(tmp_path: Path, mode: Mode, placement: Placement) -> None:
    memory = saved(mode=mode, placement=placement)
    back = load_memory(save_memory(memory, tmp_path / "m.safetensors"))
    assert (back.header, back.mode, back.placement, back.length) == (memory.header, mode, placement, 6)
    assert torch.equal(back.key, memory.key) and torch.equal(back.value, memory.value)
    assert back.summary() == memory.summary() and "cat, kitty" in back.summary()
    assert [x.name for x in tmp_path.iterdir()] == ["m.safetensors"]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mode": "destroy"}, "its mode or placement is unknown"),
        ({"placement": 3}, "its mode or placement is unknown"),
        ({"mode": ...}, "its mode or placement is unknown"),
        ({"length": 0}, "length must be a whole number"),
        ({"length": True}, "length must be a whole number"),
        ({"format": 99}, "Update Concept Erasure"),
        ({"erase": []}, "nothing to erase"),
        ({"tensors": {"key": torch.ones(2, 16)}}, "'key' and 'value' and no others"),
        ({"tensors": {"key": torch.ones(2, 16), "value": torch.ones(3, 16)}}, "don't fit tiny"),
        ({"tensors": {"key": torch.ones(2, 8), "value": torch.ones(2, 8)}}, "don't fit tiny"),
        ({"tensors": {"key": torch.ones(1001, 16), "value": torch.ones(1001, 16)}}, "don't fit tiny"),
        ({"tensors": {"key": torch.ones(2, 16), "value": torch.full((2, 16), torch.nan)}}, "not numbers"),
        ({"tensors": {"key": torch.ones(2, 16).int(), "value": torch.ones(2, 16).int()}}, "which an erasure never has"),
    ],
)
def test_bad_files_get_a_sentence(file: Path, change: dict, sentence: str) -> None:
    with pytest.raises(FileError, match=sentence):
        load_memory(rewritten(file, **change))


def test_foreign_and_broken_files(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for length in (0, 200, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(FileError, match=r"cut off|damaged"):
            load_memory(file)
    save_file({"key": torch.ones(2, 16)}, tmp_path / "other.safetensors")
    for read in (load_memory, read_memory_header):
        with pytest.raises(FileError, match="not a prompt memory"):
            read(tmp_path / "other.safetensors")
        with pytest.raises(FileError, match="no such file"):
            read(tmp_path / "none.safetensors")
    with pytest.raises(FileError, match="Learn it again"):
        save_memory(saved(key=torch.full((3, 16), torch.inf)), file)


def test_a_header_alone_is_that_of_the_whole(file: Path) -> None:
    assert read_memory_header(file) == load_memory(file).header


def test_another_family_is_named(tmp_path: Path) -> None:
    saved().check_fits(Family("tiny", 16, 1, 1))
    with pytest.raises(WrongModelError, match=r"made for tiny \(text width 16\), but this is sdxl \(text width 2048\)"):
        saved().check_fits(Family("sdxl", 2048, 2, 3))


# ------------------------------------------------------------------------------------------------------------- learning

SMALL = module.Settings(iterations=3, rows=2, batch=2, pictures=2, kept_pictures=3, sample_steps=3)


def quiet(done: int, total: int) -> None:
    pass


def test_suppressing_is_its_equation(tiny64) -> None:
    """T, the stops of a guided sampler, and the four terms, each written out."""
    null, concept, other, to = (Cond(normal(1, 6, 16, seed=s)) for s in range(4))
    scenes = [module.Scene(concept, null), module.Scene(concept, to), module.Scene(other)]
    settings = replace(SMALL, negative_guidance=1.5, guidance=2.0)
    memory = PromptMemory(
        3, 16, Placement.ALL, torch.Generator().manual_seed(1), shared=False, std=1, length=6
    ).double()

    def eps(z: Tensor, t: int, cond: Cond) -> Tensor:
        return tiny64.unet(z, torch.full((len(z),), t), cond.context.expand(len(z), -1, -1))

    with tiny64.trainable() as model:
        stops = module.draw(model, scenes, null, settings, quiet)
        assert [stop.t for stop in stops] == [999, 666, 333]
        z = model.noise(3, torch.Generator().manual_seed(0))
        for stop, after in zip(stops, (666, 333, None), strict=True):
            assert torch.allclose(stop.z, z)
            own = torch.cat([eps(z[i : i + 1], stop.t, s.cond) for i, s in enumerate(scenes)])
            none = eps(z, stop.t, null)
            shift = 1.5 * (own - none)
            target = torch.stack([none[0] - shift[0], eps(z[1:2], stop.t, to)[0] - shift[1], own[2]])
            assert all(torch.allclose(*pair) for pair in ((stop.null, none), (stop.target, target)))
            z = model.schedule.step(none + 2 * (own - none), z, stop.t, after, model.space)

        made = module.losses(model, memory, stops[1], scenes, [0, 1, 2], null, 0.3)
        z, t = stops[1].z, stops[1].t

        def student(cond: Cond, z: Tensor) -> Tensor:
            return model.predict(z, torch.full((len(z),), t), cond, memory=memory)

        away = (student(concept, z[:2]) - stops[1].target[:2]).square().mean()
        empty = (student(null, z[:2]) - eps(z[:2], t, null)).square().mean()
        keep = (student(other, z[2:]) - eps(z[2:], t, other)).square().mean()
        keep_empty = (student(null, z[2:]) - eps(z[2:], t, null)).square().mean()
        assert torch.allclose(made["away"], away) and torch.allclose(made["empty"], 0.3 * empty)
        assert torch.allclose(made["keep"], 0.3 * (keep + keep_empty))


def test_suppressing_learns_rows_and_nothing_else(tiny) -> None:
    seen: list[dict[str, float]] = []

    def learn(progress=quiet) -> SavedMemory:
        return module.suppress(tiny, SPEC, SMALL, progress, Aids(watch=lambda m, i, x: seen.append(dict(x))))

    one, two = learn(), learn()
    assert torch.equal(one.key, two.key) and torch.equal(one.value, two.value) and tiny.untouched()
    assert set(seen[0]) == {"memory/away", "memory/empty", "memory/keep"}
    assert (one.mode, one.length, one.header.spec, one.header.family) == (Mode.SUPPRESS, 6, SPEC, tiny.family)
    assert one.header.settings["placement"] == "all"
    null = tiny.conditions([""])[0].context[0]
    start = PromptMemory.beside(null, 2, Placement.ALL, torch.Generator().manual_seed(0), shared=False)
    assert not torch.equal(one.key, start.key) and not torch.equal(one.key, one.value)

    steps = []

    def cancel(done: int, total: int) -> None:
        steps.append((done, total))
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(cancel)
    assert tiny.untouched() and steps[0] == (0, 6) and [d for d, _ in steps] == sorted(d for d, _ in steps)


def test_suppressing_goes_on_where_it_was_cut_off(tiny, tmp_path: Path) -> None:
    keep = Checkpoint(tmp_path / "state.safetensors", seconds=0.0)

    def learn(progress=quiet, settings=SMALL) -> SavedMemory:
        return module.suppress(tiny, SPEC, settings, progress, Aids(checkpoint=keep))

    def cut(done: int, _: int) -> None:
        if done == SMALL.sample_steps + 2:
            raise KeyboardInterrupt

    whole = learn()
    with pytest.raises(KeyboardInterrupt):
        learn(cut)
    assert keep.path.exists()
    steps: list[int] = []
    rest = learn(lambda done, _: steps.append(done))
    assert SMALL.sample_steps + 1 not in steps and SMALL.sample_steps + 2 in steps, "two of its steps were done"
    assert torch.equal(rest.key, whole.key) and torch.equal(rest.value, whole.value) and not keep.path.exists()


def test_without_kept_words_everyday_words_are_held(tiny) -> None:
    made = module.suppress(tiny, replace(SPEC, keep=()), SMALL, quiet, Aids())
    assert made.header.spec == replace(SPEC, keep=(), everyday=True) and "kept: everyday words" in made.summary()


def test_the_canvas_draws_with_a_memory_as_training_saw_it() -> None:
    canvas = EmojiCanvas.load()
    port = EmojiCanvasPort(canvas)
    memory = saved(4, port.family.context_dim, length=77, placement=Placement.MIDOUT)
    z, t, text = torch.randn(2, 4, 16, 16), torch.tensor([30, 800]), canvas.encode(["a cat", ""])
    plain = canvas.unet(z, t, text)
    with port.trainable() as model:
        expected = model.reference(z, t, Cond(text))
        assert torch.allclose(expected, plain, atol=1e-5)
        with torch.no_grad():
            expected = model.predict(z, t, Cond(text), memory=memory.module())
            model.reads = memory.module()
            assert torch.equal(model.predict(z, t, Cond(text)), expected)
            assert torch.allclose(model.reference(z, t, Cond(text)), plain, atol=1e-5), "the reference reads none"
    with reading(canvas.unet, [(memory, 1.0)]):
        assert torch.allclose(canvas.unet(z, t, text), expected, atol=1e-5)
    with reading(canvas.unet, [(memory, 0.0)]):
        assert torch.equal(canvas.unet(z, t, text), plain)
    assert torch.equal(canvas.unet(z, t, text), plain)
    with reading(canvas.unet, [(memory, 0.25)]):
        quarter = canvas.unet(z, t, text)
    assert 0 < float((quarter - plain).norm()) < float((expected - plain).norm())
