"""Prefer: a paired preference loss with an output-preserving term (DUO, METHODS 2.2).

For a pair of an unsafe and a safe latent that share the noise n, with the empty prompt or each with its own:

    l_phi(x, t) = mean_chw (net_phi(x_t, t) - target(x, n, t))^2          phi = student, frozen
    d+ = l_student(safe) - l_frozen(safe),  d- = l_student(unsafe) - l_frozen(unsafe)
    L_pref  = - log sigmoid( - beta (d+ - d-) ) = softplus( beta (d+ - d-) )
    L_prior = mean (net_student(n, T) - net_frozen(n, T))^2
    L = L_pref + prior_weight L_prior

The factor T w(lambda_t) of Diffusion-DPO is folded into beta. At the last time T the latent is the pair's own Gaussian
noise, never a noised picture.

``prior_weight`` is large (5e6 at DUO's defaults) because the two predictions of the prior hardly differ. bfloat16 rounds them
to some three digits: that alone makes a prior of about 50, where a training has 0.01, and a gradient that is noise. So
where the prior weighs much, the model must compute in full precision, see :meth:`TrainableModel.precise`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .cond import Cond
from .trainable import TrainableModel

ROUNDED = 1e-5
"""About what bfloat16 makes of a prior that is 0."""


@dataclass(frozen=True)
class PairErrors:
    """Squared errors of each member [B]: of the student with gradient, of the frozen network without."""

    safe: Tensor
    unsafe: Tensor
    frozen_safe: Tensor
    frozen_unsafe: Tensor

    @property
    def margin(self) -> Tensor:
        """d+ - d-, [B]: below zero where the student has come to prefer the safe member."""
        return (self.safe - self.frozen_safe) - (self.unsafe - self.frozen_unsafe)


def preference_loss(errors: PairErrors, beta: float) -> Tensor:
    """softplus(beta (d+ - d-)), mean over pairs: the stable form of -log sigmoid(-beta (d+ - d-))."""
    return F.softplus(beta * errors.margin).mean()


def draw_times(n: int, generator: torch.Generator, *, shared: bool, below: int = 750) -> tuple[Tensor, Tensor]:
    """(unsafe, safe) times in [0, below), [n] each; ``shared`` as Diffusion-DPO has it, else drawn apart as DUO's code."""
    unsafe = torch.randint(0, below, (n,), generator=generator)
    return unsafe, unsafe if shared else torch.randint(0, below, (n,), generator=generator)


def scaled_by_beta(base_lr: float, base_prior_weight: float, beta: float) -> tuple[float, float]:
    """The authors' rule (learning rate, prior weight): lr = base 100 / beta, weight = base beta / 100."""
    return base_lr * 100 / beta, base_prior_weight * beta / 100


def preference_losses(
    model: TrainableModel,
    unsafe: Tensor,
    safe: Tensor,
    noise: Tensor,
    times: tuple[Tensor, Tensor],
    read: tuple[Cond, Cond, Cond],
    *,
    beta: float,
    prior_weight: float,
) -> dict[str, Tensor]:
    """The weighted losses ``preference`` and ``prior`` of a batch of pairs, in one student and one frozen pass.

    Args:
        unsafe, safe, noise: [B, C, h, w], clean latents and their common noise.
        times: schedule indices of the unsafe and the safe members, [B] each.
        read: what is read with the unsafe members, the safe ones, and the noise: batches of one or B.
    """
    n, schedule = noise.shape[0], model.schedule
    t_unsafe, t_safe = times
    last = torch.full((n,), len(schedule) - 1, dtype=torch.long)
    noisy = [schedule.add_noise(unsafe, noise, t_unsafe), schedule.add_noise(safe, noise, t_safe)]
    targets = torch.cat([schedule.target(model.space, x, noise, t) for x, t in ((unsafe, t_unsafe), (safe, t_safe))])
    z, t = torch.cat([*noisy, noise]), torch.cat([t_unsafe, t_safe, last])
    cond = Cond.cat([c.expand(n) for c in read])
    student, frozen = model.predict(z, t, cond), model.reference(z, t, cond)

    def errors(prediction: Tensor) -> tuple[Tensor, ...]:
        return (prediction[: 2 * n] - targets).square().flatten(1).mean(1).split(n)

    (bad, good), (bad0, good0) = errors(student), errors(frozen)
    preference = preference_loss(PairErrors(good, bad, good0, bad0), beta)
    return {"preference": preference, "prior": prior_weight * F.mse_loss(student[2 * n :], frozen[2 * n :])}
