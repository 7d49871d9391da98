"""Prompt memory: a few learnable rows that cross-attention reads behind the text (KPOP, METHODS 2.1).

``K = W_k [context ; key]``, ``V = W_v [context ; value]``: the softmax then runs over L + m rows. The weights stay.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import torch
from torch import Tensor, nn

from ..artifact import Header, WrongModelError, in_words
from ..formats import FileError, Layout, header_json, header_text, opened, parse_header, read_tensor, write
from ..port import Family

MAX_ROWS = 1000
QUARTERS = 4
"""Strengths are whole quarters: they are counts of rows."""
_METADATA = "prompt_memory"
_KIND = "a prompt memory. If it is an erasure, use Load Erasure"


class Placement(StrEnum):
    """Which cross-attentions read the memory (the authors' ``mid``, ``midout``, ``inmidout``)."""

    MID = "mid"
    MIDOUT = "midout"
    ALL = "all"

    def covers(self, site: str) -> bool:
        """Whether the block that the weight ``site`` belongs to reads it."""
        blocks = {"mid": ("middle_block.",), "midout": ("middle_block.", "output_blocks."), "all": ("",)}
        return site.startswith(blocks[self.value])


class Mode(StrEnum):
    """What a memory does to pictures."""

    SUPPRESS = "suppress"
    """It pushes the concept away; the weights are the base model's."""
    KEY = "key"
    """It restores what an erasure hides."""


def quarters_of(strength: float) -> int:
    """0.25 -> 1, 1 -> 4.

    Raises:
        ValueError: a strength below zero, or that is no whole quarter.
    """
    quarters = round(strength * QUARTERS)
    if quarters < 0 or abs(quarters - strength * QUARTERS) > 1e-6:
        raise ValueError(f"strength: {strength:g} is not one of 0, 0.25, 0.5, 0.75, 1, ...: it counts rows in quarters")
    return quarters


def extended(context: Tensor, parts: Iterable[tuple[Tensor, int, int]]) -> Tensor:
    """Text states [B, L, D] with rows behind them, each part = (rows [m, D], length, quarters).

    ``length`` is how many text rows it was learned beside. ComfyUI makes prompts of unequal length equal by repeating
    them, and longer prompts have whole multiples of 77 rows: the rows are repeated as often, or their share of the softmax
    would drop. ``quarters`` / 4 is the strength: how many times the rows are there, which scales their odds against the
    text exactly (adding log strength to their logits). For fractions the text is repeated too, which changes nothing.
    """
    parts = [part for part in parts if part[2]]
    if not parts:
        return context
    copies = QUARTERS // math.gcd(QUARTERS, *(quarters for _, _, quarters in parts))
    pieces = [context] * copies
    for rows, length, quarters in parts:
        times = max(1, context.shape[1] // length) * quarters * copies // QUARTERS
        pieces.append(rows.to(context).repeat(times, 1).expand(context.shape[0], -1, -1))
    return torch.cat(pieces, dim=1)


class PromptMemory(nn.Module):
    """``key`` and ``value`` rows [m, D], appended to what ``attn2.to_k`` and ``attn2.to_v`` read; one pair for all blocks.

    With ``shared`` both are one tensor, so that they are an ordinary suffix of the text states. They start normal with
    deviation ``std``. ``length`` is how many rows an ordinary prompt has.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        placement: Placement,
        generator: torch.Generator,
        *,
        shared: bool,
        std: float = 0.02,
        length: int = 77,
    ) -> None:
        super().__init__()
        if not 1 <= rows <= MAX_ROWS:
            raise ValueError(f"memory: it needs 1 to {MAX_ROWS} rows, got {rows}")
        self.placement, self.length = placement, length
        self.key = nn.Parameter(torch.randn(rows, width, generator=generator) * std)
        self.value = self.key if shared else nn.Parameter(torch.randn(rows, width, generator=generator) * std)

    @classmethod
    def beside(
        cls, states: Tensor, rows: int, placement: Placement, generator: torch.Generator, *, shared: bool
    ) -> PromptMemory:
        """One that starts as rows of the text states [L, D] that it will be read beside, a tenth of their deviation off.

        Attention then gives at first almost what it gave without it. Random rows of any size disturb every picture, and
        training them mostly undoes that.
        """
        spread = 0.1 * float(states.std())
        memory = cls(rows, states.shape[1], placement, generator, shared=shared, std=spread, length=len(states))
        chosen = torch.linspace(1, len(states) - 1, rows).round().long()  # not the first, which every prompt leans on
        with torch.no_grad():
            for own in {id(x): x for x in (memory.key, memory.value)}.values():
                own.add_(states[chosen].to(own))
        return memory

    def extend(self, site: str, context: Tensor) -> Tensor:
        """[B, L, D] -> [B, L + m, D] where ``site`` (ending in to_k or to_v) is covered; else as it was."""
        if not self.placement.covers(site):
            return context
        return extended(context, [(self.key if site.endswith("to_k") else self.value, self.length, QUARTERS)])


@dataclass(frozen=True)
class SavedMemory:
    """A learned memory: rows ``key`` and ``value`` [m, D] float32 on the CPU, and what it is for.

    Of a key it is the secret, apart from the public weights.
    """

    header: Header
    """``method`` and ``settings`` say how it was learned, ``base`` on which weights."""
    mode: Mode
    placement: Placement
    length: int
    key: Tensor = field(repr=False)
    value: Tensor = field(repr=False)

    @classmethod
    def of(cls, memory: PromptMemory, header: Header, mode: Mode) -> SavedMemory:
        key, value = (x.detach().to("cpu", torch.float32, copy=True) for x in (memory.key, memory.value))
        return cls(header, mode, memory.placement, memory.length, key, value)

    def module(self) -> PromptMemory:
        """It as :meth:`TrainableModel.predict` reads it."""
        memory = PromptMemory(
            len(self.key), self.key.shape[1], self.placement, torch.Generator(), shared=False, length=self.length
        )
        with torch.no_grad():
            memory.key.copy_(self.key)
            memory.value.copy_(self.value)
        return memory.requires_grad_(False)

    def check_fits(self, family: Family) -> None:
        """Raise where it was learned for another kind of model.

        Raises:
            WrongModelError: names both.
        """
        if family != self.header.family:
            raise WrongModelError(
                f"memory: it was made for {self.header.family}, but this is {family}. Learn one on this model instead"
            )

    def summary(self, unsure: Collection[str] = ()) -> str:
        """One paragraph for people: what it does, how large, for what; a text encoder may not know ``unsure`` words."""
        h = self.header
        does = "suppressed while it is applied" if self.mode is Mode.SUPPRESS else "restored in the model that hides it"
        kept = f"; kept: {h.spec.kept}" if h.spec.kept else ""
        return (
            f"{does}: {in_words(h.spec, unsure)}{kept}\nmemory: {len(self.key)} rows, read by {_READ_BY[self.placement]}; "
            f"method: {h.method}; made for {h.family}; library {h.version}"
        )


_READ_BY = {
    Placement.MID: "the middle block",
    Placement.MIDOUT: "the middle and output blocks",
    Placement.ALL: "all blocks",
}


def save_memory(memory: SavedMemory, path: str | os.PathLike[str]) -> Path:
    """Write it as one small safetensors file: first beside ``path``, then in one move.

    Raises:
        FileError: rows that are not numbers, or the disk refuses. No half file is left.
    """
    rows = {"key": memory.key, "value": memory.value}
    if not all(torch.isfinite(x).all() for x in rows.values()):
        raise FileError("memory: it contains values that are not numbers (NaN or infinite). Learn it again")
    more = {"mode": memory.mode.value, "placement": memory.placement.value, "length": memory.length}
    header = json.loads(header_json(memory.header, [], Layout.LORA))
    metadata = {
        _METADATA: json.dumps({**header, **more}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"Prompt memory ({memory.mode.value}): {', '.join(c.name for c in memory.header.spec.erase)}"[:200],
        "modelspec.implementation": "ComfyUI Concept Erasure",
        "modelspec.description": memory.summary()[:2000],
    }  # fmt: skip
    return write(Path(path), {k: v.float().cpu().clone().contiguous() for k, v in rows.items()}, metadata)


def load_memory(path: str | os.PathLike[str]) -> SavedMemory:
    """Read a memory.

    Raises:
        FileError: missing, cut off, oversized, pickled, foreign, or rows that contradict the header.
    """
    path = Path(path)
    with opened(path) as f:
        text = header_text(f.metadata(), _METADATA, path, _KIND)
        header, _, _ = parse_header(text)
        more = json.loads(text)
        mode, placement, length = more.get("mode"), more.get("placement"), more.get("length")
        if mode not in list(Mode) or placement not in list(Placement):
            raise FileError(
                f"{path.name}: its mode or placement is unknown. Update Concept Erasure to read newer files"
            )
        if not isinstance(length, int) or isinstance(length, bool) or not 1 <= length <= 1 << 16:
            raise FileError(f"{path.name}: header: length must be a whole number of text rows")
        if set(f.keys()) != {"key", "value"}:
            raise FileError(f"{path.name}: a prompt memory holds the tensors 'key' and 'value' and no others")
        shapes = [list(f.get_slice(name).get_shape()) for name in ("key", "value")]
        if shapes[0] != shapes[1] or shapes[0][1:] != [header.family.context_dim] or not 1 <= shapes[0][0] <= MAX_ROWS:
            raise FileError(f"{path.name}: rows of shape {shapes[0]} and {shapes[1]} don't fit {header.family}")
        key, value = (read_tensor(f, name, 2, path) for name in ("key", "value"))
    return SavedMemory(header, Mode(mode), Placement(placement), length, key, value)


def read_memory_header(path: str | os.PathLike[str]) -> Header:
    """Only the header of a memory; cheap.

    Raises:
        FileError: missing, cut off, oversized, pickled or foreign.
    """
    path = Path(path)
    with opened(path) as f:
        return parse_header(header_text(f.metadata(), _METADATA, path, _KIND))[0]
