"""From the host to a device without making the host wait; what a device rounds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` on a device and in a type. The host does not wait for what the device still has to do."""
    if device.type == "mps":  # there a copy that nobody waits for may read memory that is given back meanwhile
        return x.to(dtype or x.dtype).to(device)  # its type first: it has no float64
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # a copy from ordinary memory may wait
    return x.to(device, dtype, non_blocking=x.device.type == "cpu")


def has_float64(device: torch.device) -> bool:
    """Apple's, Intel's consumer and DirectML's devices compute in nothing wider than float32."""
    return device.type not in ("mps", "xpu", "privateuseone")


@contextmanager
def unrounded() -> Iterator[None]:
    """Float32 as it is: cuDNN rounds what convolutions read to ten bits behind the point unless told otherwise."""
    try:
        was = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set through PyTorch's newer switches, which these don't go with: whoever did that has chosen
        yield
        return
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = was
