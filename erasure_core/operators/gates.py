"""A change that acts on each row of a batch as far as the row's prompt opens its gate (gating.py), beside a layer's weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..artifact import Delta

GATES = "gates"
"""Name of the extra of a conditioning, [B, n], that says how far each of n gated changes acts on each row."""


def added(delta: Delta, strength: Callable[[], Tensor]) -> Callable[[nn.Module, Any, Tensor], Tensor]:
    """A forward hook: ``W x + m U D x`` with m [B] of the pass that is made."""

    def hook(_module: nn.Module, args: Any, out: Tensor) -> Tensor:
        (x, *_), m = args, strength()
        inner = x if delta.down is None else F.linear(x, delta.down.to(x))
        return out + m.view(-1, *(1 for _ in out.shape[1:])).to(out) * F.linear(inner, delta.up.to(x))

    return hook
