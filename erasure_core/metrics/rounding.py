"""What is left of a weight change when the changed weights are stored in fewer bits.

Rounding can be coarser than the change. arXiv:2410.16454 found that it brings unlearned knowledge of language models back;
for one diffusion model the change came through on average although each weight's error was several times larger. So it is
measured, not assumed. Only plain types are here, no method that adjusts weights to pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

Rounding = Callable[[Tensor], Tensor]
"""A weight in float32 -> the same as it is read back, float32."""


def _cast(dtype: torch.dtype) -> Rounding:
    def rounded(weight: Tensor) -> Tensor:
        most = torch.finfo(dtype).max  # larger ones would become infinite, or NaN in fp8
        return weight.float().clamp(-most, most).to(dtype).float()

    return rounded


def int8(weight: Tensor) -> Tensor:
    """Whole numbers from -127 to 127 times one scale for the matrix, its largest magnitude over 127."""
    scale = weight.float().abs().max() / 127
    if not scale > 0:
        return weight.float().clone()
    return (weight.float() / scale).round().clamp(-127, 127) * scale


ROUNDINGS: dict[str, Rounding] = {
    "fp16": _cast(torch.float16),
    "bf16": _cast(torch.bfloat16),
    "fp8_e4m3": _cast(torch.float8_e4m3fn),
    "int8": int8,
}


@dataclass(frozen=True)
class RoundingLoss:
    """Over all matrices X = W + dW that an erasure changes, Q being the rounding."""

    worst: float
    """The largest error of a weight, max |Q(X) - X|, as a share of its matrix's largest weight."""
    noise: float
    """||Q(X) - X|| / ||dW||: above 1 the rounding moves the weights more than the erasure did."""
    left: float
    """<Q(W + dW) - Q(W), dW> / ||dW||^2: the share of the change that comes through; 1 is all of it."""


def rounding_loss(weights: Iterable[tuple[Tensor, Tensor]], rounding: Rounding) -> RoundingLoss:
    """Of pairs (W, dW), both [d_out, d_in] float32, one at a time in memory.

    Raises:
        ValueError: nothing is changed.
    """
    worst, error, size, through = 0.0, 0.0, 0.0, 0.0
    for weight, change in weights:
        exact = weight.float() + change.float()
        off = rounding(exact).double() - exact.double()
        moved = (rounding(exact).double() - rounding(weight).double()) * change.double()
        worst = max(worst, float(off.abs().max() / exact.abs().max().clamp_min(1e-30)))
        error += float(off.square().sum())
        size += float(change.double().square().sum())
        through += float(moved.sum())
    if not size:
        raise ValueError("erasure: it changes no weight, so nothing of it can get lost")
    return RoundingLoss(worst, (error / size) ** 0.5, through / size)
