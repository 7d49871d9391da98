"""The state file of a training: whose it is, what is in it, and what happens where it can't be written or read."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from erasure_core import ConceptSpec, FileError, Prediction, formats
from erasure_core.methods import Aids
from erasure_core.methods._training import TrainSettings, fingerprint, kept
from erasure_core.operators import train_loop
from erasure_core.operators.changes import Layers, LoRA
from erasure_core.operators.checkpoint import Checkpoint
from erasure_core.operators.cond import Cond
from erasure_core.operators.train_loop import Kind, Optimiser, Phase, Trainer
from erasure_core.operators.trainable import Weights
from erasure_core.schedule import Schedule

pytestmark = pytest.mark.core


@pytest.fixture
def keep(tmp_path: Path) -> Checkpoint:
    return Checkpoint(tmp_path / "state.safetensors", seconds=0.0)


def trainer(model, kind: Kind = Kind.ADAMW) -> Trainer:
    def loss(i: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
        return {"size": sum((p - torch.rand((), generator=generator)).square().mean() for p in parameters)}

    parameters = model.train(LoRA(Layers.CROSS, 2), 1)
    other = torch.ones(3, requires_grad=True)
    phases = [
        Phase("erase", parameters, loss, Optimiser(1e-2, kind, 0.1)),
        Phase("other", [other], lambda i, g: {"other": (other - i).square().sum()}, Optimiser(1e-2, kind)),
    ]
    return Trainer(model, phases, 6, seed=9, average=0.8)


@pytest.mark.parametrize("kind", list(Kind))
def test_the_state_is_complete(tiny, keep, kind: Kind) -> None:
    """Parameters, moments, step counts and the average of all phases, through the file."""
    with tiny.trainable() as model:
        whole = trainer(model, kind).run()
        expected = {name: x.clone() for name, x in whole.state_dict().items()}
    with tiny.trainable() as model:
        trainer(model, kind).run(until=4, checkpoint=keep)
    with tiny.trainable() as model:
        started = []
        rest = trainer(model, kind).run(lambda done, _: started.append(done), checkpoint=keep)
        assert started == [4, 5, 6] and not keep.path.exists()
        made = rest.state_dict()
    assert made.keys() == expected.keys() and all(torch.equal(made[k], x) for k, x in expected.items())
    assert any("average/" in k for k in made) and any("other/0" in k for k in made)


def test_it_is_saved_no_more_often_than_asked(tiny, keep, monkeypatch: pytest.MonkeyPatch) -> None:
    saved = []
    monkeypatch.setattr(Checkpoint, "save", lambda self, state: saved.append(int(state["done"])))
    with tiny.trainable() as model:
        trainer(model).run(checkpoint=Checkpoint(keep.path, seconds=3600))
        assert not saved
    with tiny.trainable() as model:
        trainer(model).run(checkpoint=keep)
        assert saved == [1, 2, 3, 4, 5, 6] and model.parameters(Weights.AVERAGE)


def test_a_state_is_of_one_training_only(keep) -> None:
    tensor = torch.arange(4.0)
    mine = keep.of("esd", {"seed": 1}, tensor)
    assert mine.key == keep.of("esd", {"seed": 1}, tensor.clone()).key
    others = [
        keep.of("esd", {"seed": 2}, tensor), keep.of("sdd", {"seed": 1}, tensor), keep.of("esd", {"seed": 1}, tensor + 1),
        keep.of("esd", {"seed": 1}, tensor.view(2, 2)), keep.of("esd", {"seed": 1}, tensor.double()),
        keep.of("esd", {"seed": 1}),
    ]  # fmt: skip
    assert len({x.key for x in (mine, *others)}) == len(others) + 1
    mine.save({"x": tensor})
    assert torch.equal(mine.load()["x"], tensor)
    for other in others:
        assert other.load() is None
        other.remove()
    assert keep.path.exists()
    mine.remove()
    assert not keep.path.exists() and mine.load() is None


def test_a_state_is_of_one_model_and_text_encoder_only(tiny, keep) -> None:
    """Whatever differs between two that the fingerprint takes for one; rounding in the text encoder does not matter."""
    spec, settings = ConceptSpec.parse("cat"), TrainSettings()

    def state_of(port) -> Checkpoint:
        with port.trainable() as model:
            made = kept(Aids(checkpoint=keep), port, model, spec, "esd", settings)
        assert made is not None
        return made

    def other(name: str) -> Any:
        port = type(tiny)()
        port.unet.get_submodule(name).weight.mul_(1.001)
        return port

    mine = state_of(tiny)
    mine.save({"x": torch.ones(1)})
    assert state_of(type(tiny)()).load() is not None
    attention = next(s.name for s in tiny.linears() if ".attn1." in s.name)
    for name in (attention, "out.2", "input_blocks.1.0.in_layers.0"):
        port = other(name)
        assert fingerprint(port) == fingerprint(tiny) and state_of(port).load() is None, name
    port = type(tiny)()
    port.schedule = Schedule.scaled_linear(last=0.013)
    assert state_of(port).load() is None
    port = type(tiny)()
    port.prediction = Prediction.V
    assert state_of(port).load() is None

    def reading(noise: float) -> Any:
        port = type(tiny)()
        exact, generator = port.conditions, torch.Generator().manual_seed(1)

        def conditions(prompts: Sequence[str]) -> list[Cond]:
            conds = exact(prompts)
            shift = [noise * torch.randn(c.context.shape, generator=generator) for c in conds]
            return [c.with_context(c.context + x * c.context.std()) for c, x in zip(conds, shift, strict=True)]

        port.conditions = conditions
        return port

    assert state_of(reading(1e-3)).load() is not None
    assert state_of(reading(0.1)).load() is None
    state_of(reading(0.1)).remove()
    assert keep.path.exists()


def test_a_state_may_be_larger_than_an_erasure(keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was saved is loaded again and deleted, whatever its size."""
    monkeypatch.setattr(formats, "MAX_FILE_BYTES", 100)
    keep.save({"x": torch.arange(100.0)})
    assert torch.equal(keep.load()["x"], torch.arange(100.0))
    keep.remove()
    assert not keep.path.exists()


def test_saving_takes_a_twentieth_of_the_time_at_most(tiny, keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only steps (1 s) and saves (2 s) move: after the first save come 40 s without one."""
    now, saved = [0.0], []
    monkeypatch.setattr(train_loop.time, "monotonic", lambda: now[0])

    def save(self: Checkpoint, state: dict[str, torch.Tensor]) -> None:
        now[0] += 2
        saved.append(int(state["done"]))

    monkeypatch.setattr(Checkpoint, "save", save)
    with tiny.trainable() as model:
        slow = trainer(model)
        slow.iterations = 60
        slow.phases[1].after = lambda: now.__setitem__(0, now[0] + 1)
        slow.run(checkpoint=Checkpoint(keep.path, seconds=10.0))
    assert saved == [10, 50]


def test_the_state_is_copied_to_main_memory_and_not_held(tiny, keep) -> None:
    """A device may have no room for it a second time. On the meta device copies would stay there."""
    with tiny.trainable() as model:
        one = trainer(model).run(until=1)
        one.phases[1].parameters = [torch.ones(3, device="meta")]
        with pytest.raises(NotImplementedError, match="meta"):  # it tries to bring what has no contents here
            one.state_dict()
    alive: list[weakref.ref[torch.Tensor]] = []
    load = Checkpoint.load

    def seen(self: Checkpoint) -> dict[str, torch.Tensor] | None:
        state = load(self)
        alive.extend(weakref.ref(x) for x in (state or {}).values())
        return state

    with tiny.trainable() as model:
        trainer(model).run(until=3, checkpoint=keep)
    with pytest.MonkeyPatch.context() as patch, tiny.trainable() as model:
        patch.setattr(Checkpoint, "load", seen)
        held: list[int] = []
        trainer(model).run(lambda *_: held.append(sum(x() is not None for x in alive)), checkpoint=keep)
    assert alive and not any(held)


def test_a_disk_that_refuses_and_a_file_that_is_none(keep, tmp_path: Path) -> None:
    with pytest.raises(FileError, match="could not be written"):
        Checkpoint(tmp_path / "nowhere" / "state.safetensors").save({"x": torch.ones(1)})
    keep.path.write_bytes(b"\x80\x02nonsense that is no state")
    assert keep.of("a").load() is None
    keep.of("a").remove()
    assert keep.path.exists(), "whatever it is, it is not ours"
    keep.of("a").save({"x": torch.ones(1)})
    assert keep.of("a").load() is not None


def test_a_disk_that_refuses_costs_no_training(tiny, keep, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes on, warns, and comes to the same end."""

    def full(self: Checkpoint, state: object) -> None:
        raise FileError("state: it could not be written (No space left on device)")

    with tiny.trainable() as model:
        expected = trainer(model).run().state_dict()
        expected = {name: x.clone() for name, x in expected.items()}
    monkeypatch.setattr(Checkpoint, "save", full)
    with tiny.trainable() as model, pytest.warns(UserWarning, match="was not kept: state: it could not be written"):
        made = trainer(model).run(checkpoint=keep).state_dict()
    assert all(torch.equal(made[name], x) for name, x in expected.items())
