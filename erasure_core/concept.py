"""What to erase, what it becomes, what stays: the user's intent, and the text rows that stand for it."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .port import ModelPort, TextStates, TokenKind
from .vocabulary import VOCABULARY

MAX_CONCEPTS = 1000
_WEIGHT = re.compile(r"^[(\[]+([^()\[\]:]+)(?::\s*[\d.]+)?[)\]]+$")
_ARTICLE = re.compile(r"^(?:an?|the) (?=\S)")
MAX_WORDS_CHARACTERS = 2000


class ConceptError(ValueError):
    """The description of what to erase can't be used; the message says which part and what to do."""


@dataclass(frozen=True)
class Concept:
    """One thing to erase. ``words[0]`` is its name, the rest are aliases; ``to`` is what it becomes ("" = nothing)."""

    words: tuple[str, ...]
    to: str = ""

    @property
    def name(self) -> str:
        return self.words[0]


@dataclass(frozen=True)
class ConceptSpec:
    """The whole request: concepts to erase and words whose pictures must not change.

    With ``everyday``, methods hold common words as well, those of :func:`everyday`.
    """

    erase: tuple[Concept, ...]
    keep: tuple[str, ...] = ()
    everyday: bool = False

    def __post_init__(self) -> None:
        if not self.erase:
            raise ConceptError("concept: nothing to erase. Write at least one word, for example: cigarette")
        if len(self.erase) > MAX_CONCEPTS:
            raise ConceptError(f"concept: {len(self.erase)} concepts, at most {MAX_CONCEPTS} fit in one erasure")
        seen: dict[str, str] = {}
        for concept in self.erase:
            if not concept.words or not all(_fold(word) for word in concept.words):
                raise ConceptError("concept: one of the words to erase is empty. Write a word, or remove it")
            for word in concept.words:
                _check_words("concept", word)
                key = _fold(word)
                if key in seen:
                    raise ConceptError(f"concept: {word!r} is listed twice. Remove one of them")
                seen[key] = concept.name
                if key == _fold(concept.to):
                    raise ConceptError(
                        f"replace_with: {concept.name!r} would be replaced by itself. "
                        "Name something else, or leave it empty to replace it with nothing"
                    )
            _check_words("replace_with", concept.to)
        for concept in self.erase:
            if _fold(concept.to) in seen:
                raise ConceptError(
                    f"replace_with: {concept.to!r} is itself being erased (as {seen[_fold(concept.to)]!r}). "
                    "Name something that stays"
                )
        for word in self.keep:
            _check_words("keep", word)
            if _fold(word) in seen:
                raise ConceptError(
                    f"keep: {word!r} is also in the concepts to erase. Remove it from one of the two lists"
                )

    @classmethod
    def parse(cls, concept: str, replace_with: str = "", keep: str = "", *, everyday: bool = False) -> ConceptSpec:
        """Read the three text boxes of the Erase Concept node.

        ``concept``: one concept a line, aliases after commas ("cat, kitty"). ``replace_with``: one line for all
        concepts, or one line each. ``keep``: separated by lines or commas; repeated words are read once. A semicolon
        ends a line.

        Raises:
            ConceptError: a box is empty, contradictory, or too long; the message names the box.
        """
        concept, replace_with, keep = (box.replace(";", "\n") for box in (concept, replace_with, keep))
        groups = [_split(line, ",") for line in concept.splitlines()]
        groups = [g for g in groups if g]
        targets = [t.strip() for t in replace_with.split("\n")]
        trailing = len(targets) == 2 and not targets[1]  # of two lines an empty second is hardly meant
        if len(targets) != len(groups) or trailing:  # empty lines count only where there is one line each
            targets = [t.strip() for t in replace_with.strip().splitlines()] or [""]
        if len(targets) == 1:
            targets *= max(1, len(groups))
        if len(targets) != len(groups) and groups:
            raise ConceptError(
                f"replace_with: {len(targets)} lines for {len(groups)} concepts. Write one line for all, or one line each"
            )
        kept = dict.fromkeys(_split(keep, ",\n"))
        erase = tuple(Concept(tuple(words), to) for words, to in zip(groups, targets, strict=False))
        spec = cls(erase, tuple(kept), everyday)
        spec._check_against_itself()
        return spec

    def _check_against_itself(self) -> None:
        """Raise where what stays is what goes but for an article or a prompt weight: held hard, it would undo the erasure."""
        gone = {_bare(word): word for concept in self.erase for word in concept.words}
        for box, words in (("keep", self.keep), ("replace_with", [concept.to for concept in self.erase])):
            for word in words:
                if (found := gone.get(_bare(word))) is not None:
                    raise ConceptError(
                        f"{box}: {word!r} says the same as {found!r}, which is to be erased. Remove it from one of the two"
                    )

    def union(self, other: ConceptSpec) -> ConceptSpec:
        """Both requests as one: a word that either erases is not kept."""
        extra = [Concept(tuple(w for w in c.words if not self.erases(w)), c.to) for c in other.erase]
        erase = self.erase + tuple(c for c in extra if c.words)
        keep = [w for w in dict.fromkeys((*self.keep, *other.keep)) if not (self.erases(w) or other.erases(w))]
        return ConceptSpec(erase, tuple(keep), self.everyday or other.everyday)

    @cached_property
    def _erased(self) -> frozenset[str]:
        return frozenset(_fold(word) for concept in self.erase for word in concept.words)

    def number_of(self, words: Iterable[str]) -> int | None:
        """Which of the concepts has one of these words, however they are spelt; the first of several, None where none has."""
        wanted = {_fold(word) for word in words}
        found = (n for n, concept in enumerate(self.erase) if wanted & {_fold(word) for word in concept.words})
        return next(found, None)

    def erases(self, word: str) -> bool:
        """Whether it is one of the words to erase, however it is spelt."""
        return _fold(word) in self._erased

    def without(self, inputs: Collection[str]) -> ConceptSpec:
        """The request without some of its inputs: replace_with, keep, keep_everyday."""
        plain = tuple(replace(concept, to="") for concept in self.erase)
        return ConceptSpec(
            plain if "replace_with" in inputs else self.erase,
            () if "keep" in inputs else self.keep,
            self.everyday and "keep_everyday" not in inputs,
        )

    @property
    def kept(self) -> str:
        """What is held beside the empty prompt, for people; empty where nothing is."""
        return ", ".join([*self.keep, *(["everyday words"] if self.everyday else [])])


_JOINERS = {0x200C, 0x200D, *range(0xE0020, 0xE0080)}
"""Invisible characters that words need: Persian and Indic joiners, and those inside emoji families and flags."""


def clean(text: str) -> str:
    """``text`` with a space for every character that can't be seen and isn't part of a letter or an emoji."""
    return "".join(c if c.isprintable() or ord(c) in _JOINERS else " " for c in text)


def _fold(text: str) -> str:
    """What two spellings of one word have in common."""
    return " ".join(clean(unicodedata.normalize("NFC", text).casefold()).split())


def _bare(text: str) -> str:
    """A word without article and prompt weight: "a cat" and "(cat:1.2)" are a cat."""
    return _ARTICLE.sub("", _fold(_WEIGHT.sub(r"\1", text.strip())))


def _split(text: str, separators: str) -> list[str]:
    return [part.strip() for part in re.split(f"[{separators}]", text) if part.strip()]


def _check_words(box: str, words: str) -> None:
    if len(words) > MAX_WORDS_CHARACTERS:
        raise ConceptError(f"{box}: {words[:40]!r}... has {len(words)} characters, at most {MAX_WORDS_CHARACTERS} fit")
    if any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n\r" for c in words):
        raise ConceptError(f"{box}: {words!r} contains control characters. Type it again without them")


class Rows(StrEnum):
    """Which rows of a prompt's text states stand for a concept (METHODS 1.5). BOS never does: every prompt shares it."""

    LAST = "last"
    """The last content token only (UCE 2025 code, SPEED)."""
    LAST_TO_END = "last to end"
    """The last content token, end-of-text and all padding (UCE 2023 code)."""
    SUMMARY = "summary"
    """The last content token, end-of-text, and four evenly spaced rows of the padding: at most six rows a prompt."""
    ALL = "all"
    """Everything behind BOS, position by position (RECE)."""


TEMPLATES: dict[str, tuple[str, ...]] = {
    "none": ("{}",),
    "few": ("{}", "a {}", "a picture of {}"),
    "many": (
        "{}",
        "a {}",
        "a picture of {}",
        "a photo of {}",
        "an image of {}",
        "a drawing of {}",
        "{} style",
        "in {} style",
    ),
}
"""Sentences around a concept: a causal text encoder gives a word another state in each."""


def expand(words: Iterable[str], templates: Sequence[str]) -> list[str]:
    """Each word in each template, without repeats."""
    return list(dict.fromkeys(t.format(w) for w in words for t in templates))


def _chunk_bounds(kinds: Tensor) -> list[tuple[int, int]]:
    """Prompts over 77 tokens are several chunks, each with its own BOS."""
    starts = (kinds == TokenKind.BOS).nonzero().flatten().tolist() or [0]
    return list(zip(starts, [*starts[1:], len(kinds)], strict=True))


_SUMMARY_PADDING = 4


def rows_of(text: TextStates, rule: Rows) -> Tensor:
    """The rows [n, D] of ``text`` under ``rule``, float64 on the CPU.

    LAST and SUMMARY of a prompt without content (the empty prompt, only emoji that the tokenizer drops) use its
    end-of-text row, never BOS. Prompts of several chunks contribute the rows of the last chunk that has content.
    """
    chunks = _chunk_bounds(text.kinds)
    with_content = [c for c in chunks if (text.kinds[c[0] : c[1]] == TokenKind.CONTENT).any()]
    start, end = (with_content or chunks[:1])[-1]
    states, kinds = text.states[start:end].cpu(), text.kinds[start:end].cpu()
    content = (kinds == TokenKind.CONTENT).nonzero().flatten()
    eos = (kinds == TokenKind.EOS).nonzero().flatten()
    pad = (kinds == TokenKind.PAD).nonzero().flatten()
    last_row = eos[:1] if len(eos) else content[-1:]
    if len(content):
        last_row = content[-1:]
    if rule is Rows.LAST:
        chosen = states[last_row]
    elif rule is Rows.SUMMARY:
        spread = torch.linspace(0, max(0, len(pad) - 1), min(_SUMMARY_PADDING, len(pad))).round().long()
        chosen = states[torch.cat([last_row, eos[:1], pad[spread]])]
    elif rule is Rows.LAST_TO_END:
        chosen = states[int(last_row[0]) :]
    else:
        chosen = states[1:] if kinds[0] == TokenKind.BOS else states
    return chosen.double()


def paired_rows(source: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of a prompt and those that they should become, of the same number: paired from the first on, the longer tail
    dropped. Only LAST_TO_END gives prompts of one chunk length different numbers."""
    n = min(len(source), len(target))
    return source[:n], target[:n]


def meanings(port: ModelPort, texts: Sequence[str]) -> list[Tensor]:
    """What each text means to ``port``'s text encoder: [n, D], a unit row for each of its n chunks, float64.

    The mean of the chunk's SUMMARY rows without that of the vocabulary's words: raw states of any two texts are alike, since
    most of them is what all prompts share.
    """
    means = {
        x.prompt: torch.stack([
            rows_of(TextStates(x.prompt, x.states[a:b], x.kinds[a:b]), Rows.SUMMARY).mean(0)
            for a, b in _chunk_bounds(x.kinds)
        ])
        for x in port.text(list(dict.fromkeys([*VOCABULARY, *texts])))
    }  # fmt: skip
    shared = torch.stack([means[word][-1] for word in VOCABULARY]).mean(0)
    return [F.normalize(means[text] - shared) for text in texts]


_ALIKE = 0.5
"""Everyday words that are as like an erased word as this (cosine) are not held. On the testbed's encoder other words for one
thing are at 0.85 or more, and few others above 0.5."""


def everyday(port: ModelPort, spec: ConceptSpec) -> tuple[str, ...]:
    """The common words of the vocabulary that an erasure may hold: none that is erased, and not those whose
    :func:`meanings` are those of an erased word, or nearly."""
    words = [word for concept in spec.erase for word in concept.words]
    found = meanings(port, [*VOCABULARY, *words])
    erased = torch.cat(found[len(VOCABULARY) :])
    alike = [float((rows @ erased.T).max()) for rows in found[: len(VOCABULARY)]]
    return tuple(w for w, a in zip(VOCABULARY, alike, strict=True) if a < _ALIKE and not spec.erases(w))


@dataclass(frozen=True)
class EditRows:
    """A concept spec in numbers, rows of width D: ``source`` [n, D] become ``target`` [n, D], the rest stays."""

    source: Tensor
    target: Tensor
    keep: Tensor
    """The rows of the kept words, [m, D]."""
    empty: Tensor
    """All rows of the empty prompt, [L, D], BOS first: every guided picture is drawn with them."""

    @property
    def held(self) -> Tensor:
        """All that stays, [L + m, D]."""
        return torch.cat([self.empty, self.keep])


def edit_rows(
    port: ModelPort, spec: ConceptSpec, *, rule: Rows, templates: Sequence[str], dark: Sequence[tuple[Tensor, int]] = ()
) -> EditRows:
    """Encode everything that ``spec`` names, in one batch, and pick its rows.

    ``dark``: text states [L, D] that were found to bring a concept back, and the number of that concept. Each of their rows but
    BOS may carry it, so all of them become the replacement's at the same place.
    """
    pairs = [
        (s, t)
        for concept in spec.erase
        for template in templates
        for word in concept.words
        for s, t in [(template.format(word), template.format(concept.to) if concept.to else "")]
    ]
    common = everyday(port, spec) if spec.everyday else ()
    keeps = list(dict.fromkeys([*expand(spec.keep, templates), *common]))  # a word twice would weigh twice
    prompts = list(dict.fromkeys([*(p for pair in pairs for p in pair), *keeps, ""]))
    states = dict(zip(prompts, port.text(prompts), strict=True))
    rows = {prompt: rows_of(text, rule) for prompt, text in states.items()}
    matched = [paired_rows(rows[s], rows[t]) for s, t in dict.fromkeys(pairs)]
    for found, owner in dark:
        to = spec.erase[owner].to
        replacement = rows_of(states[templates[0].format(to) if to else ""], Rows.ALL)
        matched.append(paired_rows(found.detach().cpu().double()[1:], replacement))
    return EditRows(
        torch.cat([c for c, _ in matched]),
        torch.cat([to for _, to in matched]),
        torch.cat([rows[""][:0], *(rows[k] for k in keeps)]),
        states[""].states.cpu().double(),
    )
