"""What a method sees of a model.

A *port* wraps a loaded model (in ComfyUI, diffusers, or plain torch) behind a few operations. Methods and attacks are
written against this protocol only, so each of them runs on every host.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


class Role(StrEnum):
    """What a linear layer does in an attention block."""

    TEXT_KEY = "text_key"
    """Reads text states into the keys of cross-attention."""
    TEXT_VALUE = "text_value"
    """Reads text states into the values of cross-attention."""
    OTHER = "other"
    """Any other linear layer of a transformer block; :meth:`ModelPort.sites` never lists these."""


class Prediction(StrEnum):
    """What the network is trained to predict."""

    EPS = "eps"
    V = "v"
    FLOW = "flow"


class TokenKind(IntEnum):
    """What a row of the text states belongs to."""

    BOS = 0
    CONTENT = 1
    EOS = 2
    """The first end-of-text token."""
    PAD = 3
    """Everything behind it."""


@dataclass(frozen=True)
class Site:
    """One editable weight matrix ``[d_out, d_in]`` (no bias; it acts as ``W c``).

    ``name`` is its path in the original checkpoint's naming, without prefix and ``.weight``, e.g.
    ``input_blocks.1.1.transformer_blocks.0.attn2.to_k``. It is the same in every port of a model.
    """

    name: str
    role: Role
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Family:
    """Which models an erasure fits. ``context_dim`` is the width D of the text states."""

    name: str
    context_dim: int
    num_res_blocks: int
    levels: int

    def __str__(self) -> str:
        return f"{self.name} (text width {self.context_dim})"


FAMILIES = {768: "sd15", 1024: "sd20", 1280: "sdxl-refiner", 2048: "sdxl"}
"""Names of Stable Diffusion's families by the width of their text states."""


@dataclass(frozen=True)
class TextStates:
    """The encoding of one prompt: ``states`` [L, D] and the :class:`TokenKind` of each row, ``kinds`` [L]."""

    prompt: str
    states: Tensor
    kinds: Tensor

    def __post_init__(self) -> None:
        if self.states.ndim != 2 or self.kinds.shape != self.states.shape[:1]:
            raise ValueError(
                f"text states of {self.prompt!r}: expected [L, D] and [L], "
                f"got {tuple(self.states.shape)} and {tuple(self.kinds.shape)}"
            )


@runtime_checkable
class ModelPort(Protocol):
    """A text-to-image model as methods see it. All tensors handed out are ordinary (no inference tensors)."""

    family: Family
    prediction: Prediction

    def sites(self) -> Sequence[Site]:
        """The cross-attention matrices that read the text, in network order. Empty where the model has none."""
        ...

    def weight(self, site: Site) -> Tensor:
        """The effective weight of a site (user LoRAs included), float32 [d_out, d_in], on the compute device.

        The tensor is the caller's own: changing it never changes the model.
        """
        ...

    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        """Encode prompts with the model's own text encoder, unweighted. One entry per prompt."""
        ...

    def predict(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """The network's raw prediction in the parameterisation ``self.prediction``.

        z [B, C, h, w] noisy latent in variance-preserving form, t [B] in 0..999, context [B, L, D].
        """
        ...


def token_kinds(ids: Sequence[int], *, bos: int | None, eos: int) -> Tensor:
    """[L] kinds of a padded chunk of token ids: BOS, content, the first EOS, then padding.

    Works for tokenizers that pad with EOS (CLIP-L), with another id (SD2's ``!``, SDXL's 0), or not at all.
    """
    kinds, ended = [], False
    for i, token in enumerate(ids):
        if ended:
            kinds.append(TokenKind.PAD)
        elif i == 0 and bos is not None and token == bos:
            kinds.append(TokenKind.BOS)
        elif token == eos:
            kinds.append(TokenKind.EOS)
            ended = True
        else:
            kinds.append(TokenKind.CONTENT)
    return torch.tensor(kinds, dtype=torch.int8)
