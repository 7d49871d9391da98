"""DUO, Direct Unlearning Optimization (Park et al., NeurIPS 2024, arXiv:2407.21035; METHODS 2.2).

Pairs of an unsafe picture and its safe counterpart, which differ only in the unsafe part, feed a preference loss with an
empty prompt (operators/prefer.py), so the concept is unlearned in pictures rather than in words. LoRA of rank 32 on
self-attention, AdamW, gradient norm 1, 1000 steps; beta 500, lr = 3e-4 * 100 / beta, prior weight = 1e6 * beta / 100.

With ``own_prompts`` each member is read with the prompt that drew it, one pair in five with none (the authors' options
``given_prompt`` and ``cfg_train``). It goes by words again, and so it is gentler: what the safe prompts draw is held.

Departures: both members of a pair share their time, as in Diffusion-DPO (``shared_time`` off gives the authors' code, where
they are drawn apart); the kto branch is left out; the authors' batch is 1 on each of 4 GPUs, here it is a setting.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..devices import moved
from ..operators.changes import Init, Layers, LoRA
from ..operators.cond import Cond
from ..operators.prefer import ROUNDED, draw_times, preference_losses, scaled_by_beta
from ..operators.train_loop import Kind, Optimiser, Phase, Trainer
from ..operators.trainable import TrainableModel, TrainablePort
from ..pairs import ConceptPairs
from ._training import RANK, erasure_of, kept
from .registry import Aids, MethodSpec, Progress, setting


@dataclass(frozen=True)
class Settings:
    iterations: int = setting(
        1000, "Training steps, of all pairs together. More erase more firmly.", low=1, high=100000, step=10
    )
    beta: float = setting(500.0, "How gently the pictures are unlearned: lower goes further and disturbs more.",
        low=1.0, high=10000.0, step=50.0)  # fmt: skip
    base_learning_rate: float = setting(
        3e-4, "Learning rate at beta 100; it is scaled by 100 / beta.", low=1e-8, high=1.0, step=1e-5
    )
    base_prior_weight: float = setting(1e6, "How firmly everything else stays, at beta 100; it is scaled by beta / 100.",
        low=0.0, high=1e12, step=1e5)  # fmt: skip
    shared_time: bool = setting(True, "Both members of a pair are noised alike. Off: as in the authors' code.")
    own_prompts: bool = setting(
        False, "Read each picture with its own prompt. Off: with none, as in the paper, so that no words are involved."
    )
    layers: Layers = setting(Layers.SELF, "Which layers are changed; self-attention leaves what words mean alone.")
    rank: int = setting(32, RANK, low=1, high=512, step=1)
    batch: int = setting(4, "Pairs per training step.", low=1, high=64, step=1)
    latest_time: float = setting(0.75, "Share of the noise levels that pairs are compared at, from the cleanest.",
        low=0.01, high=1.0, step=0.05)  # fmt: skip
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


_UNPROMPTED = 0.2
"""With ``own_prompts``, this share of pairs is read with the empty prompt (cfg_train)."""


def phase(model: TrainableModel, pairs: ConceptPairs, prompts: Mapping[str, Cond], settings: Settings) -> Phase:
    """DUO's step over pairs of clean latents; each step draws ``batch`` of them.

    ``prompts`` has the empty one and, with ``own_prompts``, those of all scenes, on the model's device. Where the prior weighs
    much, as by default, the model computes in full precision from here on (operators/prefer.py).
    """
    lr, prior_weight = scaled_by_beta(settings.base_learning_rate, settings.base_prior_weight, settings.beta)
    if prior_weight * ROUNDED > 0.1:
        model.precise()
    what = LoRA(settings.layers, settings.rank, init=Init.GAUSSIAN)
    unsafe, safe = (x.to(model.device, model.dtype) for x in (pairs.unsafe, pairs.safe))
    below = max(1, round(settings.latest_time * len(model.schedule)))

    def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
        numbers = torch.randint(0, len(unsafe), (settings.batch,), generator=generator)
        chosen = moved(numbers, model.device)
        times = draw_times(settings.batch, generator, shared=settings.shared_time, below=below)
        noise = model.noise(settings.batch, generator)
        null = prompts[""]
        to_unsafe = to_safe = null
        if settings.own_prompts:
            bare = (torch.rand(settings.batch, generator=generator) < _UNPROMPTED).tolist()
            scenes = [("", "") if b else pairs.scene(k) for k, b in zip(numbers.tolist(), bare, strict=True)]
            to_unsafe, to_safe = (Cond.cat([prompts[x] for x in side]) for side in zip(*scenes, strict=True))
        return preference_losses(
            model, unsafe[chosen], safe[chosen], noise, times, (to_unsafe, to_safe, null),
            beta=settings.beta, prior_weight=prior_weight,
        )  # fmt: skip

    return Phase("duo", model.train(what, settings.seed), loss, Optimiser(lr, Kind.ADAMW, 1e-2), clip=1.0)


def run(
    port: TrainablePort,
    spec: ConceptSpec,
    settings: Settings,
    progress: Progress,
    aids: Aids,
) -> Erasure:
    """Erase with DUO what the unsafe members of ``aids.pairs`` show and the safe ones don't.

    One student and one frozen pass of three latents per pair and step.
    """
    assert aids.pairs is not None, "api.erase checks needs_pairs"
    words = list(dict.fromkeys(["", *(x for scene in aids.pairs.scenes for x in scene if settings.own_prompts)]))
    conds = port.conditions(words)
    with port.trainable() as model:
        prompts = {word: c.on(model.device, model.dtype) for word, c in zip(words, conds, strict=True)}
        Trainer(model, [phase(model, aids.pairs, prompts, settings)], settings.iterations, seed=settings.seed).run(
            progress, aids.watch, checkpoint=kept(aids, port, model, spec, "duo", settings)
        )
        return erasure_of(port, spec, "duo", settings, model.deltas())


SPEC = MethodSpec(
    name="duo",
    title="DUO",
    summary="Unlearns in pictures rather than words, from pairs with and without the concept: also reaches "
    "what words don't name.",
    paper="https://arxiv.org/abs/2407.21035",
    settings=Settings,
    run=run,
    trains=True,
    needs_pairs=True,
    unread=("replace_with", "keep", "keep_everyday", "dark"),
    precise=True,
)
