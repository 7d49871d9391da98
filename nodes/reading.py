"""Prompt memories on a clone of the user's model: one attention patch that appends the rows of all of them.

One patch, not one each: how often the text was repeated (ComfyUI's way to make prompts equally long) shows only in the
context before any rows are behind it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.patcher_extension
import torch
from torch import Tensor, nn

from ..erasure_core.operators.memory import PromptMemory, SavedMemory, extended, quarters_of
from .patching import MEMORY
from .port import family_of

_BLOCKS = {"input": "input_blocks.", "middle": "middle_block.", "output": "output_blocks."}


@dataclass(frozen=True)
class Use:
    """A memory as one node applies it; ``quarters`` / 4 is its strength."""

    memory: SavedMemory
    quarters: int
    conditional_only: bool


def apply_memory(model, memory: SavedMemory, strength: float, *, conditional_only: bool = False):
    """A clone of ``model`` whose cross-attention reads ``memory`` too; at strength 0 a clone without any patch.

    Raises:
        WrongModelError: it was learned on another family.
        ValueError: a strength that is no whole quarter.
    """
    memory.check_fits(family_of(model))
    quarters = quarters_of(strength)
    patched = model.clone()
    if quarters == 0:
        return patched
    # A clone has its own copy of the options; lists in it are replaced, not changed.
    patches = patched.model_options["transformer_options"].setdefault("patches", {})
    before = patches.get("attn2_patch", [])
    uses = (*uses_of(model), Use(memory, quarters, conditional_only))
    patches["attn2_patch"] = [*(p for p in before if not hasattr(p, "uses")), _patch(uses)]
    wrapper = comfy.patcher_extension.WrappersMP.CALC_COND_BATCH
    if conditional_only and not patched.get_wrappers(wrapper, MEMORY):
        patched.add_wrapper_with_key(wrapper, MEMORY, _conditional_alone)
    return patched


def uses_of(model) -> tuple[Use, ...]:
    """The memories that a MODEL reads, in the order in which they were applied."""
    patches = model.model_options["transformer_options"].get("patches", {}).get("attn2_patch", [])
    return tuple(use for p in patches for use in getattr(p, "uses", ()))


def memory_digest(model) -> str:
    """SHA-256 of the memories that a MODEL reads and of how it reads them, in hex; "" where it reads none."""
    seen, uses = hashlib.sha256(), uses_of(model)
    for use in uses:
        m = use.memory
        seen.update(f"{m.placement} {m.length} {use.quarters} {use.conditional_only} {tuple(m.key.shape)}\n".encode())
        for rows in (m.key, m.value):
            seen.update(rows.contiguous().numpy().astype("<f4", copy=False).data)
    return seen.hexdigest() if uses else ""


class _Together(PromptMemory):
    """Several applied memories, at their strengths, as a network outside of ComfyUI's sampling reads them."""

    def __init__(self, uses: tuple[Use, ...]) -> None:
        nn.Module.__init__(self)  # no rows of its own
        self._uses = uses
        self._rows: dict[Any, list[tuple[Tensor, Tensor]]] = {}
        """Keys and values of each, by device and type: a copy at every site would make the host wait."""

    def extend(self, site: str, context: Tensor) -> Tensor:
        where = context.device, context.dtype
        if where not in self._rows:
            self._rows[where] = [(u.memory.key.to(*where), u.memory.value.to(*where)) for u in self._uses]
        part = 0 if site.endswith("to_k") else 1
        read = zip(self._rows[where], self._uses, strict=True)
        return extended(
            context, [(r[part], u.memory.length, u.quarters) for r, u in read if u.memory.placement.covers(site)]
        )


def memory_of(model) -> PromptMemory | None:
    """What a MODEL reads beside every prompt, for :class:`AttackTarget`; None where no memory is applied.

    Raises:
        ValueError: one is read beside the prompt only.
    """
    uses = uses_of(model)
    if any(use.conditional_only for use in uses):
        raise ValueError(
            "model: a prompt memory on it is read beside the prompt only, which attacks can't imitate. Set read_by to 'both' "
            "in Apply Safe Prompt Memory"
        )
    return _Together(uses) if uses else None


def _patch(uses: tuple[Use, ...]) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """A plain function: ComfyUI copies callable objects, and their tensors, with every clone."""
    cached: dict[Any, list[tuple[Tensor, Tensor]]] = {}
    last: dict[tuple[bool, ...], tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def patch(n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        """n [B, L, C], context and value [B, T, D] -> the same with the rows behind T."""
        block = _BLOCKS.get((extra.get("block") or ("",))[0], "")
        covered = tuple(
            use.memory.placement.covers(block) and (not use.conditional_only or _conditional(extra)) for use in uses
        )
        made = last.get(covered)
        if made is None or made[0] is not context or made[1] is not value:  # all blocks of a pass read the same tensor
            where = context.device, context.dtype
            if where not in cached:
                with torch.inference_mode(False):
                    cached[where] = [(u.memory.key.to(*where), u.memory.value.to(*where)) for u in uses]
            read = [
                (rows, use.memory.length, use.quarters)
                for rows, use, reads in zip(cached[where], uses, covered, strict=True)
                if reads
            ]
            keys, values = (extended(x, [(r[i], *how) for r, *how in read]) for i, x in enumerate((context, value)))
            made = last[covered] = context, value, keys, values
        return n, made[2], made[3]

    patch.uses = uses  # type: ignore[attr-defined]
    return patch


def _conditional(extra: dict) -> bool:
    """Whether this pass is that of the prompt (index 0) alone."""
    rows = set(extra["cond_or_uncond"])
    if 0 in rows and len(rows) > 1:
        raise ValueError(
            "memory: another node computes prompt and negative prompt in one pass, so 'prompt only' can't work. Choose 'both'"
        )
    return rows == {0}


def _conditional_alone(executor, model, conds, x, sigma, options):
    """The prompt in one pass, everything else in another: rows can't be left out for a part of a batch."""
    if all(c is None for c in conds[1:]) or conds[0] is None:
        return executor(model, conds, x, sigma, options)
    first = executor(model, [conds[0], *(None for _ in conds[1:])], x, sigma, options)
    rest = executor(model, [None, *conds[1:]], x, sigma, options)
    return [first[0], *rest[1:]]
