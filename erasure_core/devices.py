"""From the host to a device without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """``x`` on a device and in a type. The host does not wait for what the device still has to do."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()  # a copy from ordinary memory may wait
    return x.to(device, dtype, non_blocking=x.device.type == "cpu")
