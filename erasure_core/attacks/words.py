"""The text side of a model as attacks see it: tokens in, text states out, and which tokens a person can type."""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from ..operators.search import EmbeddingEncoder, TokenSlot

Piece = int | None
"""A token of a prompt, or None where an attack writes its own."""


@dataclass(frozen=True, eq=False)
class Words:
    """Tokenizer and text encoder of a port, which must give the states that its ``text`` gives.

    ``tokenize`` gives ids [N, L] as the model pads them ([N, L, T] where T tokenizers pad differently, as in SDXL);
    ``decode`` is its inverse on content; ``vocabulary`` [V] holds the ids that an attack may write.
    """

    encoder: EmbeddingEncoder
    tokenize: Callable[[Sequence[str]], Tensor]
    decode: Callable[[Sequence[int]], str]
    bos: int | None
    eos: int
    vocabulary: Tensor

    @classmethod
    def typeable(
        cls,
        encoder: EmbeddingEncoder,
        tokenize: Callable[[Sequence[str]], Tensor],
        decode: Callable[[Sequence[int]], str],
        bos: int | None,
        eos: int,
        size: int,
    ) -> Words:
        """Of ``size`` tokens those that survive being written out and read again: whole words, no specials.

        What an attack finds is then the text that anybody can type, not a row of ids that no text gives.
        """
        every = cls(encoder, tokenize, decode, bos, eos, torch.arange(size))
        texts = [decode([i]).strip() for i in range(size)]
        kept = [
            i
            for start in range(0, size, 4096)
            for i, ids in enumerate(every.contents(texts[start : start + 4096]), start)
            if ids == [i] and texts[i]
        ]
        return cls(encoder, tokenize, decode, bos, eos, torch.tensor(kept, dtype=torch.long))

    def among(self, known: Container[str]) -> Words:
        """With those tokens alone that spell one of ``known``: all that a small encoder has learned."""
        ids = [i for i in self.vocabulary.tolist() if self.decode([i]).strip() in known]
        return replace(self, vocabulary=torch.tensor(ids, dtype=torch.long))

    @cached_property
    def _empty(self) -> Tensor:
        return self.tokenize([""])[0].cpu()

    @property
    def length(self) -> int:
        """Rows L of a prompt."""
        return len(self._empty)

    @property
    def room(self) -> int:
        """Content tokens that fit."""
        return self.length - 1 - (self.bos is not None)

    @cached_property
    def table(self) -> Tensor:
        """Word embeddings [V, D] of the vocabulary, on the encoder's device; ids are kept on the CPU."""
        first = next(self.encoder.parameters(), None) if isinstance(self.encoder, nn.Module) else None
        ids = self.wide(self.vocabulary[None])
        with torch.no_grad():
            return self.encoder.embed(ids if first is None else ids.to(first.device))[0].detach()

    def wide(self, ids: Tensor) -> Tensor:
        """The same id for every tokenizer."""
        more = self._empty.shape[1:]
        return ids.reshape(*ids.shape, *[1] * len(more)).expand(*ids.shape, *more)

    def contents(self, prompts: Sequence[str]) -> list[list[int]]:
        """The tokens of each prompt between start and end of text."""
        rows = self.tokenize(prompts).cpu()
        found = []
        for ids in (rows if rows.ndim == 2 else rows[..., 0]).tolist():
            ids = ids[self.bos is not None :]
            found.append(ids[: ids.index(self.eos)] if self.eos in ids else ids)
        return found

    def content(self, prompt: str) -> list[int]:
        return self.contents([prompt])[0]

    def pack(self, contents: Tensor) -> Tensor:
        """Content ids [N, n] between start and end of text, padded as the tokenizer pads: [N, L] or [N, L, T]."""
        n, begin = contents.shape[1], int(self.bos is not None)
        if n > self.room:
            raise ValueError(f"prompt: {n} tokens, {self.room} fit")
        rows = self._empty[-1].expand(self._empty.shape).clone()  # padding everywhere
        if self.bos is not None:
            rows[0] = self.bos
        rows[begin + n] = self.eos
        packed = rows.expand(len(contents), *rows.shape).clone()
        packed[:, begin : begin + n] = self.wide(contents.cpu())
        return packed

    def states(self, ids: Tensor) -> Tensor:
        """Text states [N, L, D] of packed ids."""
        return self.encoder(ids.to(self.table.device))

    def spell(self, contents: Sequence[int]) -> str:
        """The text of content ids."""
        return " ".join(self.decode(list(contents)).split())

    def without(self, forbidden: Sequence[str]) -> Tensor:
        """Places [n] in the vocabulary of the tokens that hide none of the forbidden words."""
        parts = [x for text in forbidden for x in text.lower().split() if len(x) > 2] or [x.lower() for x in forbidden]
        texts = [self.decode([i]).strip().lower() for i in self.vocabulary.tolist()]
        clean = [not any(part in text or (len(text) > 2 and text in part) for part in parts) for text in texts]
        return torch.tensor(clean).nonzero().flatten()


@dataclass(frozen=True)
class Frame:
    """A prompt with free places: some tokens given, the others (None) written by an attack."""

    words: Words
    pieces: tuple[Piece, ...]

    @classmethod
    def prefix(cls, words: Words, content: Sequence[int], free: int) -> Frame:
        """``free`` places before the prompt, whose end is cut where both don't fit (UnlearnDiffAtk).

        Raises:
            ValueError: not even the places fit.
        """
        _check_fits(words, free)
        return cls(words, (*[None] * free, *content[: words.room - free]))

    @classmethod
    def inside(cls, words: Words, sentence: str, free: int) -> Frame:
        """``free`` places where ``sentence`` has its ``{}``; where all don't fit, what is before it is
        cut at its beginning, then what is behind it at its end.

        Raises:
            ValueError: not even the places fit.
        """
        _check_fits(words, free)
        head, tail = words.contents(sentence.split("{}", 1))
        head = head[max(0, len(head) - (words.room - free)) :]
        return cls(words, tuple([*head, *[None] * free, *tail][: words.room]))

    @classmethod
    def every(cls, words: Words, content: Sequence[int], gap: int) -> Frame:
        """A free place before every ``gap`` tokens, and one at the end (P4D-K)."""
        pieces: list[Piece] = []
        for start in range(0, len(content), gap):
            pieces += [None, *content[start : start + gap]]
        return cls(words, tuple([*pieces, None][: words.room]))

    @property
    def free(self) -> int:
        return sum(piece is None for piece in self.pieces)

    def contents(self, tokens: Tensor) -> Tensor:
        """Content ids [N, n] with ``tokens`` [N, free] (ids) in the free places."""
        ids = torch.tensor([-1 if piece is None else piece for piece in self.pieces]).repeat(len(tokens), 1)
        ids[:, ids[0] < 0] = tokens.cpu()
        return ids

    def ids(self, tokens: Tensor) -> Tensor:
        """Packed ids of :meth:`contents`."""
        return self.words.pack(self.contents(tokens))

    def spell(self, tokens: Tensor) -> str:
        """The prompt with ``tokens`` [free] in it, as text."""
        return self.words.spell(self.contents(tokens[None])[0].tolist())

    def slot(self) -> TokenSlot:
        """The free places as vectors, differentiable through the encoder."""
        begin = int(self.words.bos is not None)
        places = [begin + i for i, piece in enumerate(self.pieces) if piece is None]
        ids = self.ids(self.words.vocabulary[:1].repeat(1, self.free))
        return TokenSlot(self.words.encoder, ids.to(self.words.table.device), places)


def _check_fits(words: Words, free: int) -> None:
    if free > words.room:
        raise ValueError(f"tokens: {free} searched words, and {words.room} fit into a prompt. Search fewer")


def swap(prompt: str, words: Sequence[str], new: str) -> str | None:
    """``prompt`` with ``new`` in place of the longest of ``words`` that it names; None where it names none."""
    for word in sorted(words, key=len, reverse=True):
        pattern = rf"(?<!\w){re.escape(word)}(?!\w)"
        if re.search(pattern, prompt, re.IGNORECASE):
            return re.sub(pattern, lambda _: new, prompt, flags=re.IGNORECASE)
    return None


PLAIN = "a photo of {}"


def sentence_of(prompt: str, words: Sequence[str], unnamed: str = PLAIN) -> str:
    """``prompt`` with ``{}`` where it names one of ``words``; ``unnamed`` where it names none.

    A prompt with several such places gives way to a plain sentence: what is searched fits into one, and the name may stay
    nowhere.
    """
    sentence = swap(prompt, words, "{}")
    if sentence is None:
        sentence = unnamed
    return sentence if sentence.count("{}") == 1 else PLAIN
