"""An Erasure on a clone of the user's model: stock LoRA patches, nothing of our own at sampling time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from comfy.weight_adapter.lora import LoRAAdapter

from ..erasure_core import Delta, Erasure
from ..erasure_core.artifact import Header
from ..erasure_core.concept import Concept
from ..erasure_core.names import to_comfy
from .port import ComfyPort

_GATED = "erasure_gated_for"
_CARRIED = "erasures_carried"
"""Headers of the erasures that a MODEL carries already."""
MEMORY = "erasure_prompt_memory"
"""Key of the wrappers that prompt memories put on a MODEL."""


def apply_erasure(model, erasure: Erasure, strength: float):
    """A clone of ``model`` that carries ``erasure``; at strength 0 a clone without any patch.

    Raises:
        WrongModelError: the erasure was made for another family.
        ValueError: the model carries it already.
    """
    check_without(model, [erasure])
    erasure.check_fits(list(ComfyPort(model).linears()))
    patched = model.clone()
    if strength == 0:
        return patched
    patches = {to_comfy(name) + ".weight": _patch(delta) for name, delta in erasure.deltas.items() if delta.rank}
    refused = set(patches) - set(patched.add_patches(patches, strength))
    if refused:
        raise ValueError(
            f"model: {len(refused)} weights refused the erasure, first {min(refused)}. Is another node replacing them?"
        )
    patched.set_attachments(_CARRIED, (*carried(model), _at_one(erasure)))
    return patched


def check_without(model, erasures: Iterable[Erasure]) -> None:
    """Raise where ``model`` carries one of them already: it would be applied twice, and strength 0 would not undo it."""
    gate = gate_of(model)
    behind = () if gate is None else tuple(_at_one(e) for e in gate.erasures)
    for erasure in erasures:
        if _at_one(erasure) in (*carried(model), *behind):
            names = ", ".join(c.name for c in erasure.header.spec.erase)[:60]
            raise ValueError(
                f"model: it carries this erasure of {names} already. Connect the model from before it, for example that of the "
                "checkpoint loader; for a firmer effect raise strength"
            )


def carried(model) -> tuple[Header, ...]:
    """Of the erasures that Apply Erasure and its like have put on ``model``; what other nodes load is not known."""
    return model.get_attachment(_CARRIED) or ()


def _at_one(erasure: Erasure) -> Header:
    """Its header at strength 1: at any strength it is the same erasure."""
    return replace(erasure.header, strength=1.0)


@dataclass(frozen=True)
class Gated:
    """What Gate Erasures has put on a MODEL: the erasures, as far as each of them is open to one prompt."""

    prompt: str
    erasures: tuple[Erasure, ...]
    strengths: tuple[float, ...]

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """What they suppress."""
        return tuple(concept for erasure in self.erasures for concept in erasure.header.spec.erase)


def gated_for(model, how: Gated):
    """``model``, a clone of ours, marked as patched for one prompt; what is made of it carries the mark on, beside an earlier
    one."""
    if (before := gate_of(model)) is not None:
        how = Gated(how.prompt, before.erasures + how.erasures, before.strengths + how.strengths)
    model.set_attachments(_GATED, how)
    return model


def gate_of(model) -> Gated | None:
    """How Gate Erasures patched a MODEL; None where it didn't."""
    return model.get_attachment(_GATED)


def check_unmerged(model) -> None:
    """Raise where another node scaled what Gate Erasures had put on: how far gates stand open is not known then."""
    if gate_of(model) is not None and any(patch[2] != 1 for some in model.patches.values() for patch in some):
        raise ValueError(
            "model: it was merged with another one behind Gate Erasures, so how far its gates stand open is not known. Merge "
            "first, and gate what comes out"
        )


def check_ungated(**models) -> None:
    """Raise where one of these MODELs, by input, is patched for one prompt: it will be asked others here, which would be
    answered with the gate as that prompt left it."""
    for what, model in models.items():
        how = None if model is None else gate_of(model)
        if how is not None:
            raise ValueError(
                f"{what}: Gate Erasures patched it for the prompt {how.prompt[:60]!r} alone, and other prompts are asked here. "
                "Put the erasures on with Apply Erasure instead: that is the gate wide open"
            )


_HARMLESS = {
    "transformer_options",
    "disable_cfg1_optimization",
    "torch_compile_kwargs",
    "model_sampling",
    "manual_cast_dtype",
}
"""Of options and replaced objects of a MODEL: what is looked into, goes with another, or changes speed and precision only."""
_KNOWN = {MEMORY, "torch.compile"}
"""Keys of wrappers that are ours, or change speed only."""


def unheard(model) -> tuple[str, ...]:
    """What other nodes do to ``model`` while it samples, as ComfyUI calls it: guidance of their own, changed attention and the
    like. Training and attacks, which ask a copy of the network, don't have it. Weights, noise schedules and prompt memories
    they do have."""
    inside = model.model_options.get("transformer_options", {})
    found = [name for name in model.model_options if name not in _HARMLESS]
    found += [
        name for name, some in inside.get("patches", {}).items() if not all(hasattr(patch, "uses") for patch in some)
    ]
    found += [f"{name} replaced" for name, some in inside.get("patches_replace", {}).items() if some]
    found += [name for name in ("optimized_attention_override",) if name in inside]
    for wrappers in (model.wrappers, inside.get("wrappers", {})):
        found += [f"{name} wrapped" for name, keyed in wrappers.items() if any(keyed[k] for k in set(keyed) - _KNOWN)]
    found += [f"{name} injected" for name in model.injections]
    found += [f"{name} replaced" for name in model.object_patches if name not in _HARMLESS]
    return tuple(dict.fromkeys(found))


def note_unheard(**models) -> str:
    """A line for reports, with the line break before it, where one of these MODELs, by input, does more than is asked here."""
    did = [
        f"{what} ({', '.join(names)})"
        for what, model in models.items()
        if model is not None and (names := unheard(model))
    ]
    if not did:
        return ""
    return (
        f"\nnote: other nodes change how {' and '.join(did)} samples. That was not in force here: this was done on the network "
        "without it"
    )


def _patch(delta: Delta):
    if delta.down is None:
        return ("diff", (delta.up,))
    return LoRAAdapter(set(), (delta.up, delta.down, None, None, None, None))
