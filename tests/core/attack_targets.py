"""A small model under attack, and what tests of attacks share."""

from __future__ import annotations

import torch
from torch import Tensor

from erasure_core import ConceptSpec
from erasure_core.attacks import AttackTarget, Sampler

SPEC = ConceptSpec.parse("cat, kitty", "", "dog, tree")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def quiet(done: int, total: int) -> None:
    pass


def target_of(typing, dtype: torch.dtype = torch.float32, negative: str = "", **changes) -> AttackTarget:
    erased, base = typing.erased(dtype), typing(dtype)
    if negative:
        changes["negative"] = erased.conditions([negative])[0]
    values = {"prompts": ("a cat", "one kitty here"), "words": erased.words_of(), "sampler": Sampler(4, 2.0, 4)}
    return AttackTarget(erased, base, **{**values, **changes})
