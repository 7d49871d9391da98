"""ComfyUI's CLIP as a text encoder that carries gradients: its weights, LoRAs on it included, in the core's own transformer.

ComfyUI's own transformer adds in place, so nothing can be learned through it.
"""

from __future__ import annotations

from collections.abc import Sequence

import comfy.model_management as mm
import torch
from torch import Tensor

from ..erasure_core.attacks import Words
from ..erasure_core.emojicanvas.concepts import caption_words
from ..erasure_core.mining import PseudoWords
from ..erasure_core.operators.search import EmbeddingEncoder, TokenSlot
from ..erasure_core.text_encoder import Activation, SideBySide, TextEncoder
from .modes import host_mode
from .replica import effective

_TOWERS = ("clip_l", "clip_g", "clip_h")
"""In the order in which SDXL lays their states end to end."""
_PROMPT, _PLACE = "a picture of", "thing"
_EOS = 49407
_ALIKE = 0.02
"""Half precision comes to less."""


def tower_names(clip) -> list[str]:
    """Names of the text towers of a CLIP.

    Raises:
        ValueError: it isn't one of Stable Diffusion's.
    """
    names = [name for name in _TOWERS if hasattr(clip.cond_stage_model, name)]
    if not names:
        raise ValueError(
            "clip: this text encoder isn't the CLIP of Stable Diffusion, so no words can be searched in it"
        )
    return names


def encoder_of(clip) -> EmbeddingEncoder:
    """The text encoder as the model reads it (clip skip included), float32 and frozen, on the compute device.

    Raises:
        ValueError: it isn't one of Stable Diffusion's.
    """
    towers = [_tower(clip, name) for name in tower_names(clip)]
    return towers[0] if len(towers) == 1 else SideBySide(towers)


def _tower(clip, name: str) -> TextEncoder:
    device, prefix = mm.get_torch_device(), f"{name}.transformer."
    found = clip.patcher.get_key_patches(prefix)
    weights = {k.removeprefix(prefix): effective(entry, k, device) for k, entry in found.items() if "text_model." in k}
    tower = getattr(clip.cond_stage_model, name)
    first = tower.transformer.text_model.encoder.layers[0]
    skip, final_norm = _read_out(tower, clip.layer_idx)
    return TextEncoder.from_weights(
        weights,
        heads=first.self_attn.heads,
        activation=_activation(first.mlp.activation),
        skip=skip,
        final_norm=final_norm,
    ).to(device)


def _read_out(tower, layer_idx: int | None) -> tuple[int, bool]:
    """(layers skipped at the end, whether the last norm is applied), as ``SDClipModel`` decides it from CLIP Set Last Layer."""
    layer, index = tower.options_default[:2]
    if layer_idx is not None:
        layer, index = ("last", None) if abs(layer_idx) > tower.num_layers else ("hidden", layer_idx)
    if layer == "last":
        return 0, True
    return (-1 - index if index < 0 else tower.num_layers - 1 - index), tower.layer_norm_hidden_state


def _activation(function) -> Activation:
    """ComfyUI keeps the function only; at 1 the two differ by 0.004."""
    one = torch.ones(1)
    return min(Activation, key=lambda a: abs(float(function(one)) - float(a(one))))


def tokens_of(clip, prompts: Sequence[str]) -> Tensor:
    """Ids of short prompts as each tower pads them: [N, L], or [N, L, T] for T towers.

    Raises:
        ValueError: a prompt is longer than one section, or names an embedding.
    """
    rows = []
    for prompt in prompts:
        mm.throw_exception_if_processing_interrupted()
        sections = clip.tokenize(prompt)
        if any(len(s) != 1 or any(not isinstance(w[0], int) for w in s[0]) for s in sections.values()):
            raise ValueError(f"prompt: {prompt[:60]!r} is too long, or contains an embedding")
        columns = [[w[0] for w in sections[name.removeprefix("clip_")][0]] for name in tower_names(clip)]
        rows.append(columns[0] if len(columns) == 1 else [list(x) for x in zip(*columns, strict=True)])
    return torch.tensor(rows)


_MARKUP = set("()\\")
"""ComfyUI reads weights from these rather than words."""
_typeable: dict[int, Tensor] = {}
"""Ids of the tokens that a person can type, by vocabulary: trying each of them takes a second or two."""


def words_of(clip, family: str = "") -> Words:
    """The text side of a CLIP for attacks on prompts, of which the demo model's knows the words of its captions only. Weights
    in brackets count as 1.

    Raises:
        ValueError: it isn't one of Stable Diffusion's encoders.
    """
    encoder = encoder_of(clip)
    tokenizer = getattr(clip.tokenizer, tower_names(clip)[0])
    vocabulary = tokenizer.tokenizer.get_vocab()

    def tokenize(prompts: Sequence[str]) -> Tensor:
        return tokens_of(clip, prompts)

    def decode(ids: Sequence[int]) -> str:
        text: str = tokenizer.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
        return text

    bos, eos, which = tokenizer.start_token, tokenizer.end_token, hash(frozenset(vocabulary.items()))
    if which not in _typeable:
        whole = Words.typeable(encoder, tokenize, decode, bos, eos, len(vocabulary)).vocabulary
        plain = [(text := decode([i])).isprintable() and not set(text) & _MARKUP for i in whole.tolist()]
        _typeable[which] = whole[torch.tensor(plain)]
    words = Words(encoder, tokenize, decode, bos, eos, _typeable[which])
    return words.among(caption_words()) if family == "emojicanvas" else words


def pseudo_words(clip, count: int) -> PseudoWords:
    """``count`` places for pseudo-words behind "a picture of".

    Raises:
        ValueError: it isn't one of Stable Diffusion's encoders, or something in it makes it read differently.
    """
    encoder, prompt = encoder_of(clip), " ".join([_PROMPT, *[_PLACE] * count])
    ids = tokens_of(clip, [prompt])
    with host_mode():
        own = clip.encode_from_tokens(clip.tokenize(prompt))
    own = own.clone().float().cpu()
    made = encoder(ids.to(mm.get_torch_device())).cpu()
    if made.shape != own.shape or float((made - own).norm()) > _ALIKE * float(own.norm()):
        raise ValueError(
            "clip: another node changed how it reads, and words can't be searched through that. Use the form free"
        )
    first = ids[0] if ids.ndim == 2 else ids[0, :, 0]
    end = first.tolist().index(_EOS, 1)
    slot = TokenSlot(encoder, ids.to(mm.get_torch_device()), range(end - count, end))
    widths = encoder.widths if isinstance(encoder, SideBySide) else [encoder.embed(slot.ids).shape[-1]]
    return PseudoWords(slot, dict(zip(tower_names(clip), widths, strict=True)))
