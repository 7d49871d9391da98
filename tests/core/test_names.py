"""The names of one weight in three worlds, against the known layouts of SD 1.5, SDXL and EmojiCanvas."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from erasure_core import Family
from erasure_core.names import from_diffusers, to_comfy, to_diffusers, to_kohya, to_peft

pytestmark = pytest.mark.core
SD15, SDXL, EMOJI = Family("sd15", 768, 2, 4), Family("sdxl", 2048, 2, 3), Family("emojicanvas", 128, 1, 3)
LEAF = "transformer_blocks.0.attn2.to_k"
PAIRS = {
    "sd15": (
        SD15,
        "1=0.0 2=0.1 4=1.0 5=1.1 7=2.0 8=2.1",
        "3=1.0 4=1.1 5=1.2 6=2.0 7=2.1 8=2.2 9=3.0 10=3.1 11=3.2",
    ),
    "sdxl": (SDXL, "4=1.0 5=1.1 7=2.0 8=2.1", "0=0.0 1=0.1 2=0.2 3=1.0 4=1.1 5=1.2"),
    "emojicanvas": (EMOJI, "3=1.0 5=2.0", "0=0.0 1=0.1 2=1.0 3=1.1"),
}


def table(family: str) -> list[tuple[str, str]]:
    """(original, diffusers) for every attention block, written down from the published state dicts."""
    _, down, up = PAIRS[family]
    out = [("middle_block.1", "mid_block.attentions.0")]
    for side, blocks, pairs in (("input", "down", down), ("output", "up", up)):
        for pair in pairs.split():
            index, place = pair.split("=")
            level, number = place.split(".")
            out.append((f"{side}_blocks.{index}.1", f"{blocks}_blocks.{level}.attentions.{number}"))
    return out


@pytest.mark.parametrize("family", list(PAIRS))
def test_known_names_both_ways(family: str) -> None:
    pairs = table(family)
    assert len(pairs) == {"sd15": 16, "sdxl": 11, "emojicanvas": 7}[family]
    for original, diffusers in pairs:
        assert to_diffusers(f"{original}.{LEAF}", PAIRS[family][0]) == f"{diffusers}.{LEAF}"
        assert from_diffusers(f"{diffusers}.{LEAF}", PAIRS[family][0]) == f"{original}.{LEAF}"


def test_emojicanvas_names_are_those_of_its_network() -> None:
    from erasure_core.emojicanvas.unet import UNet

    keys = [
        k.removesuffix(".weight") for k in UNet().state_dict() if k.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
    ]
    places = {k.rsplit(".transformer_blocks", 1)[0] for k in keys}
    assert places == {original for original, _ in table("emojicanvas")}
    for key in keys:
        assert from_diffusers(to_diffusers(key, EMOJI), EMOJI) == key


def test_names_in_lora_files() -> None:
    site = "input_blocks.4.1." + LEAF
    assert to_kohya(site, SD15) == "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    assert to_kohya(site, SDXL) == "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    assert to_peft(site, SDXL) == "unet.down_blocks.1.attentions.0." + LEAF
    assert to_comfy(site) == "diffusion_model." + site
    assert (
        to_kohya("middle_block.1." + LEAF, SD15) == "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k"
    )


@given(st.sampled_from(["input", "output"]), st.integers(1, 200), st.integers(1, 6))
def test_one_name_each(side: str, index: int, res_blocks: int) -> None:
    family = Family("x", 8, res_blocks, 4)
    site = f"{side}_blocks.{index}.1.{LEAF}"
    assert from_diffusers(to_diffusers(site, family), family) == site


@pytest.mark.parametrize(
    "name",
    [
        "",
        "input_blocks.4.0.x",
        "time_embed.0",
        "middle_block.0.x",
        "input_blocks.x.1.y",
        "double_blocks.3.img_attn.qkv",
    ],
)
def test_other_weights_have_no_such_name(name: str) -> None:
    with pytest.raises(ValueError, match="is not the name of an attention weight"):
        to_diffusers(name, SD15)
    with pytest.raises(ValueError, match="is not the name of an attention weight"):
        from_diffusers(name, SD15)
