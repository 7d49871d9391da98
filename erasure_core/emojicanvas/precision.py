"""Which arithmetic this CPU is fast in."""

from __future__ import annotations

import torch

FAST_BF16: bool = "AVX512" in torch.backends.cpu.get_cpu_capability()
"""Whether bfloat16 is faster than float32, some five times; where the CPU can't, emulating it is some 20 times slower."""


def autocast() -> torch.autocast:
    """bfloat16 where the CPU computes in it, else nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16)
