"""The text encoder against transformers' CLIP, and its gradient against differences."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from erasure_core.emojicanvas.text import TextConfig as DemoConfig
from erasure_core.text_encoder import Activation, SideBySide, TextConfig, TextEncoder

pytestmark = pytest.mark.core
SIZES = {"vocabulary": 99, "length": 12, "inner": 40}
L_LIKE = TextConfig(24, 3, 4, Activation.QUICK_GELU, **SIZES)
G_LIKE = TextConfig(40, 4, 5, Activation.GELU, skip=1, final_norm=False, **SIZES)


def weights_of(config: TextConfig, seed: int = 1) -> dict[str, Tensor]:
    """Random weights that leave nothing at the identity."""
    g = torch.Generator().manual_seed(seed)
    return {k: torch.randn(v.shape, generator=g) * 0.3 for k, v in TextEncoder(config).state_dict().items()}


def encoder_of(config: TextConfig, seed: int = 1) -> TextEncoder:
    return TextEncoder.from_weights(
        weights_of(config, seed), heads=config.heads, activation=config.activation, skip=config.skip,
        final_norm=config.final_norm,
    )  # fmt: skip


def ids_of(config: TextConfig, rows: int = 2) -> Tensor:
    return torch.randint(0, config.vocabulary, (rows, config.length), generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize(("config", "hidden"), [(L_LIKE, None), (G_LIKE, -2)], ids=["L", "G"])
def test_it_is_transformers_clip(config: TextConfig, hidden: int | None) -> None:
    transformers = pytest.importorskip("transformers")
    other = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=config.vocabulary,
            hidden_size=config.width,
            intermediate_size=config.inner,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            max_position_embeddings=config.length,
            hidden_act=config.activation.value,
        )
    ).eval()
    weights, ids = weights_of(config), ids_of(config)
    # transformers 5 dropped the prefix that all published files have
    bare = not any(k.startswith("text_model.") for k in other.state_dict())
    theirs = {k.removeprefix("text_model.") if bare else k: v for k, v in weights.items()}
    missing, unexpected = other.load_state_dict(theirs, strict=False)
    assert not unexpected and not [k for k in missing if "position_ids" not in k]
    with torch.no_grad():
        out = other(ids, output_hidden_states=True)
        expected = out.last_hidden_state if hidden is None else out.hidden_states[hidden]
        assert torch.allclose(encoder_of(config)(ids), expected, atol=1e-5)


def test_sizes_are_read_from_the_weights() -> None:
    weights = {f"{k}": v.half() for k, v in weights_of(G_LIKE).items()} | {"text_projection.weight": torch.eye(40)}
    encoder = TextEncoder.from_weights(weights, heads=5, activation=Activation.GELU, skip=1, final_norm=False)
    assert encoder.config == G_LIKE
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in encoder.parameters())
    assert not encoder.training


def test_skipped_layers_are_not_read() -> None:
    changed = weights_of(G_LIKE)
    changed["text_model.encoder.layers.3.mlp.fc2.weight"] += 1
    changed["text_model.final_layer_norm.bias"] += 1
    other = TextEncoder.from_weights(changed, heads=5, activation=Activation.GELU, skip=1, final_norm=False)
    assert torch.equal(other(ids_of(G_LIKE)), encoder_of(G_LIKE)(ids_of(G_LIKE)))


def test_word_embeddings_stand_for_ids() -> None:
    encoder, ids = encoder_of(L_LIKE), ids_of(L_LIKE)
    assert torch.equal(encoder(embeddings=encoder.embed(ids)), encoder(ids))
    assert torch.allclose(encoder(ids[:, :5]), encoder(ids)[:, :5], atol=1e-6), "it is causal"


def test_gradients_reach_the_words() -> None:
    encoder = encoder_of(G_LIKE).double()
    words = encoder.embed(ids_of(G_LIKE, 1)).detach().requires_grad_()
    probe = torch.randn(words.shape, dtype=torch.float64)
    (slope,) = torch.autograd.grad((encoder(embeddings=words) * probe).sum(), words)
    step = torch.zeros_like(words)
    step[0, 4, 9] = 1e-6
    up, down = ((encoder(embeddings=words.detach() + s * step) * probe).sum() for s in (1, -1))
    assert float(up - down) / 2e-6 == pytest.approx(float(slope[0, 4, 9]), rel=1e-5)


def test_two_encoders_side_by_side() -> None:
    one, two = encoder_of(L_LIKE), encoder_of(G_LIKE, seed=2)
    both = SideBySide([one, two])
    ids = torch.stack([ids_of(L_LIKE), ids_of(G_LIKE).flip(1)], dim=-1)
    expected = torch.cat([one(ids[..., 0]), two(ids[..., 1])], dim=-1)
    assert torch.equal(both(ids), expected)
    assert torch.equal(both(embeddings=both.embed(ids)), expected)
    assert both.widths == [24, 40]


def test_a_header_gives_the_config_back() -> None:
    config = DemoConfig(**json.loads(json.dumps(asdict(DemoConfig(activation=Activation.GELU)))))
    assert config.activation is Activation.GELU and (config.width, config.layers, config.heads) == (128, 2, 4)


def test_what_is_no_text_encoder_is_refused() -> None:
    good = weights_of(L_LIKE)
    with pytest.raises(ValueError, match=r"isn't a CLIP text transformer"):
        TextEncoder.from_weights({"x": torch.zeros(1)}, heads=4, activation=Activation.GELU)
    del good["text_model.encoder.layers.1.self_attn.q_proj.bias"]
    with pytest.raises(ValueError, match=r"don't fit together.*q_proj"):
        TextEncoder.from_weights(good, heads=4, activation=Activation.GELU)
    with pytest.raises(ValueError, match=r"3 of 3 layers can't be skipped"):
        TextEncoder(TextConfig(24, 3, 4, skip=3))
    with pytest.raises(ValueError, match=r"ids or word embeddings"):
        encoder_of(L_LIKE)()
