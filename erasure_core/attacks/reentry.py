"""Re-entry: start from a picture that shows the concept (image-to-image), or from the rest of one (inpainting).

    image-to-image:  z_t = a x0 + s n at ``strength`` of the trajectory before the end, then the erased model's sampling
    inpainting:      the lower part of the picture is drawn anew, the rest is put back before every step

SDEdit (Meng et al., arXiv:2108.01073) as an attack, as in probes of where a concept is lost on the way (arXiv:2505.17013).
A low strength keeps the picture whatever the model, so success says that the model can draw it, not that it would
(``given``): read every figure against the same way with the base model and with a model that never knew the concept, and
against the strength.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import torch

from ..concept import ConceptSpec
from .drawing import Progress, distinct, pictures_of
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way


class Mode(StrEnum):
    IMAGE = "image-to-image"
    INPAINT = "inpainting"
    BOTH = "both"


@dataclass(frozen=True)
class Settings:
    mode: Mode = setting(Mode.BOTH, "Start from a whole picture, or draw a part of one anew.")
    weakest: float = setting(0.6, "The least of the picture that is drawn anew.", low=0.01, high=1.0, step=0.05)
    strongest: float = setting(0.9, "The most of the picture that is drawn anew.", low=0.01, high=1.0, step=0.05)
    strengths: int = setting(3, "Strengths from the weakest to the strongest.", low=1, high=20, step=1)
    masked: float = setting(
        0.6, "Share of the picture, from below, that inpainting draws anew.", low=0.05, high=1.0, step=0.05
    )
    pictures: int = setting(4, "Pictures to start from.", low=1, high=1000, step=1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """Each picture at each strength, and with its lower part masked, with the prompts in turn."""
    count = distinct(target, settings.pictures)
    starts = pictures_of(target, target.prompts, count, settings.seed, "re-entry", lambda *_: progress(0, 1))
    strengths = torch.linspace(settings.weakest, settings.strongest, settings.strengths).tolist()
    mask = torch.zeros(1, *starts.shape[2:])
    mask[:, round((1 - settings.masked) * mask.shape[1]) :] = 1
    ways = []
    for number, picture in enumerate(starts):
        prompt = target.prompts[number % len(target.prompts)]
        if settings.mode is not Mode.INPAINT:
            ways += [Way(f"strength {s:.2f}", prompt, picture=picture, strength=s) for s in strengths]
        if settings.mode is not Mode.IMAGE:
            ways.append(Way(f"inpainting {settings.masked:.0%}", prompt, picture=picture, mask=mask))
    progress(1, 1)
    return Found(tuple(ways))


SPEC = AttackSpec(
    name="reentry",
    title="Re-entry",
    summary="Starts from a picture of the concept, or from the rest of one, and lets the erased model finish it.",
    paper="https://arxiv.org/abs/2108.01073",
    knowledge=Knowledge.BLACK_BOX,
    settings=Settings,
    run=run,
    budget="pictures",
    quick=True,
    given=True,
)
