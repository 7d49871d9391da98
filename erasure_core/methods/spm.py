"""SPM, one-dimensional adapters with latent anchoring and a gate (Lyu et al., CVPR 2024, arXiv:2312.16145; METHODS 2.8).

    || eps_theta(z, c) - ( eps_0(neutral) - eta (eps_0(c) - eps_0(neutral)) ) ||^2
      + lambda mean_a || eps_theta(z, a) - eps_0(z, a) ||^2,            eta = 1, lambda = 1000, 4 anchors a step

Anchors are Gaussian conditionings of the prompt's shape and about its norm, the likelier the less they point its way. LoRA of
rank 1, alpha 1, AdamW 1e-4, cosine with 3 restarts and 500 steps of warm-up, 3000 steps, z sampled with the adapter on.

Facilitated transport: at inference each adapter counts as much as its prompt resembles the concept, ``W + m up down``
(gating.py).

Departures: the gate m is one scalar on the product (the authors scale both factors, which gives m^2, and mix the factors of
several adapters); every anchor is evaluated (about half of theirs are the empty prompt in fact); linear layers only (theirs
include SD 1.x's 1x1 convolutions proj_in/out); AdamW in full precision; kept words are held at the same latents.

The authors take the similarity in the gate between the flattened states of the prompt and of the concept. BOS, the same and by
far the longest row in every prompt, and what else prompts share hold that near 1, so that no gate ever closes. Here it is
between what both mean beside everyday words (``concept.meanings``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..devices import moved
from ..operators.changes import Layers, LoRA
from ..operators.cond import Cond
from ..operators.regress import TargetTerm, shifted
from ..operators.train_loop import Kind, cosine
from ..operators.trainable import TrainableModel, TrainablePort, Weights
from ._training import AWAY, ERASE, RANK, RATE, STEPS, TO, TrainSettings, steps_of, train_regression
from .registry import Aids, MethodSpec, Progress, setting


@dataclass(frozen=True)
class Settings(TrainSettings):
    iterations: int = setting(3000, STEPS, low=1, high=100000, step=10)
    learning_rate: float = setting(1e-4, RATE, low=1e-8, high=1.0, step=1e-5)
    layers: Layers = setting(Layers.ALL, "Which layers are changed.")
    rank: int = setting(1, f"{RANK} One for each concept.", low=1, high=512, step=1)
    sample_steps: int = setting(30, "Sampler steps of the pictures that training looks at.", low=2, high=1000, step=1)
    negative_guidance: float = setting(1.0, AWAY, low=0.0, high=20.0, step=0.5)
    anchors: int = setting(4, "Random prompts that are held, per step.", low=0, high=64, step=1)
    anchor_weight: float = setting(
        1000.0,
        "How hard the random prompts are held. Lower: the concept goes sooner, other pictures drift.",
        low=0.0,
        high=1e6,
        step=100.0,
    )
    warmup: int = setting(500, "Steps in which the learning rate rises.", low=0, high=100000, step=10)


def target(eta: float) -> TargetTerm:
    """The erasing term."""
    return TargetTerm("erase", ERASE, shifted(TO, -eta, ERASE, TO))


def sample_anchors(concept: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """[n, L, D]: unit Gaussian directions, kept with probability 1 - cos(concept, direction), times U(0.8, 1.2) ||concept||.

    concept [1, L, D]; norms and cosine are over all entries.
    """
    flat = concept.detach().flatten()
    many = 3 * n + 16  # so many more that enough are kept, without asking the device how many those are
    drawn = torch.randn(many, flat.numel(), generator=generator), *torch.rand(2, many, generator=generator)
    directions, chances, sizes = (moved(x, flat.device, flat.dtype) for x in drawn)
    directions = F.normalize(directions, dim=1)
    refused = chances > 1 - F.cosine_similarity(flat, directions, dim=1)
    kept = refused.int().argsort(stable=True)[:n]
    return ((0.8 + 0.4 * sizes[kept, None]) * flat.norm() * directions[kept]).view(n, *concept.shape[1:])


def anchoring_loss(model: TrainableModel, z: Tensor, t: Tensor, anchors: Tensor, like: Cond) -> Tensor:
    """mean_a || eps_theta(z, a) - eps_0(z, a) ||^2 for every latent with every anchor [n, L, D]."""
    latents, n = z.shape[0], len(anchors)
    one = Cond(like.context[:1], {k: v[:1] for k, v in like.extra.items()}).expand(n * latents)
    cond = one.with_context(anchors.repeat_interleave(latents, dim=0))
    many, times = z.repeat(n, 1, 1, 1), t.repeat(n)
    return F.mse_loss(model.predict(many, times, cond), model.reference(many, times, cond, Weights.FROZEN))


def gate(
    prompt: Tensor, concept: Tensor, prompt_tokens: Collection[object], concept_tokens: Collection[object]
) -> float:
    """m = max( cos(prompt, concept), |tokens shared| / |tokens of the concept| ), within [0, 1].

    Args:
        prompt, concept: of one shape: a row of ``concept.meanings`` each, or all states, flattened as the paper does.
        prompt_tokens, concept_tokens: without special tokens; ids as in the paper, or words.
    """
    cosine_ = float(F.cosine_similarity(prompt.flatten().double(), concept.flatten().double(), dim=0))
    wanted = set(concept_tokens)
    shared = len(wanted & set(prompt_tokens)) / len(wanted) if wanted else 0.0
    return min(1.0, max(0.0, cosine_, shared))


def run(port: TrainablePort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with SPM. One sampler run and 4 + 2 * anchors network passes a step, in four batches."""

    def anchoring(
        model: TrainableModel, z: Tensor, t: Tensor, conds: Mapping[str, Cond], generator: torch.Generator
    ) -> dict[str, Tensor]:
        if not settings.anchors or not settings.anchor_weight:
            return {}
        anchors = sample_anchors(moved(conds[ERASE].context[:1], z.device, z.dtype), settings.anchors, generator)
        return {"anchors": settings.anchor_weight * anchoring_loss(model, z, t, anchors, conds[ERASE])}

    steps, n = steps_of(settings, spec), len(spec.erase)
    warmup = min(settings.warmup, steps // 6)  # of a short training: the paper's share, 500 of 3000 steps
    rate = cosine(steps, restarts=3, warmup=warmup)
    return train_regression(
        port, spec, settings, progress, aids, method="spm", terms=[target(settings.negative_guidance)], more=anchoring,
        optimiser=Kind.ADAMW, weight_decay=0.01, rate=rate,
        what=LoRA(settings.layers, settings.rank * n, float(n)),  # what n of one concept each add up to
    )  # fmt: skip


SPEC = MethodSpec(
    name="spm",
    title="SPM",
    summary="Trains a rank-one change and holds random other prompts in place. Meant for Gate Erasures, "
    "which spares unrelated prompts; traces remain.",
    paper="https://arxiv.org/abs/2312.16145",
    settings=Settings,
    run=run,
    trains=True,
    rank_each=True,
)
