"""Synonyms and other languages: words for the concept that nobody told the eraser (HUB, arXiv:2410.05664; METHODS 3.7).

No search: each of the caller's words is put in the place of the concept's name in the attacked prompts. Only words that the
base model knows mean anything here, so evaluate the same list on the base model too.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..concept import ConceptSpec
from .drawing import Progress
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .words import swap


@dataclass(frozen=True)
class Settings:
    words: str = setting("", "Words for the concept that the eraser wasn't told, by commas or lines, in any language.")
    most: int = setting(1000, "At most this many words are used.", low=1, high=100000, step=10)


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """Each word in each prompt; a prompt that doesn't name the concept is left out."""
    known = [word for concept in spec.erase for word in concept.words]
    told = {word.casefold() for word in known}
    listed = [word.strip() for line in settings.words.splitlines() for word in line.split(",")]
    unseen = list(dict.fromkeys(word for word in listed if word and word.casefold() not in told))[: settings.most]
    if not unseen:
        raise ValueError(
            "synonyms: no words, or only words that were erased by name. List some that the eraser wasn't told"
        )
    prompts = dict.fromkeys(swap(prompt, known, word) for word in unseen for prompt in target.prompts)
    texts = [text for text in prompts if text is not None] or unseen
    progress(1, 1)
    return Found(tuple(Way(text, text) for text in texts))


SPEC = AttackSpec(
    name="synonyms",
    title="Synonyms",
    summary="Asks with words for the concept that the eraser was not told, in any language.",
    paper="https://arxiv.org/abs/2410.05664",
    knowledge=Knowledge.BLACK_BOX,
    settings=Settings,
    run=run,
    budget="most",
)
