"""CLIP's text transformer in plain torch, which carries gradients to word embeddings (ComfyUI's adds in place).

Radford et al., arXiv:2103.00020. Parameter names are those of the published files (``text_model...``), so one file of
weights serves this class, transformers' ``CLIPTextModel`` and ComfyUI's ``SDClipModel``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


class Activation(StrEnum):
    QUICK_GELU = "quick_gelu"
    """x sigmoid(1.702 x): CLIP-L."""
    GELU = "gelu"
    """OpenCLIP-H and -G."""

    def __call__(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x) if self is Activation.QUICK_GELU else F.gelu(x)


@dataclass(frozen=True)
class TextConfig:
    """Sizes, and what is read out: CLIP-L as Stable Diffusion 1.x uses it, unless said otherwise."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    activation: Activation = Activation.QUICK_GELU
    skip: int = 0
    """Layers left out at the end: ComfyUI's ``layer_idx`` -1 is 0, -2 (SD 2.x, SDXL, "clip skip 2") is 1."""
    final_norm: bool = True
    """Whether the states pass the last layer norm: not in SDXL."""
    inner: int = 0
    """Width inside the feed-forward layers; 0 is four times the width."""
    vocabulary: int = 49408
    length: int = 77

    def __post_init__(self) -> None:
        object.__setattr__(self, "activation", Activation(self.activation))  # a file's header has it as text


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            setattr(self, name, nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(proj(x), "b n (h d) -> b h n d", h=self.heads) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)"))


class _MLP(nn.Module):
    def __init__(self, width: int, inner: int, activation: Activation) -> None:
        super().__init__()
        self.activation = activation
        self.fc1, self.fc2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class _Layer(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(c.width), nn.LayerNorm(c.width)
        self.self_attn = _Attention(c.width, c.heads)
        self.mlp = _MLP(c.width, c.inner or 4 * c.width, c.activation)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(c.vocabulary, c.width)
        self.position_embedding = nn.Embedding(c.length, c.width)


class _Encoder(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(c) for _ in range(c.layers))


class _TextModel(nn.Module):
    def __init__(self, c: TextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(c)
        self.encoder = _Encoder(c)
        self.final_layer_norm = nn.LayerNorm(c.width)


class TextEncoder(nn.Module):
    """states [B, L, D] = TextEncoder(config)(token ids [B, L]), L at most ``config.length``."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        if not 0 <= config.skip < config.layers:
            raise ValueError(f"text encoder: {config.skip} of {config.layers} layers can't be skipped")
        self.config = config
        self.text_model = _TextModel(config)

    @classmethod
    def from_weights(
        cls,
        weights: Mapping[str, Tensor],
        *,
        heads: int,
        activation: Activation,
        skip: int = 0,
        final_norm: bool = True,
    ) -> TextEncoder:
        """A frozen float32 encoder; sizes are read from the weights. Other keys (projections, buffers) are passed over.

        Raises:
            ValueError: weights of a CLIP text transformer are missing, or of shapes that don't belong together.
        """
        words = weights.get("text_model.embeddings.token_embedding.weight")
        places = weights.get("text_model.embeddings.position_embedding.weight")
        first = weights.get("text_model.encoder.layers.0.mlp.fc1.weight")
        if words is None or places is None or first is None:
            raise ValueError("text encoder: this isn't a CLIP text transformer (no text_model.embeddings and layers)")
        layers = 1 + max(int(k.split(".")[3]) for k in weights if k.startswith("text_model.encoder.layers."))
        config = TextConfig(
            words.shape[1], layers, heads, activation, skip, final_norm, first.shape[0], words.shape[0], places.shape[0]
        )
        with torch.device("meta"):
            encoder = cls(config)
        used = {k: weights[k].detach().float() for k in encoder.state_dict() if k in weights}
        try:
            encoder.load_state_dict(used, assign=True)
        except RuntimeError as error:
            raise ValueError(
                f"text encoder: its weights don't fit together. {' '.join(str(error).split())[:300]}"
            ) from None
        return encoder.eval().requires_grad_(False)

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings [B, L, D], before positions are added."""
        return self.text_model.embeddings.token_embedding(ids)

    def forward(self, ids: Tensor | None = None, *, embeddings: Tensor | None = None) -> Tensor:
        """States of token ids [B, L], or of word embeddings [B, L, D] in their place.

        Raises:
            ValueError: neither is given.
        """
        if embeddings is None:
            if ids is None:
                raise ValueError("text encoder: give token ids or word embeddings")
            embeddings = self.embed(ids)
        x = embeddings + self.text_model.embeddings.position_embedding.weight[: embeddings.shape[1]]
        for layer in self.text_model.encoder.layers[: self.config.layers - self.config.skip]:
            x = layer(x)
        return self.text_model.final_layer_norm(x) if self.config.final_norm else x


class SideBySide(nn.Module):
    """Several encoders as one (SDXL reads CLIP-L's and CLIP-G's states end to end).

    ``ids`` [B, L, T] holds one column for each of the T encoders, which pad differently; embeddings and states are
    [B, L, D1 + D2 + ...] in the encoders' order.
    """

    def __init__(self, encoders: Sequence[TextEncoder]) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(encoders)
        self.widths = [e.config.width for e in encoders]

    def embed(self, ids: Tensor) -> Tensor:
        return torch.cat([e.embed(ids[..., i]) for i, e in enumerate(self.encoders)], dim=-1)

    def forward(self, ids: Tensor | None = None, *, embeddings: Tensor | None = None) -> Tensor:
        if embeddings is None:
            if ids is None:
                raise ValueError("text encoder: give token ids or word embeddings")
            embeddings = self.embed(ids)
        parts = embeddings.split(self.widths, dim=-1)
        return torch.cat([e(embeddings=x) for e, x in zip(self.encoders, parts, strict=True)], dim=-1)
