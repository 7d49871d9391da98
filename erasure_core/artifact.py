"""The Erasure: named weight changes with a typed header. Every method yields one; every host applies it."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .concept import ConceptSpec
from .devices import moved
from .port import Family, ModelPort, Role, Site

if TYPE_CHECKING:
    from .receipt import Receipt


@dataclass(frozen=True)
class Delta:
    """A weight change ``up @ down``: up [d_out, r], down [r, d_in]. ``down is None`` marks a dense change in ``up``."""

    up: Tensor
    down: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of the weight that it changes."""
        return self.up.shape[0], (self.up if self.down is None else self.down).shape[1]

    @property
    def rank(self) -> int:
        """Columns of the low-rank factor; min(d_out, d_in) for a dense change."""
        return min(self.shape) if self.down is None else self.up.shape[1]

    def dense(self) -> Tensor:
        """The change itself, [d_out, d_in]."""
        return self.up if self.down is None else self.up @ self.down

    def factored(self) -> Delta:
        """The same change as two factors, exactly: a dense one beside an identity on its shorter side."""
        if self.down is not None:
            return self
        d_out, d_in = self.shape
        identity = torch.eye(min(d_out, d_in), dtype=self.up.dtype, device=self.up.device)
        return Delta(self.up, identity) if d_in <= d_out else Delta(identity, self.up)

    def on(self, device: torch.device, dtype: torch.dtype) -> Delta:
        """The same on a device and in a type."""
        return Delta(moved(self.up, device, dtype), None if self.down is None else moved(self.down, device, dtype))

    def scaled(self, strength: float) -> Delta:
        return Delta(self.up * strength, self.down)


@dataclass(frozen=True)
class Header:
    """What an erasure says of itself; stored as JSON in the file's metadata."""

    method: str
    settings: Mapping[str, Any]
    spec: ConceptSpec
    family: Family
    base: str
    """Fingerprint of the weights that it was computed on."""
    version: str
    strength: float = 1.0
    unread: tuple[str, ...] = ()
    """Inputs of the request that the method made no use of: nothing of them was held. Merging and receipts still go by them."""


@dataclass(frozen=True)
class Erasure:
    """Weight changes by site name, and the header. Immutable; tensors are float32 on the CPU unless a test asks for more."""

    header: Header
    deltas: Mapping[str, Delta] = field(repr=False)
    receipt: Receipt | None = field(default=None, repr=False)
    """What was measured of exactly this change. Whatever makes another change of it, scaling too, leaves it behind."""

    def scaled(self, strength: float) -> Erasure:
        """The same erasure at another strength: 0 changes nothing, 1 is as computed."""
        header = replace(self.header, strength=self.header.strength * strength)
        return Erasure(header, {name: d.scaled(strength) for name, d in self.deltas.items()})

    def check_fits(self, sites: Mapping[str, Site] | list[Site]) -> None:
        """Raise where this erasure was made for another kind of model.

        Raises:
            WrongModelError: names both models.
        """
        every = list(sites.values() if isinstance(sites, Mapping) else sites)
        shapes = {s.name: (s.d_out, s.d_in) for s in every}
        wrong = [n for n, d in self.deltas.items() if shapes.get(n) != d.shape]
        if wrong:
            width = next((s.d_in for s in every if s.role is not Role.OTHER), None)
            model = f"a model with text width {width}" if width else "a model without text cross-attention"
            if width == self.header.family.context_dim:
                model += ", whose layers are others"
            raise WrongModelError(
                f"erasure: it was made for {self.header.family}, but this is {model}: {len(wrong)} of "
                f"{len(self.deltas)} weights do not fit, first {wrong[0]}. Erase the concept on this model instead"
            )

    def summary(self, unsure: Collection[str] = ()) -> str:
        """One paragraph for people: what, how, on what, how large; ``unsure`` are words that a text encoder may not know."""
        h = self.header
        read = h.spec.without(h.unread)
        erased = in_words(read, unsure)
        ranks = sorted({d.rank for d in self.deltas.values()})
        span = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}" if ranks else "0"
        kept = f"; kept: {read.kept}" if read.kept else ""
        summed = h.settings.get("summed", 0)
        added = f", {summed} of them, which do not read text, added up" if summed else ""
        numbers = sum(f.numel() for d in self.deltas.values() if d.rank for f in (d.up, d.down) if f is not None)
        return (
            f"suppressed: {erased}{kept}\nmethod: {h.method}; made for {h.family}; "
            f"{len(self.deltas)} weights{added}, rank {span}, {_megabytes(2 * numbers)} as a file in half precision; "
            f"strength {h.strength:g}; library {h.version}"
        )


def in_words(spec: ConceptSpec, unsure: Collection[str] = ()) -> str:
    """What ``spec`` erases, for people."""
    shown = {word: f"{word} (if the text encoder knows it)" for word in unsure}
    return "; ".join(
        ", ".join(shown.get(word, word) for word in c.words) + (f" -> {c.to}" if c.to else "") for c in spec.erase
    )


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2g} MB" if size < 10e6 else f"{size / 1e6:.0f} MB"


def digest(deltas: Mapping[str, Delta]) -> str:
    """SHA-256 of all changes, in hex: names, shapes and float32 numbers of the factors; those of rank 0 don't count.

    It tells the same numbers from others, whatever file they come from. It can't tell that two pairs of factors have one
    product, and it is no signature: who changes a file can compute it anew.
    """
    seen = hashlib.sha256()
    for name, delta in sorted(deltas.items()):
        if delta.rank:
            seen.update(f"{name}\n".encode())
            for factor in (delta.up, delta.down):
                if factor is not None:
                    seen.update(f"{tuple(factor.shape)}\n".encode())
                    seen.update(factor.detach().cpu().contiguous().float().numpy().astype("<f4", copy=False).data)
    return seen.hexdigest()


class WrongModelError(ValueError):
    """An erasure and a model don't belong together."""


class Fingerprint:
    """64 bits that recognise a model by the weights that read its text, whatever precision they are stored in.

    Each matrix is cut into 64 pieces; a bit says whether the piece's mean, summed over all matrices with a random sign
    each, lies above the average. Rounding the weights flips a bit now and then (never the meaning: compare with
    :func:`same_base`); a model that was trained apart flips half of them, a finetune hardly any: it counts as the same base.
    It is not a checksum against tampering.
    """

    BITS = 64

    def __init__(self) -> None:
        self._sums = torch.zeros(self.BITS, dtype=torch.float64)

    def update(self, site: Site, weight: Tensor) -> None:
        flat = weight.detach().float().flatten()
        if flat.numel() % self.BITS:
            pieces = flat.tensor_split(self.BITS)
            means = torch.stack([p.mean() if p.numel() else flat.new_zeros(()) for p in pieces])
        else:  # the same, faster
            means = flat.view(self.BITS, -1).mean(1)
        means = means.cpu().double()
        word = int.from_bytes(hashlib.sha256(site.name.encode()).digest()[:8], "big")
        signs = torch.tensor([1.0 if word >> i & 1 else -1.0 for i in range(self.BITS)], dtype=torch.float64)
        centred = means - means.mean()
        self._sums += signs * centred / centred.norm().clamp_min(1e-30)

    def hexdigest(self) -> str:
        return f"{sum(1 << i for i, s in enumerate(self._sums.tolist()) if s > 0):016x}"


_SAMPLED = 4096


def weights_digest(port: ModelPort) -> str:
    """SHA-256 of up to 4096 numbers, evenly spread, of every linear layer that an erasure may change.

    Where :class:`Fingerprint` recognises a model through small changes, this tells a model from itself at another strength.
    It is the same only where the weights were computed on one kind of machine.
    """
    seen = hashlib.sha256()
    for site in getattr(port, "linears", port.sites)():
        flat = port.weight(site).detach().flatten()
        some = flat[:: max(1, flat.numel() // _SAMPLED)].float().cpu().contiguous()
        seen.update(f"{site.name}\n".encode())
        seen.update(some.numpy().astype("<f4", copy=False).data)
    return seen.hexdigest()


def same_base(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model or its finetunes, in whatever precision they are stored."""
    try:
        return (int(one, 16) ^ int(other, 16)).bit_count() <= 4
    except ValueError:
        return False
