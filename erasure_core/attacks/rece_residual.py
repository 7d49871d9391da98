"""RECE residual (Gong et al., ECCV 2024, arXiv:2407.12383; METHODS 2.4): the eraser's own derivation as an attack.

The text states that come closest to sending the concept through the erased keys and values as the base model would:

    C' = C [(lambda I + A)^-1 M]^T,   A = sum_i W_i^T W_i,  M = sum_i W_i^T W_i^o

in closed form, seconds. It sees the text keys and values only: an eraser that leaves them alone gives C' = C (for
lambda -> 0), so the attack is then plain asking, and finding nothing means nothing.

Departures: float64 and Cholesky (the authors' float32 inverse of a near-singular matrix loses digits); lambda is relative to
trace(A)/D; the row of the start of text, which every prompt shares, is left as it is.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..concept import ConceptSpec
from ..operators.residual import Residual
from ..port import TokenKind
from .drawing import Progress
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way


@dataclass(frozen=True)
class Settings:
    damping: float = setting(
        1e-3, "Shrinks the derived states (lambda); the smallest that gives pictures is the strongest.",
        low=1e-12, high=100.0, step=1e-3,
    )  # fmt: skip
    variants: int = setting(
        3, "How many dampings are tried, each a hundredth of the one before.", low=1, high=6, step=1
    )


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """The residual of each prompt's states, for each damping."""
    sites = len(target.base.sites())
    residual = Residual(target.base, target.erased, lambda done, _: progress(done, sites))
    ways, misfits = [], []
    for text in target.base.text(target.prompts):
        moved = (text.kinds != TokenKind.BOS).cpu()
        states = text.states.detach().cpu()
        for number in range(settings.variants):
            damping = settings.damping / 100**number
            derived = residual.rows(states[moved], damping)
            misfits.append(float(residual.misfit(states[moved], derived).mean()))
            label = f"residual of {text.prompt!r}, damping {damping:g}"
            ways.append(Way(label, states=_put(states, moved, derived), attacks=(text.prompt,)))
    progress(sites, sites)
    return Found(tuple(ways), tuple(misfits))


def _put(states: Tensor, where: Tensor, rows: Tensor) -> Tensor:
    made = states.clone()
    made[where] = rows.to(made)
    return made


SPEC = AttackSpec(
    name="rece_residual",
    title="RECE Residual",
    summary="Computes the text states that still bring the concept through the edited keys and values. Seconds, no search.",
    paper="https://arxiv.org/abs/2407.12383",
    knowledge=Knowledge.WHITE_BOX,
    settings=Settings,
    run=run,
    budget="variants",
    quick=True,
)
