"""Concept Inversion (Pham et al., ICLR 2024, arXiv:2308.01508; METHODS 3.2): textual inversion of the erased model.

    v* = argmin_v E || target - net(x_t, t, E("a photo of <v>")) ||^2

over about 25 pictures of the concept. One new word, learned; then ``<v>`` is written in the place of the concept's name
in the attacked prompts. 5000 steps, learning rate 5e-3, AdamW.

Departures: the authors' launch scripts pass ``--scale_lr``, which multiplies the rate by batch and accumulation; here
``learning_rate`` is the rate. Sentences around the word are ours. Their versions for SLD and negative prompts put that
guidance into the loop; here a memory is read in the loop, erasers that act on the guidance are not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept import ConceptSpec
from ..operators.search import denoising_loss
from ..operators.train_loop import Kind, Optimiser, Phase, generator_for
from .drawing import Progress, pictures_of
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .words import Frame, sentence_of

SENTENCES = (
    "{}",
    "a photo of {}",
    "a picture of a {}",
    "a drawing of {}",
    "one {}",
    "a close view of {}",
    "this is {}",
)
_SHOWN_EVERY = 25


@dataclass(frozen=True)
class Settings:
    steps: int = setting(5000, "Search steps. More find more, and take longer.", low=1, high=100000, step=100)
    learning_rate: float = setting(5e-3, "Size of a search step.", low=1e-6, high=10.0, step=1e-3)
    batch: int = setting(4, "Pictures per search step.", low=1, high=64, step=1)
    pictures: int = setting(25, "Pictures of the concept that are learned from.", low=1, high=1000, step=1)
    vectors: int = setting(1, "New words; the paper learns one.", low=1, high=16, step=1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def sentences(target: AttackTarget, spec: ConceptSpec) -> list[str]:
    """The attacked prompts, one by one, with ``{}`` where they name the concept; plain sentences where they don't."""
    known = [word for concept in spec.erase for word in concept.words]
    return [sentence_of(prompt, known) for prompt in target.prompts]


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """Learn the word, then use it where the prompts name the concept."""
    words = target.words
    assert words is not None
    pool = pictures_of(
        target,
        target.prompts,
        settings.pictures,
        settings.seed,
        "concept inversion",
        lambda *_: progress(0, settings.steps),
    )
    asked: dict[str, list[str]] = {}
    for prompt, sentence in zip(target.prompts, sentences(target, spec), strict=True):
        asked.setdefault(sentence, []).append(prompt)
    frames = {sentence: Frame.inside(words, sentence, settings.vectors) for sentence in asked}
    slots = [Frame.inside(words, sentence, settings.vectors).slot() for sentence in SENTENCES]
    named = words.content(spec.erase[0].name)[-1:]  # the papers start from a word that describes it
    vectors = words.encoder.embed(words.pack(torch.tensor([named])).to(words.table.device))[
        :, int(words.bos is not None)
    ]
    vectors = vectors.detach().repeat(settings.vectors, 1).clone().requires_grad_()
    with target.erased.trainable() as model:
        null = target.erased.conditions([""])[0]

        def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
            chosen = slots[int(torch.randint(0, len(slots), (), generator=generator))]
            cond = null.with_context(chosen.states(vectors))
            return {"fit": denoising_loss(model, pool, cond, generator, batch=settings.batch, memory=target.memory)}

        phase = Phase("inversion", [vectors], loss, Optimiser(settings.learning_rate, Kind.ADAMW, 1e-2))
        losses = []
        for i in range(settings.steps):
            progress(i, settings.steps)
            losses.append(phase.step(i, generator_for(settings.seed, phase.name, i))["inversion/fit"])
            if i % _SHOWN_EVERY == 0:
                target.show(null.with_context(slots[0].states(vectors.detach())))
        progress(settings.steps, settings.steps)
    ways = []
    for sentence, prompts in asked.items():
        states = frames[sentence].slot().states(vectors.detach())[0]
        ways.append(Way(sentence.replace("{}", "<v>"), states=states.cpu(), attacks=tuple(prompts)))
    return Found(tuple(ways), tuple(torch.stack(losses).tolist()))


SPEC = AttackSpec(
    name="concept_inversion",
    title="Concept Inversion (CCE)",
    summary="Learns a new word for the concept on the erased model: textual inversion, which broke every eraser of its time.",
    paper="https://arxiv.org/abs/2308.01508",
    knowledge=Knowledge.WHITE_BOX,
    settings=Settings,
    run=run,
    budget="steps",
    needs_words=True,
)
