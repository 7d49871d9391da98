"""CLIP's text side in plain torch: byte-pair tokens and a causal transformer that carries gradients.

Parameter names follow the CLIP-L files, so one file of weights serves this class and ComfyUI's ``SD1ClipModel``.
(ComfyUI's own transformer adds in place and can't be differentiated.)
"""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

BOS, EOS, VOCABULARY, LENGTH = 49406, 49407, 49408, 77
_MERGES = Path(__file__).parent / "weights" / "clip_bpe_merges.txt.gz"


@cache
def _byte_pair_encoder():
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    lines = gzip.decompress(_MERGES.read_bytes()).decode("utf-8").splitlines()[1:]
    merges = [(a, b) for a, b in (line.split() for line in lines if line)]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=_byte_order)
    tokens = [
        *alphabet,
        *(c + "</w>" for c in alphabet),
        *(a + b for a, b in merges),
        "<|startoftext|>",
        "<|endoftext|>",
    ]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    encoder = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
    )
    encoder.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"""'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+""")
    encoder.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    encoder.decoder = decoders.ByteLevel()
    return encoder


def _byte_order(char: str) -> tuple[int, int]:
    """CLIP lists printable bytes first, in their own order, then the others."""
    printable = "!" <= char <= "~" or "¡" <= char <= "¬" or "®" <= char <= "ÿ"
    return (0 if printable else 1, ord(char))


def tokenize(prompts: Sequence[str]) -> Tensor:
    """[N, 77] token ids: BOS, words, EOS, padded with EOS; longer prompts are cut at 75 words."""
    rows = []
    for encoding in _byte_pair_encoder().encode_batch(list(prompts), add_special_tokens=False):
        ids = [BOS, *encoding.ids[: LENGTH - 2], EOS]
        rows.append(ids + [EOS] * (LENGTH - len(ids)))
    return torch.tensor(rows, dtype=torch.long).reshape(len(rows), LENGTH)


@dataclass(frozen=True)
class TextConfig:
    width: int = 128
    layers: int = 2
    heads: int = 4

    def comfy(self) -> dict:
        """The same network in the words of ComfyUI's ``clip_l_model_config``."""
        return {
            "hidden_size": self.width,
            "intermediate_size": 4 * self.width,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
        }


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
    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(h * torch.sigmoid(1.702 * h))


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn, self.mlp = _Attention(width, heads), _MLP(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class _Embeddings(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCABULARY, width)
        self.position_embedding = nn.Embedding(LENGTH, width)


class _Encoder(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer(config.width, config.heads) for _ in range(config.layers))


class _TextModel(nn.Module):
    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        self.embeddings = _Embeddings(config.width)
        self.encoder = _Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.width)


class TextEncoder(nn.Module):
    """states [B, 77, D] = TextEncoder(config)(token ids [B, 77])."""

    def __init__(self, config: TextConfig | None = None) -> None:
        super().__init__()
        self.config = config or TextConfig()
        self.text_model = _TextModel(self.config)

    def embed(self, ids: Tensor) -> Tensor:
        """Word embeddings [B, 77, D], before positions are added."""
        return self.text_model.embeddings.token_embedding(ids)

    def forward(self, ids: Tensor | None = None, *, embeddings: Tensor | None = None) -> Tensor:
        x = self.embed(ids) if embeddings is None else embeddings
        x = x + self.text_model.embeddings.position_embedding.weight[: x.shape[1]]
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        return self.text_model.final_layer_norm(x)
