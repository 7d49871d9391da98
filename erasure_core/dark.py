"""Dark embeddings: what a model reads to draw a concept that its words no longer bring (METHODS 2.3), and their files."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from .artifact import Header, WrongModelError
from .concept import ConceptError, ConceptSpec
from .formats import FileError, Layout, header_json, header_text, opened, parse_header, read_tensor, write
from .port import Family

MAX_EMBEDDINGS = 1000
_METADATA = "dark_embeddings"
_NOBODY = -1.0
"""In a file, the score of what nobody looked at: files hold no NaN."""
_TOWERS = ("clip_l", "clip_g", "clip_h")


@dataclass(frozen=True)
class DarkEmbeddings:
    """``n`` mined embeddings, best first. Immutable; float32 on the CPU."""

    header: Header
    """``method`` is "mine" or the erasure method that found them, ``settings`` how, seed included; ``base`` the fingerprint of
    the model that was searched."""
    states: Tensor = field(repr=False)
    """[n, L, D]: what cross-attention reads."""
    scores: tuple[float, ...]
    """For each the mean verdict on pictures drawn with it, or what ``settings["scored by"]`` says; NaN: nobody looked."""
    words: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    """Pseudo-words by text tower (``clip_l``, ``clip_g``, ``clip_h``), [n, k, D_word]: textual-inversion vectors. Empty for
    free conditionings, which no words have."""
    owners: tuple[int, ...] = ()
    """For each the number of its concept among those of the header; empty: all are of the first."""

    def __post_init__(self) -> None:
        n = len(self.states)
        if self.states.ndim != 3 or not 1 <= n <= MAX_EMBEDDINGS or 0 in self.states.shape:
            raise ValueError(f"dark embeddings: states must be [n, L, D], got {tuple(self.states.shape)}")
        if len(self.scores) != n:
            raise ValueError(f"dark embeddings: {len(self.scores)} scores for {n} embeddings")
        if self.owners and (
            len(self.owners) != n or not all(0 <= o < len(self.header.spec.erase) for o in self.owners)
        ):
            raise ValueError(f"dark embeddings: {len(self.owners)} owners for {n} embeddings don't match up")
        lengths = set()
        for tower, vectors in self.words.items():
            if tower not in _TOWERS or vectors.ndim != 3 or len(vectors) != n or 0 in vectors.shape:
                raise ValueError(
                    f"dark embeddings: words of {tower!r:.40} must be [{n}, k, D], got {tuple(vectors.shape)}"
                )
            lengths.add(vectors.shape[1])
        if len(lengths) > 1:
            raise ValueError(f"dark embeddings: the text towers have different numbers of words, {sorted(lengths)}")

    def __len__(self) -> int:
        return len(self.states)

    @property
    def concept(self) -> str:
        """The first word for what they bring back; of several concepts, of each."""
        return ", ".join(dict.fromkeys(self.header.spec.erase[n].name for n in self.owners or (0,)))

    def for_request(self, spec: ConceptSpec) -> tuple[list[Tensor], tuple[int, ...]]:
        """What of it another request erases: states, and for each the number of its concept there. One concept alone takes what
        has one of its words, or all where nothing has: the user says that they belong together.

        Raises:
            ConceptError: of several concepts none has a word for what an embedding brings back.
        """
        owners = [self.header.spec.erase[n] for n in self.owners or (0,) * len(self)]
        numbers = [spec.number_of(concept.words) for concept in owners]
        if len(spec.erase) == 1:
            own = [i for i, number in enumerate(numbers) if number is not None] or range(len(self))
            return [self.states[i].clone() for i in own], (0,) * len(own)
        for concept, number in zip(owners, numbers, strict=True):
            if number is None:
                raise ConceptError(
                    f"dark: these embeddings bring {concept.name!r} back, and no line of concept has that word. Add it to the "
                    "line that it belongs to, or erase it on its own"
                )
        return [x.clone() for x in self.states], tuple(n for n in numbers if n is not None)

    def check_fits(self, family: Family) -> None:
        """Raise where they were mined in another kind of model.

        Raises:
            WrongModelError: names both.
        """
        if family != self.header.family:
            raise WrongModelError(
                f"dark embeddings: they were mined in {self.header.family}, but this is {family}. Mine them here instead"
            )

    def summary(self) -> str:
        """One paragraph for people: of what, how many, how good, how mined."""
        h = self.header
        form = f"{next(iter(self.words.values())).shape[1]} pseudo-words each" if self.words else "free conditionings"
        owners = self.owners or (0,) * len(self)
        names = [h.spec.erase[n].name for n in owners]
        counts = Counter(names)
        several = len(counts) > 1
        each = [f"{name} ({n})" for name, n in counts.items()] if several else h.spec.erase[owners[0]].words
        what = ", ".join(each)
        lines = [f"{len(self)} dark embeddings for {what} ({form}), mined in {h.family}"]
        for i, (name, score) in enumerate(zip(names, self.scores, strict=True), 1):
            said = "nobody looked" if math.isnan(score) else f"{score:.3f}"
            lines.append(f"{i}: {said}" + (f" ({name})" if several else ""))
        settings = ", ".join(f"{k} {v}" for k, v in h.settings.items())
        if h.settings.get("scored by") == "judge":
            settings += "; scores are what the judge said on average, and its own error is not in them"
        return "\n".join([*lines, f"{settings}; library {h.version}"])


def save_dark(dark: DarkEmbeddings, path: str | os.PathLike[str]) -> Path:
    """Write the whole set as one safetensors file: first beside ``path``, then in one move.

    Raises:
        FileError: values that are not numbers, or the disk refuses. No half file is left.
    """
    scores = torch.tensor([_NOBODY if math.isnan(x) else x for x in dark.scores])
    contents = {"states": dark.states, "scores": scores, **{f"words.{tower}": x for tower, x in dark.words.items()}}
    _check_numbers(contents)
    if any(dark.owners):
        contents["owners"] = torch.tensor(dark.owners)
    metadata = {
        _METADATA: header_json(dark.header, [], Layout.LORA),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"Dark embeddings: {dark.concept}"[:200],
        "modelspec.implementation": "ComfyUI Concept Erasure",
        "modelspec.description": dark.summary()[:2000],
    }
    return write(Path(path), {k: _plain(x) for k, x in contents.items()}, metadata)


def load_dark(path: str | os.PathLike[str]) -> DarkEmbeddings:
    """Read a set.

    Raises:
        FileError: missing, cut off, oversized, pickled, foreign, or tensors that contradict the header or each other.
    """
    path = Path(path)
    with opened(path) as f:
        header = _header(f.metadata(), path)
        present = set(f.keys())
        known = {"states", "scores", "owners", *(f"words.{tower}" for tower in _TOWERS)}
        if not {"states", "scores"} <= present or present - known:
            raise FileError(
                f"{path.name}: a set of dark embeddings holds states, scores and words, not {_names(present)}"
            )
        states = read_tensor(f, "states", 3, path)
        words = {t: read_tensor(f, f"words.{t}", 3, path) for t in _TOWERS if f"words.{t}" in present}
        scores = tuple(math.nan if x == _NOBODY else x for x in read_tensor(f, "scores", 1, path).tolist())
        owners = tuple(map(int, read_tensor(f, "owners", 1, path).tolist())) if "owners" in present else ()
    try:
        dark = DarkEmbeddings(header, states, scores, words, owners)
    except ValueError as error:
        raise FileError(f"{path.name}: {error}") from None
    if states.shape[2] != header.family.context_dim:
        raise FileError(f"{path.name}: states of width {states.shape[2]} don't fit {header.family}")
    return dark


def read_dark_header(path: str | os.PathLike[str]) -> Header:
    """Only the header of a set; cheap.

    Raises:
        FileError: as :func:`load_dark`.
    """
    path = Path(path)
    with opened(path) as f:
        return _header(f.metadata(), path)


def _header(metadata: Mapping[str, str] | None, path: Path) -> Header:
    kind = "a set of dark embeddings. If it is a textual inversion, write embedding:name in a prompt"
    header = parse_header(header_text(metadata, _METADATA, path, kind))[0]
    if not header.spec.erase:
        raise FileError(f"{path.name}: its header names no concept")
    return header


def save_words(dark: DarkEmbeddings, folder: str | os.PathLike[str], name: str) -> list[Path]:
    """Write each embedding's pseudo-words as ``folder/name-1.safetensors`` and so on: textual inversions, for
    ``embedding:name-1`` in ComfyUI's prompts and ``<name-1>`` elsewhere.

    Raises:
        FileError: there are no words in the set, values that are not numbers, or the disk refuses.
    """
    if not dark.words:
        raise FileError(
            "dark embeddings: free conditionings have no words to write as an embedding. Mine them in the form of words"
        )
    _check_numbers(dark.words)
    title = {
        "modelspec.title": f"Dark embedding: {dark.concept}"[:200],
        "modelspec.implementation": "ComfyUI Concept Erasure",
    }
    return [
        write(Path(folder) / f"{name}-{i + 1}.safetensors", {t: _plain(x[i]) for t, x in dark.words.items()}, title)
        for i in range(len(dark))
    ]


def _plain(x: Tensor) -> Tensor:
    return x.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format)


def _check_numbers(tensors: Mapping[str, Tensor]) -> None:
    for name, x in tensors.items():
        if not torch.isfinite(x).all():
            raise FileError(
                f"dark embeddings: {name} has values that are not numbers (NaN or infinite). Mine them again"
            )


def _names(present: set[str]) -> str:
    return ", ".join(sorted(present)[:5])[:200]
