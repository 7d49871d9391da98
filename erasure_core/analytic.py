"""A model small enough to reason about: random words, one cross-attention per level, exact in float64.

For tests of methods and for trying the library without weights.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from .port import Family, Prediction, Role, Site, TextStates, TokenKind


class AnalyticPort:
    """A :class:`ModelPort` of ``blocks`` cross-attentions over [L, D] text states.

    A word's vector depends on the word; a row adds a trace of the words before it, as in a causal encoder. The network
    predicts noise as the value that a query (the latent's mean, per block) reads from the text.
    """

    prediction = Prediction.EPS

    def __init__(
        self, width: int = 48, blocks: int = 4, outputs: Sequence[int] = (32, 64), length: int = 12, seed: int = 0
    ) -> None:
        self.family = Family("analytic", width, 1, max(1, (blocks + 1) // 2))
        self.length = length
        generator = torch.Generator().manual_seed(seed)
        self._sites, self._weights = [], {}
        for block in range(blocks):
            d_out = outputs[block % len(outputs)]
            for role, leaf in ((Role.TEXT_KEY, "to_k"), (Role.TEXT_VALUE, "to_v")):
                name = f"input_blocks.{2 * block + 1}.1.transformer_blocks.0.attn2.{leaf}"
                self._sites.append(Site(name, role, width, d_out))
                self._weights[name] = torch.randn(d_out, width, dtype=torch.float64, generator=generator) / width**0.5

    def sites(self) -> Sequence[Site]:
        return list(self._sites)

    def weight(self, site: Site) -> Tensor:
        return self._weights[site.name].clone()

    def _word(self, word: str) -> Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:6], "big")
        return torch.randn(self.family.context_dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        return [self._encode(p) for p in prompts]

    def _encode(self, prompt: str) -> TextStates:
        words = prompt.lower().split()[: self.length - 2]
        kinds = [TokenKind.BOS, *[TokenKind.CONTENT] * len(words), TokenKind.EOS]
        kinds += [TokenKind.PAD] * (self.length - len(kinds))
        vectors = [self._word("<bos>") * 5, *(self._word(w) for w in words)]
        vectors += [self._word(f"<end {i}>") for i in range(self.length - len(vectors))]
        states = torch.stack(vectors)
        before = torch.cumsum(states[1:], 0) / torch.arange(1, self.length, dtype=states.dtype)[:, None]
        return TextStates(prompt, torch.cat([states[:1], states[1:] + before]), torch.tensor(kinds, dtype=torch.int8))

    def predict(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        out = torch.zeros_like(z)
        for k_site, v_site in zip(self._sites[::2], self._sites[1::2], strict=True):
            keys, values = context @ self._weights[k_site.name].T, context @ self._weights[v_site.name].T
            query = z.mean((1, 2, 3))[:, None, None] + torch.ones(1, 1, keys.shape[-1], dtype=keys.dtype)
            read = torch.softmax(query @ keys.mT / keys.shape[-1] ** 0.5, -1) @ values
            out = out + read.mean((1, 2))[:, None, None, None] * (1 + t.view(-1, 1, 1, 1) / 1000)
        return out
