"""Which arithmetic this CPU is fast in."""

from __future__ import annotations

from collections.abc import Mapping

import torch


def _multiplies_bf16() -> bool:
    """Whether the CPU has instructions that multiply bfloat16 (AVX512-BF16, AMX, ARM's). AVX-512 alone is not enough."""
    capabilities: Mapping[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # older torch can't say
    return any(has and name.endswith("bf16") for name, has in capabilities.items())


FAST_BF16: bool = _multiplies_bf16()
"""Whether bfloat16 is faster than float32, some five times; a CPU that must emulate it is 3 to 20 times slower in it."""


def autocast() -> torch.autocast:
    """bfloat16 where the CPU computes in it, else nothing."""
    return torch.autocast("cpu", torch.bfloat16, enabled=FAST_BF16)
