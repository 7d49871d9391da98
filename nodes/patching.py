"""An Erasure on a clone of the user's model: stock LoRA patches, nothing of our own at sampling time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from comfy.weight_adapter.lora import LoRAAdapter

from ..erasure_core import Delta, Erasure
from ..erasure_core.artifact import Header
from ..erasure_core.names import to_comfy
from .port import ComfyPort

_GATED = "erasure_gated_for"
_CARRIED = "erasures_carried"
"""Headers of the erasures that a MODEL carries already."""


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
    for erasure in erasures:
        if _at_one(erasure) in carried(model):
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


def gated_for(model, prompt: str):
    """``model``, a clone of ours, marked as patched for one prompt; what is made of it carries the mark on."""
    model.set_attachments(_GATED, prompt)
    return model


def check_ungated(**models) -> None:
    """Raise where one of these MODELs, by input, is patched for one prompt: it will be asked others here, which would be
    answered with the gate as that prompt left it."""
    for what, model in models.items():
        prompt = None if model is None else model.get_attachment(_GATED)
        if prompt is not None:
            raise ValueError(
                f"{what}: Gate Erasures patched it for the prompt {prompt[:60]!r} alone, and other prompts are asked here. Put "
                "the erasures on with Apply Erasure instead: that is the gate wide open"
            )


def _patch(delta: Delta):
    if delta.down is None:
        return ("diff", (delta.up,))
    return LoRAAdapter(set(), (delta.up, delta.down, None, None, None, None))
