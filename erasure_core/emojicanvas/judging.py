"""The EmojiCanvas judge behind the protocol of all judges: asked in the words of prompts, pictures of any size."""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.judge_error import JudgeError
from ..metrics.judges import check_pictures
from .concepts import IMAGE_SIZE, OBJECTS, STYLES
from .judge import Judge

_ARTICLE = re.compile(r"^(a|an|the|in)\s+")


class CanvasJudge:
    """Knows the 24 objects and 5 styles of EmojiCanvas, by every word that the model knows them by."""

    def __init__(self, network: Judge) -> None:
        self._network = network
        self.name, self.version, self.threshold = network.name, network.version, network.threshold
        styles = [label for s in STYLES for label in dict.fromkeys((s.name, s.phrase)) if label]
        self.labels: tuple[str, ...] | None = (*(word for o in OBJECTS for word in o.words), *styles)

    @classmethod
    def load(cls) -> CanvasJudge:
        """The bundled judge.

        Raises:
            ValueError: its file belongs to other concepts.
        """
        return cls(Judge.load())

    def probability(self, pictures: Tensor, concept: str) -> Tensor:
        label = label_of(concept)
        if label is None:
            known = ", ".join([*(o.name for o in OBJECTS), *(s.name for s in STYLES)])
            raise ValueError(f"judge: {self.name} does not know {concept!r}. It knows: {known}, and synonyms of these")
        pictures = check_pictures(pictures).cpu()
        if not len(pictures):
            return torch.zeros(0)
        if pictures.shape[-2:] != (IMAGE_SIZE, IMAGE_SIZE):
            pictures = F.interpolate(pictures, (IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", antialias=True)
        return self._network.judge(2 * pictures - 1).probability(label)

    def error(self, concept: str) -> JudgeError | None:
        """How it errs on an object or a style, on drawings of a set that it never saw; None where its file doesn't say."""
        kind = "style" if label_of(concept) in [s.name for s in STYLES] else "object"
        error = JudgeError(self._network.held_out[kind], self._network.mistaken[kind])
        return error if error.speaks else None


def label_of(concept: str) -> str | None:
    """The judge's label for a word or a style phrase ("kitty" -> cat, "in neon style" -> neon); None if it is neither."""
    words = _ARTICLE.sub("", " ".join(concept.casefold().split()))
    for thing in OBJECTS:
        if words in thing.words:
            return thing.name
    for style in STYLES:
        if words in (style.name, style.phrase, f"{style.name} style") and words:
            return style.name
    return None
