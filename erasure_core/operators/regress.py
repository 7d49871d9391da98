"""Regress: fit the student's prediction to a linear combination of frozen predictions (METHODS 1.2).

    L = weight mean( || S(eps_student(z, t, c)) - sum_j w_j sg S(eps_reference(z, t, c_j)) ||^2 )

with S the change of space at (z, t). Every fine-tuning eraser is a list of such terms.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..schedule import Space
from .cond import Cond
from .trainable import TrainableModel, Weights

Combination = Mapping[str, float]
"""Weight of each prompt's prediction, by the prompt's key."""


def shifted(base: str, by: float, towards: str, away: str) -> Combination:
    """``base + by (towards - away)``, keys that are the same prompt added up. ``by`` < 0 is negative guidance."""
    combined: dict[str, float] = {}
    for key, weight in ((base, 1.0), (towards, by), (away, -by)):
        combined[key] = combined.get(key, 0.0) + weight
    return {key: weight for key, weight in combined.items() if weight}


@dataclass(frozen=True)
class TargetTerm:
    """What the student should predict for the prompt ``reads``. Keys name prompts of the step."""

    name: str
    reads: str
    combination: Combination
    weight: float = 1.0
    space: Space | None = None
    """None: the network's own."""
    reference: Weights = Weights.FROZEN
    """Whose predictions are combined; never with gradient."""


def keep_term(reads: str, weight: float = 1.0, *, name: str = "keep", space: Space | None = None) -> TargetTerm:
    """The student's prediction for ``reads`` stays the original network's."""
    return TargetTerm(name, reads, {reads: 1.0}, weight, space)


def combine(predictions: Mapping[str, Tensor], combination: Combination) -> Tensor:
    """sum_j w_j prediction_j."""
    parts = [weight * predictions[key] for key, weight in combination.items()]
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total


def predictions_of(
    model: TrainableModel, z: Tensor, t: Tensor, conds: Mapping[str, Cond], keys: Iterable[str], weights: Weights, *, grad: bool
) -> dict[str, Tensor]:  # fmt: skip
    """The predictions for several prompts at the same (z, t), in one pass of the network."""
    unique = list(dict.fromkeys(keys))
    if not unique:
        return {}
    n = z.shape[0]
    cond = Cond.cat([conds[key].to(z).expand(n) for key in unique])
    call = model.predict if grad else model.reference
    out = call(z.repeat(len(unique), 1, 1, 1), t.repeat(len(unique)), cond, weights)
    return dict(zip(unique, out.split(n), strict=True))


def regress(
    model: TrainableModel, terms: Iterable[TargetTerm], z: Tensor, t: Tensor, conds: Mapping[str, Cond]
) -> dict[str, Tensor]:
    """The weighted loss of each term at (z, t), by name; terms of one name are added up.

    One student pass over all prompts that are read, and one pass for each set of reference weights.
    """
    terms = list(terms)
    students = predictions_of(model, z, t, conds, [x.reads for x in terms], Weights.STUDENT, grad=True)
    references = {
        weights: predictions_of(
            model, z, t, conds, [k for x in terms if x.reference is weights for k in x.combination], weights, grad=False
        )
        for weights in dict.fromkeys(x.reference for x in terms)
    }
    losses: dict[str, Tensor] = {}
    for term in terms:
        student, space = students[term.reads], term.space or model.space
        parts = {k: references[term.reference][k] for k in term.combination}
        if space is not model.space:  # each alone: a combination that doesn't sum to one isn't a prediction
            student = model.schedule.convert(student, z, t, model.space, space)
            parts = {k: model.schedule.convert(x, z, t, model.space, space) for k, x in parts.items()}
        target = combine(parts, term.combination)
        loss = term.weight * F.mse_loss(student, target)
        losses[term.name] = losses[term.name] + loss if term.name in losses else loss
    return losses
