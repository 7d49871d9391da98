"""Concept Inversion (Pham et al., ICLR 2024, arXiv:2308.01508; METHODS 3.2): textual inversion of the erased model.

    v* = argmin_v E || target - net(x_t, t, E("a photo of <v>")) ||^2

over about 25 pictures of the concept. One new word, learned; then ``<v>`` is written in the place of the concept's name
in the attacked prompts. 5000 steps, learning rate 5e-3, AdamW.

Departures: a word is learned in the sentences that it is then used in: each attacked prompt, ``<v>`` in its name's place,
with its own pictures, so that "a cat in <v>" learns the style and not the cat. Sentences of a template (ours) join it
where the prompt asks for the concept alone. The start is the mean of the name's tokens (theirs: a word of the user's
choice). The rate is in proportion to the deviation of these tokens' vectors, since at CLIP's 5e-3 the larger ones of other
encoders hardly move. The authors accumulate 4 batches of 4 pictures into a step and pass ``--scale_lr``, which multiplies
the rate by both; here a step is one batch, all in one sentence, and the rate isn't scaled. With a judge the search ends when
nothing is left to search (watched.py). As in their version for negative prompts, the guidance away from one is in the loop
(``AttackTarget.negative``), and so is a prompt memory; SLD is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept import ConceptSpec
from ..operators.cond import Cond
from ..operators.search import denoising_loss
from ..operators.train_loop import Kind, Optimiser
from .drawing import Progress, pictures_of_each
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .watched import search_watched, teachers
from .words import Frame, Words, sentence_of

SENTENCES = (
    "{}",
    "a photo of {}",
    "a picture of a {}",
    "a drawing of {}",
    "one {}",
    "a close view of {}",
    "this is {}",
)
_EMPTY = {"an", "the", *" ".join(SENTENCES).split()}
"""Words beside which a sentence asks for the concept alone."""
_CLIP_L = 0.014
"""Deviation of CLIP-L's word vectors, at which ``learning_rate`` is the paper's."""


@dataclass(frozen=True)
class Settings:
    steps: int = setting(5000, "Search steps. More find more, and take longer.", low=1, high=100000, step=100)
    learning_rate: float = setting(
        5e-3,
        "Size of a search step on CLIP-L's word vectors; on others in proportion to their deviation.",
        low=1e-6,
        high=10.0,
        step=1e-3,
    )
    batch: int = setting(4, "Pictures per search step.", low=1, high=64, step=1)
    pictures: int = setting(
        25, "Pictures of the concept that are learned from, shared among the prompts.", low=1, high=1000, step=1
    )
    vectors: int = setting(1, "New words; the paper learns one.", low=1, high=16, step=1)
    teacher: bool = setting(
        False, "Learn from what the base model predicts for the prompts in place of the noise; takes fewer steps."
    )
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def sentences(target: AttackTarget, spec: ConceptSpec) -> list[str]:
    """The attacked prompts, one by one, with ``{}`` where they name the concept; plain sentences where they don't."""
    known = [word for concept in spec.erase for word in concept.words]
    return [sentence_of(prompt, known) for prompt in target.prompts]


def learned_in(sentence: str) -> list[str]:
    """The sentences that are true of the pictures of an attacked one: itself, and the template's where it asks for no
    more than the concept."""
    alone = all(word in _EMPTY for word in sentence.lower().split())
    return list(dict.fromkeys([sentence, *(SENTENCES if alone else ())]))


def start_of(words: Words, name: str) -> tuple[Tensor, float]:
    """(mean vector [1, D] of a name's tokens, the mean of their deviations)."""
    named = words.content(name)
    ids = words.pack(torch.tensor([named])).to(words.table.device)
    begin = int(words.bos is not None)
    rows = words.encoder.embed(ids)[0, begin : begin + len(named)].detach()
    return rows.mean(0, keepdim=True), float(rows.std(-1).mean())


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """Learn the word, then use it where the prompts name the concept."""
    words, own, count = target.words, sentences(target, spec), len(target.prompts)
    assert words is not None
    pools = pictures_of_each(
        target,
        target.prompts,
        -(-settings.pictures // count),
        settings.seed,
        "concept inversion",
        lambda *_: progress(0, settings.steps),
    )
    slots = {s: Frame.inside(words, s, settings.vectors).slot() for s in dict.fromkeys((*own, *SENTENCES))}
    lessons = [[slots[s] for s in learned_in(sentence)] for sentence in own]
    start, deviation = start_of(words, spec.erase[0].name)
    null, away = target.erased.conditions([""])[0], target.away()

    def read(vectors: Tensor) -> Cond:
        return Cond.cat([null.with_context(slots[s].states(vectors)) for s in dict.fromkeys(own)])

    # The one with gradients last: how much room is left then decides whether it keeps its activations.
    with teachers(target, settings.teacher) as teacher, target.erased.trainable() as model:

        def loss(vectors: Tensor, generator: torch.Generator) -> Tensor:
            number = int(torch.randint(0, count, (), generator=generator))
            lesson = lessons[number]
            cond = null.with_context(
                lesson[int(torch.randint(0, len(lesson), (), generator=generator))].states(vectors)
            )
            return denoising_loss(
                model,
                pools[number],
                cond,
                generator,
                batch=settings.batch,
                memory=target.memory,
                teacher=teacher(number),
                away=away,
            )

        kept = search_watched(
            model, target, start.repeat(settings.vectors, 1), loss, read,
            Optimiser(settings.learning_rate * deviation / _CLIP_L, Kind.ADAMW, 1e-2),
            steps=settings.steps, seed=settings.seed, name="inversion", progress=progress,
        )  # fmt: skip
    asked: dict[str, list[str]] = {}
    for prompt, sentence in zip(target.prompts, own, strict=True):
        asked.setdefault(sentence, []).append(prompt)
    ways = [
        Way(s.replace("{}", "<v>"), states=slots[s].states(kept.value)[0].cpu(), attacks=tuple(prompts))
        for s, prompts in asked.items()
    ]
    return Found(tuple(ways), tuple(torch.stack(kept.losses).tolist()), queries=kept.asked)


SPEC = AttackSpec(
    name="concept_inversion",
    title="Concept Inversion (CCE)",
    summary="Learns a new word for the concept on the erased model: textual inversion, which broke every eraser of its time.",
    paper="https://arxiv.org/abs/2308.01508",
    knowledge=Knowledge.WHITE_BOX,
    version=2,
    settings=Settings,
    run=run,
    budget="steps",
    needs_words=True,
)
