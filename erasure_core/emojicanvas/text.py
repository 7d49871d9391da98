"""EmojiCanvas's text side: CLIP's byte-pair tokens, and the core's text transformer at its own size."""

from __future__ import annotations

import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .. import text_encoder

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
class TextConfig(text_encoder.TextConfig):
    """EmojiCanvas's own size."""

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


class TextEncoder(text_encoder.TextEncoder):
    """states [B, 77, D] = TextEncoder()(token ids [B, 77])."""

    def __init__(self, config: text_encoder.TextConfig | None = None) -> None:
        super().__init__(config or TextConfig())
