"""EmojiCanvas under attack: an erased model, its text side and the judge as one :class:`AttackTarget`."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from functools import cache

import torch
from torch import Tensor

from ...artifact import Erasure
from ...attacks import AttackTarget, Sampler, Words
from ..concepts import caption_words
from ..judge import Judge
from ..model import EmojiCanvas, EmojiCanvasPort
from ..taesd import SD15_SCALE
from ..text import BOS, EOS, VOCABULARY, _byte_pair_encoder, tokenize

SAMPLER = Sampler(20, 4.0, 8)
"""As the benchmark draws, and so many at once."""


def decode(ids: Sequence[int]) -> str:
    """The text of content tokens; pieces of words are joined."""
    return _byte_pair_encoder().decode(list(ids), skip_special_tokens=False).replace("</w>", " ")


@cache
def _typeable() -> Tensor:
    """Ids of the words of captions that are one token each. Of the others the encoder knows nothing: a search that may write
    them meets a word that means anything once in 300."""

    def no_states(ids: Tensor | None = None, **_: Tensor) -> Tensor:
        raise NotImplementedError

    words = Words.typeable(no_states, tokenize, decode, BOS, EOS, VOCABULARY)  # type: ignore[arg-type]
    return words.among(caption_words()).vocabulary


def words_of(model: EmojiCanvas) -> Words:
    return Words(model.text_encoder, tokenize, decode, BOS, EOS, _typeable())


def canvas_target(
    model: EmojiCanvas,
    erasure: Erasure | None,
    judge: Judge,
    concept: str,
    prompts: Sequence[str],
    sampler: Sampler = SAMPLER,
    *,
    bf16: bool = False,
    drawn: MutableMapping[Hashable, Tensor] | None = None,
) -> AttackTarget:
    """The model with ``erasure`` (None: the base model itself) and a judge of ``concept``, an object or a style.

    ``drawn``: base pictures of targets that differ in their erasure alone (:attr:`AttackTarget.drawn`).
    """

    @torch.no_grad()
    def look(latents: Tensor) -> Tensor:
        pictures = torch.cat([model.vae.decode(z / SD15_SCALE).float().clamp(-1, 1) for z in latents.split(32)])
        return judge.judge(pictures.contiguous()).probability(concept)

    erased, base = EmojiCanvasPort(model, erasure, bf16=bf16), EmojiCanvasPort(model, bf16=bf16)
    return AttackTarget(
        erased, base, tuple(prompts), words_of(model), look, judge.threshold,
        drawn={} if drawn is None else drawn, sampler=sampler,
    )  # fmt: skip
