"""Noise schedules, the eps / v / flow / x0 algebra, and the one convention for time.

Every latent is ``z = a x0 + s n`` with the signal scale a and the noise scale s of its time; every network predicts a
fixed combination ``p x0 + q n``. Two equations, two unknowns: each prediction gives every other one (METHODS 1.2).

=====  ============  ====  ====
space  definition    p     q
=====  ============  ====  ====
eps    n             0     1
x0     x0            1     0
v      a n - s x0    -s    a
flow   n - x0        -1    1
=====  ============  ====  ====

Time is *progress* through the trajectory: 0 = noise, 1 = clean. Network time t counts the other way, 0 = nearly clean.
The two conventions of the literature (METHODS 0) are converted by :func:`progress_of_steps_done` and
:func:`progress_of_steps_remaining`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

import torch
from torch import Tensor

from .devices import moved
from .port import Prediction


class Space(StrEnum):
    """What a prediction is expressed in. The networks' own three, and the clean latent."""

    EPS = "eps"
    X0 = "x0"
    V = "v"
    FLOW = "flow"


def space_of(prediction: Prediction) -> Space:
    """The space that a network of this kind predicts in."""
    return Space(prediction.value)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Scales of signal and noise at the network's discrete times 0..T-1, cleanest first, all [T] float64.

    ``times`` is what the network is given: the index itself, or sigma * 1000 for flow models.
    """

    signal: Tensor
    noise: Tensor
    times: Tensor

    def __post_init__(self) -> None:
        if not self.signal.ndim == 1 or not self.signal.shape == self.noise.shape == self.times.shape:
            raise ValueError("schedule: signal, noise and times must be three lists of one length")

    @classmethod
    def from_alphas_cumprod(cls, alphas_cumprod: Tensor) -> Schedule:
        """A variance-preserving schedule: a = sqrt(abar), s = sqrt(1 - abar)."""
        abar = alphas_cumprod.detach().double().cpu()
        return cls(abar.sqrt(), (1 - abar).sqrt(), torch.arange(len(abar), dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, steps: int = 1000, first: float = 0.00085, last: float = 0.012) -> Schedule:
        """Stable Diffusion's: betas linear in their square root."""
        betas = torch.linspace(first**0.5, last**0.5, steps, dtype=torch.float64) ** 2
        return cls.from_alphas_cumprod(torch.cumprod(1 - betas, 0))

    @classmethod
    def rectified_flow(cls, steps: int = 1000, shift: float = 1.0) -> Schedule:
        """x = (1 - sigma) x0 + sigma n, sigma = 1/T..1, shifted to shift sigma / (1 + (shift - 1) sigma) (SD3: 3)."""
        sigma = torch.arange(1, steps + 1, dtype=torch.float64) / steps
        sigma = shift * sigma / (1 + (shift - 1) * sigma)
        return cls(1 - sigma, sigma, 1000 * sigma)

    def __len__(self) -> int:
        return len(self.signal)

    def scales(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """(a, s) at indices t [B], shaped to multiply ``like`` [B, ...] in its type and on its device."""
        index = t.long().cpu()
        shape = (-1, *[1] * (like.ndim - 1))
        a, s = (moved(x[index], like.device, like.dtype).view(shape) for x in (self.signal, self.noise))
        return a, s

    def network_time(self, t: Tensor) -> Tensor:
        """What the network is given for indices t [B]: whole numbers stay whole."""
        return self.times.to(t.device, torch.float32)[t.long()] if self._sigma_timed else t

    @property
    def _sigma_timed(self) -> bool:
        return bool((self.times != torch.arange(len(self), dtype=torch.float64)).any())

    def add_noise(self, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """z_t = a x0 + s n for t [B]."""
        a, s = self.scales(t, x0)
        return a * x0 + s * noise

    def target(self, space: Space, x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What a perfect network predicts in ``space``: p x0 + q n. DUO's regression targets for eps, v and flow."""
        p, q = self._coefficients(space, t, x0)
        return p * x0 + q * noise

    def convert(self, prediction: Tensor, z: Tensor, t: Tensor, source: Space, to: Space) -> Tensor:
        """The same prediction in another space: solve {z = a x0 + s n, prediction = p x0 + q n}, then recombine.

        Undefined where the source says nothing: eps at a = 0, x0 at s = 0.
        """
        if source is to:
            return prediction
        x0, noise = self.split(prediction, z, t, source)
        p, q = self._coefficients(to, t, z)
        return p * x0 + q * noise

    def split(self, prediction: Tensor, z: Tensor, t: Tensor, source: Space) -> tuple[Tensor, Tensor]:
        """(x0, noise) that a prediction stands for."""
        a, s = self.scales(t, z)
        p, q = self._coefficients(source, t, z)
        determinant = a * q - s * p
        return (q * z - s * prediction) / determinant, (a * prediction - p * z) / determinant

    def _coefficients(self, space: Space, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        a, s = self.scales(t, like)
        zero, one = torch.zeros_like(a), torch.ones_like(a)
        match space:
            case Space.EPS:
                return zero, one
            case Space.X0:
                return one, zero
            case Space.V:
                return -s, a
            case Space.FLOW:
                return -one, one

    def time_at(self, progress: float) -> int:
        """The index that ``progress`` falls on: 0 -> T-1, 1 -> 0. Each index owns an equal share of [0, 1)."""
        if not 0 <= progress <= 1:
            raise ValueError(f"progress must lie between 0 (noise) and 1 (clean), got {progress}")
        return max(0, len(self) - 1 - math.floor(progress * len(self) + 1e-6))  # 0.29 * 100 is 28.999...

    def indices(self, places: Tensor) -> Tensor:
        """Indices of places in [0, 1), 1 the noisiest. A place next to 1 may have been rounded up to it."""
        return (places * len(self)).long().clamp(max=len(self) - 1)

    def progress_at(self, t: int) -> float:
        """Where the share of index ``t`` begins; ``time_at(progress_at(t)) == t``."""
        return (len(self) - 1 - t) / len(self)

    def trajectory(self, steps: int, until: float = 1.0) -> list[int | None]:
        """Indices that a sampler of ``steps`` equal steps visits up to ``until``; None is the clean end.

        The last step is shortened so that the latent lies exactly at ``time_at(until)``: the literature's code trains a
        latent of one time under a slightly different one.
        """
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        whole = math.floor(until * steps + 1e-6)
        stops: list[int | None] = [self.time_at(k / steps) for k in range(min(whole, steps - 1) + 1)]
        last = None if until >= 1 else self.time_at(until)
        return stops if stops[-1] == last else [*stops, last]

    def step(self, prediction: Tensor, z: Tensor, t: int, to: int | None, source: Space) -> Tensor:
        """One deterministic step from index ``t`` to index ``to`` (None = clean): z' = a' x0 + s' n.

        This is DDIM with eta = 0 for eps and v, and Euler's step z + (sigma' - sigma) v for flow; k-diffusion's Euler
        for eps is the same step in other units.
        """
        at = torch.full((z.shape[0],), t, dtype=torch.long)
        x0, noise = self.split(prediction, z, at, source)
        if to is None:
            return x0
        a, s = self.scales(torch.full_like(at, to), z)
        return a * x0 + s * noise


def spread(n: int, generator: torch.Generator) -> Tensor:
    """Places [n] in [0, 1), one at random in each n-th part, in order."""
    return (torch.arange(n) + torch.rand(n, generator=generator)) / n


def progress_of_steps_done(done: int, steps: int) -> float:
    """diffusers-derived code (ESD 2025, LECO, SPM, STEREO): ``done`` of ``steps`` were run from pure noise.

    ``time_at`` of it is that code's ``timesteps[int(done * 1000 / steps)]`` of the descending list 999..0.
    """
    return done / steps


def progress_of_steps_remaining(remaining: int, steps: int, within: float = 0.0) -> float:
    """CompVis-derived code (ESD 2023, EAP, AGE, Receler): the sampler stopped with ``remaining`` of ``steps`` to go.

    That code then trains at a time drawn from ``[remaining, remaining + 1) * 1000 / steps``; ``within`` in [0, 1) picks
    the place in that interval, 0 being its noisiest time.
    """
    return 1 - (remaining + 1 - within) / steps
