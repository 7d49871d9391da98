"""What the trained erasers share: settings, prompts of a step, on-policy latents, the loop, the Erasure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from ..artifact import Delta, Erasure, Fingerprint, Header
from ..concept import ConceptSpec, everyday
from ..operators.changes import FullWeights, Init, Layers, LoRA
from ..operators.checkpoint import Checkpoint
from ..operators.cond import Cond
from ..operators.regress import TargetTerm, keep_term, regress
from ..operators.train_loop import Kind, Optimiser, Phase, Trainer, constant
from ..operators.trainable import TrainableModel, TrainablePort, Weights
from ..schedule import progress_of_steps_done
from ..version import __version__
from .registry import Aids, Progress, setting

_T = TypeVar("_T")
ERASE, TO, NULL, KEEP = "erase", "to", "null", "keep"
"""Keys of a step's prompts: the concept, its replacement (the empty prompt where there is none), "", a kept word."""


STEPS = "Training steps for each concept. More erase more firmly and take longer."
RATE = "Size of a training step. Higher erases in fewer steps; too high and all pictures suffer."
RANK = "Size of the change and of its file. Higher can erase more, and disturb more."
AWAY = "How far pictures are pushed away from the concept. Higher erases more firmly and disturbs other pictures more."
"""Tooltips that several methods share."""


@dataclass(frozen=True)
class TrainSettings:
    """Settings of every trained eraser; each method has its paper's defaults."""

    iterations: int = setting(200, STEPS, low=1, high=100000, step=10)
    learning_rate: float = setting(1e-5, RATE, low=1e-8, high=1.0, step=1e-6)
    layers: Layers = setting(Layers.CROSS, "Which layers are changed: cross-attention for what words name, the rest for what "
        "appears unnamed.")  # fmt: skip
    rank: int = setting(0, f"{RANK} 0 trains every entry of the chosen layers.", low=0, high=512, step=1)
    batch: int = setting(1, "Pictures per training step.", low=1, high=64, step=1)
    guidance: float = setting(3.0, "Guidance of the pictures that training looks at.", low=0.0, high=30.0, step=0.5)
    sample_steps: int = setting(50, "Sampler steps of these pictures; fewer are faster.", low=2, high=1000, step=1)
    keep_weight: float = setting(
        1.0,
        "How hard the kept words are held. Raise it if kept things look different; the concept then goes less firmly.",
        low=0.0,
        high=1e6,
        step=0.1,
    )
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)
    energy: float = setting(
        0.99, "Share of a full change that is stored; 1 stores it exactly.", low=0.5, high=1.0, step=0.01
    )

    def parameters(self) -> FullWeights | LoRA:
        return LoRA(self.layers, self.rank, init=Init.KAIMING) if self.rank else FullWeights(self.layers)


_EVERYDAY = 60
"""Everyday words that a training holds, of all kinds: more would each be met too seldom."""


class Iterated(Protocol):
    @property
    def iterations(self) -> int: ...


def steps_of(settings: Iterated, spec: ConceptSpec) -> int:
    """Training steps of all concepts together. Each has its own, for a step serves few of the words: five concepts in the steps
    of one are met so seldom that hardly any goes."""
    return settings.iterations * len(spec.erase)


def in_turn(each: Sequence[Sequence[_T]]) -> list[_T]:
    """What each concept has, one concept after the other. One with less than another has it more often, so that none is met
    less."""
    return [own[k % len(own)] for k in range(max(map(len, each))) for own in each]


class Prompts:
    """Everything that a spec names, encoded once; conditionings that bring a concept back count as words for it. ``dark`` has
    them with the number of their concept."""

    def __init__(self, port: TrainablePort, spec: ConceptSpec, dark: Sequence[tuple[Tensor, int]] = ()) -> None:
        self.concepts = [[(word, concept.to) for word in concept.words] for concept in spec.erase]
        """Of each concept its words with the replacement."""
        pairs = [pair for concept in self.concepts for pair in concept]
        common = everyday(port, spec) if spec.everyday else ()
        self.keep = list(dict.fromkeys([*spec.keep, *common[:: -(-len(common) // _EVERYDAY) or 1]]))
        texts = list(dict.fromkeys([*(x for pair in pairs for x in pair), *self.keep, ""]))
        self._conds = dict(zip(texts, port.conditions(texts), strict=True))
        self.words = [word for word, _ in pairs]
        self.null = self._conds[""]
        for number, (states, owner) in enumerate(dark):
            name = f"\0dark {number}"  # no word that anybody can type
            self._conds[name] = self.null.with_context(states[None].to(self.null.context))
            self.concepts[owner].append((name, spec.erase[owner].to))
        self.pairs = in_turn(self.concepts)

    def __getitem__(self, text: str) -> Cond:
        return self._conds[text]

    def draw(self, n: int, generator: torch.Generator) -> dict[str, Cond]:
        """The prompts of one step: ``n`` pairs (none twice before every other one was taken; of more than ``n`` each step draws
        anew), and as many kept words, if any."""
        chosen = [self.pairs[i] for i in _spread(len(self.pairs), n, generator)]
        conds = {
            ERASE: Cond.cat([self[word] for word, _ in chosen]),
            TO: Cond.cat([self[to] for _, to in chosen]),
            NULL: self.null,
        }
        if self.keep:
            conds[KEEP] = Cond.cat([self[self.keep[i]] for i in _spread(len(self.keep), n, generator)])
        return conds


def _spread(choices: int, n: int, generator: torch.Generator) -> list[int]:
    """``n`` of ``choices`` in random order, none twice before every other one was taken."""
    rounds = [torch.randperm(choices, generator=generator) for _ in range(-(-n // choices))]
    return torch.cat(rounds)[:n].tolist()


def draw_progress(steps: int, generator: torch.Generator, first: int = 1) -> float:
    """LECO's and SPM's: 1..N-1 of N steps done, all equally likely."""
    return progress_of_steps_done(int(torch.randint(first, steps, (), generator=generator)), steps)


def on_policy(
    model: TrainableModel,
    cond: Cond,
    null: Cond,
    settings: TrainSettings,
    generator: torch.Generator,
    weights: Weights,
    progress: float,
) -> tuple[Tensor, Tensor]:
    """(z, t): latents of ``cond`` as ``weights`` draw them, stopped at ``progress``, and their time [B]."""
    z = model.denoise_until(
        cond, null, guidance=settings.guidance, progress=progress, steps=settings.sample_steps, generator=generator,
        weights=weights,
    )  # fmt: skip
    return z, torch.full((len(cond),), model.schedule.time_at(progress), dtype=torch.long)


class Sampling(Protocol):
    """Settings of the pictures that a method draws."""

    @property
    def guidance(self) -> float: ...
    @property
    def sample_steps(self) -> int: ...
    @property
    def seed(self) -> int: ...


def draw_pictures(
    model: TrainableModel, conds: Sequence[Cond], null: Cond, count: int, settings: Sampling, progress: Progress
) -> Tensor:
    """``count`` clean latents [count, C, h, w], at least one of each conditioning, in turn, as the frozen network draws
    them."""
    generator, count = torch.Generator().manual_seed(settings.seed), max(count, len(conds))
    made: list[Tensor] = []
    for start in range(0, count, model.at_once):
        progress(start, count)
        part = [conds[i % len(conds)] for i in range(start, min(start + model.at_once, count))]
        made.append(
            model.denoise_until(
                Cond.cat(part), null, guidance=settings.guidance, progress=1.0, steps=settings.sample_steps,
                generator=generator, weights=Weights.FROZEN,
            )
        )  # fmt: skip
    return torch.cat(made)


def one_of(n: int, generator: torch.Generator) -> int:
    """A number below ``n``."""
    return int(torch.randint(n, (), generator=generator))


@dataclass(frozen=True)
class Wanted:
    """One concept: the states of its words, what replaces them, and clean, scaled latents [k, C, h, w] that show it."""

    words: Sequence[Cond]
    anchor: Cond
    pictures: Tensor

    def word(self, generator: torch.Generator) -> Cond:
        return self.words[one_of(len(self.words), generator)]


def wanted(
    model: TrainableModel,
    spec: ConceptSpec,
    prompts: Prompts,
    aids: Aids,
    count: int,
    settings: Sampling,
    progress: Progress,
) -> list[Wanted]:
    """Each concept with its words, embeddings that were found before, and ``count`` pictures; those that are given show the
    first."""

    def read(name: str) -> Cond:
        return prompts[name].on(model.device, model.dtype)

    concepts = []
    for number, concept in enumerate(spec.erase):
        reads = [read(name) for name, _ in prompts.concepts[number]]
        pictures = aids.pictures if not number else None
        if pictures is None:
            words = reads[: len(concept.words)]
            pictures = draw_pictures(model, words, prompts.null, count, settings, progress)
        concepts.append(Wanted(reads, read(concept.to), pictures.to(model.device, model.dtype)))
    return concepts


MoreLosses = Callable[[TrainableModel, Tensor, Tensor, Mapping[str, Cond], torch.Generator], Mapping[str, Tensor]]
DrawProgress = Callable[[int, torch.Generator], float]


def train_regression(
    port: TrainablePort,
    spec: ConceptSpec,
    settings: TrainSettings,
    progress: Progress,
    aids: Aids,
    *,
    method: str,
    terms: Sequence[TargetTerm],
    extra: Mapping[str, Cond] | None = None,
    sampled_by: Weights = Weights.STUDENT,
    sampled_prompt: str = ERASE,
    draw: DrawProgress = draw_progress,
    optimiser: Kind = Kind.ADAM,
    weight_decay: float = 0.0,
    rate: Callable[[int], float] = constant,
    average: float | None = None,
    what: FullWeights | LoRA | None = None,
    more: MoreLosses | None = None,
) -> Erasure:
    """One phase, one on-policy latent a step, the given terms, and the kept words at the same latent."""
    prompts = Prompts(port, spec, aids.owned)
    held = [keep_term(KEEP, settings.keep_weight)] if prompts.keep and settings.keep_weight else []

    with port.trainable() as model:

        def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
            conds = {**prompts.draw(settings.batch, generator), **(extra or {})}
            at = draw(settings.sample_steps, generator)
            sampled = conds[sampled_prompt].expand(settings.batch)
            z, t = on_policy(model, sampled, prompts.null, settings, generator, sampled_by, at)
            losses = regress(model, [*terms, *held], z, t, conds)
            return losses if more is None else {**losses, **more(model, z, t, conds, generator)}

        parameters = model.train(what or settings.parameters(), settings.seed)
        phase = Phase("erase", parameters, loss, Optimiser(settings.learning_rate, optimiser, weight_decay), rate)
        trainer = Trainer(model, [phase], steps_of(settings, spec), seed=settings.seed, average=average)
        trainer.run(progress, aids.watch, checkpoint=kept(aids, port, model, spec, method, settings))
        weights = Weights.STUDENT if average is None else Weights.AVERAGE
        return erasure_of(port, spec, method, settings, model.deltas(weights, settings.energy))


def kept(
    aids: Aids, port: TrainablePort, model: TrainableModel, spec: ConceptSpec, method: str, settings: Any
) -> Checkpoint | None:
    """Where this very training keeps its state: the same method, settings, words, pictures, model and text encoder."""
    if aids.checkpoint is None:
        return None
    pairs = () if aids.pairs is None else (aids.pairs.unsafe, aids.pairs.safe)
    seen = [*aids.dark, *(() if aids.pictures is None else (aids.pictures,)), *pairs]
    seen += [model.schedule.signal, model.schedule.noise, model.schedule.times]
    # Some numbers of every weight, whichever layers are trained: the fingerprint would take a base and its finetune for one.
    seen += [p.detach().flatten()[:: max(1, p.numel() // 4096)] for p in model.net.parameters()]
    read = ["", *dict.fromkeys(word for concept in spec.erase for word in concept.words)]
    return aids.checkpoint.of(
        __version__,
        method,
        asdict(settings),
        asdict(spec),
        list(aids.owners),
        model.space,
        model.latent_shape,
        *seen,
        sketch=sketch(port.conditions(read)),
    )


def sketch(conds: Sequence[Cond]) -> list[float]:
    """Eight numbers of each conditioning, its coordinates along random directions as shares of its length: near where
    the text encoder is the same, however it rounds in a batch of other prompts."""
    generator, made = torch.Generator().manual_seed(0), []
    for cond in conds:
        x = torch.cat([part.flatten() for part in (cond.context, *cond.extra.values())]).float().cpu()
        made.append(torch.randn(8, len(x), generator=generator) @ (x / x.norm().clamp_min(1e-30)))
    return torch.cat(made).tolist()


def fingerprint(port: TrainablePort) -> str:
    """Of the weights that read text, as the closed-form methods write it too."""
    seen = Fingerprint()
    for site in port.sites():
        seen.update(site, port.weight(site))
    return seen.hexdigest()


def erasure_of(
    port: TrainablePort, spec: ConceptSpec, method: str, settings: Any, deltas: Mapping[str, Delta]
) -> Erasure:
    """The Erasure of a training."""
    plain = {k: v.value if isinstance(v, Enum) else v for k, v in asdict(settings).items()}
    return Erasure(Header(method, plain, spec, port.family, fingerprint(port), __version__), deltas)
