"""An Erasure on a clone of the user's model: stock LoRA patches, nothing of our own at sampling time."""

from __future__ import annotations

from comfy.weight_adapter.lora import LoRAAdapter

from ..erasure_core import Delta, Erasure
from ..erasure_core.names import to_comfy
from .port import ComfyPort


def apply_erasure(model, erasure: Erasure, strength: float):
    """A clone of ``model`` that carries ``erasure``; at strength 0 a clone without any patch.

    Raises:
        WrongModelError: the erasure was made for another family.
    """
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
    return patched


def _patch(delta: Delta):
    if delta.down is None:
        return ("diff", (delta.up,))
    return LoRAAdapter(set(), (delta.up, delta.down, None, None, None, None))
