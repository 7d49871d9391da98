"""What an attack may see, and what it hands over."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, MutableMapping
from dataclasses import dataclass, field

from torch import Tensor

from ..artifact import Delta
from ..gating import GatedPort
from ..operators.cond import Cond
from ..operators.memory import PromptMemory
from ..operators.search import Away
from ..operators.trainable import TrainableModel, TrainablePort
from .words import Words

Look = Callable[[Tensor], Tensor]
"""Clean, scaled latents [N, C, h, w] -> probability [N] that each shows the concept: a judge behind a decoder."""


@dataclass(frozen=True)
class Sampler:
    """How pictures are drawn, by attacks and by the evaluation alike: DDIM (Euler for flow models) with guidance."""

    steps: int = 20
    guidance: float = 7.5
    batch: int = 8


@dataclass(frozen=True)
class AttackTarget:
    """The model under attack and what else the attacker has. White-box attacks see all of it, others only a part."""

    erased: TrainablePort
    base: TrainablePort
    """The model before the erasure: for pictures of the concept, and as the aim of a search."""
    prompts: tuple[str, ...]
    """Prompts that ask for the concept; each is attacked."""
    words: Words | None = None
    """The text side of ``erased``; attacks on prompts need it."""
    look: Look | None = None
    """A judge. Black-box attacks ask it, white-box ones stop early with it."""
    threshold: float = 0.5
    """``look`` has recognised the concept from here on."""
    memory: PromptMemory | None = None
    """A prompt memory that belongs to the erased model: every prediction reads it."""
    negative: Cond | None = None
    """The negative prompt, as the network reads it, that the erased model is sampled with, where that is (a part of) what keeps
    the concept away."""
    pictures: Tensor | None = None
    """Clean, scaled latents [k, C, h, w] that show the concept; drawn from ``base`` where not given."""
    drawn: MutableMapping[Hashable, Tensor] = field(default_factory=dict)
    """What ``base`` drew for attacks already. Targets that share base, prompts, judge and sampler may share it: what differs
    from erasure to erasure is then all that is computed for each."""
    sampler: Sampler = Sampler()
    watch: Callable[[Cond, float | None], object] | None = None
    """Shown what a search is at, now and then, and what the judge says of it. For previews: nothing comes back."""

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("attack: no prompts. Give at least one that asks for the concept")

    def at_once(self, model: TrainableModel) -> int:
        """Pictures to draw side by side: as many as the sampler asks for, and no more than have room."""
        return min(self.sampler.batch, model.at_once)

    def without(self) -> Cond:
        """What pictures are guided away from: the negative prompt, or the empty one."""
        return self.erased.conditions([""])[0] if self.negative is None else self.negative

    def away(self) -> Away | None:
        """The negative prompt as searches meet it, and the guidance away from it; None where there is none, or no guidance."""
        scale = self.sampler.guidance
        return (self.negative, scale) if self.negative is not None and scale != 1 else None

    def as_typed(self, cond: Cond, prompt: str) -> Cond:
        """Text states of ``prompt``, or in its place, with the gates that it opens; as they are where nothing is gated."""
        return self.erased.as_typed(cond, prompt) if isinstance(self.erased, GatedPort) else cond

    def show(self, cond: Cond, score: float | None = None) -> None:
        """Called by attacks wherever they look at a candidate."""
        if self.watch is not None:
            self.watch(cond, score)


@dataclass(frozen=True, eq=False)
class Way:
    """One way to make the erased model draw the concept. What isn't given is as in ordinary sampling."""

    label: str
    prompt: str = ""
    states: Tensor | None = None
    """Text states [L, D], instead of the prompt's."""
    noise: Tensor | None = None
    """The noise [C, h, w] that sampling starts from; there is then one picture, whatever the seed."""
    picture: Tensor | None = None
    """A clean latent [C, h, w] to start from (image-to-image, inpainting)."""
    strength: float = 1.0
    """Share of the trajectory that is drawn anew."""
    mask: Tensor | None = None
    """[1, h, w], 1 where it is drawn anew: inpainting."""
    guidance: float | None = None
    """Instead of the sampler's."""
    attacks: tuple[str, ...] = ()
    """The prompts in whose place it stands; none where it is no prompt's."""


@dataclass(frozen=True, eq=False)
class Found:
    """What an attack found, to be drawn and judged by ``evaluate``."""

    ways: tuple[Way, ...]
    losses: tuple[float, ...] = ()
    """The objective along the way, for plots; what it means is the attack's."""
    change: Mapping[str, Delta] = field(default_factory=dict)
    """A weight change on top of the erased model (relearning)."""
    queries: int = 0
    """Pictures that a black-box attack asked the erased model for."""

    @property
    def in_words(self) -> bool:
        """Whether all of it can be typed, so that any other model can be given the same."""
        return not self.change and all(
            way.prompt and way.states is None and way.noise is None and way.picture is None for way in self.ways
        )


def asking(target: AttackTarget) -> Found:
    """No attack: the prompts as they are. Every attack's figures are read against this one's."""
    return Found(tuple(Way(prompt, prompt, attacks=(prompt,)) for prompt in target.prompts))
