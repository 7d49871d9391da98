"""CLIP vision and text towers small enough to make up: random, and a pair that agrees on colours."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import comfy.clip_vision
import folder_paths
import torch

COLOURS = {
    "red": (1.0, 0.0, 0.0), "green": (0.0, 0.6, 0.0), "blue": (0.0, 0.0, 1.0), "yellow": (1.0, 1.0, 0.0),
    "black": (0.0, 0.0, 0.0), "white": (1.0, 1.0, 1.0), "orange": (1.0, 0.5, 0.0), "purple": (0.5, 0.0, 0.5),
}  # fmt: skip
SIDE = 32


ANYTHING = "a rose"
"""Of all other texts the projection makes something else on each machine."""


class TinyVision:
    """A CLIP_VISION with random weights and features of a given width."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("CLIP_VISION",)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"width": ("INT", {})}})

    def run(self, width):
        small = dict(
            hidden_act="quick_gelu", hidden_size=32, image_size=SIDE, intermediate_size=64, num_attention_heads=2
        )
        small |= dict(
            model_type="clip_vision_model", num_channels=3, num_hidden_layers=2, patch_size=8, projection_dim=width
        )
        config = Path(folder_paths.get_temp_directory()) / "tiny_vision.json"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(json.dumps(small))
        vision = comfy.clip_vision.ClipVisionModel(str(config))
        generator = torch.Generator().manual_seed(1)
        made = {k: torch.randn(v.shape, generator=generator) * 0.2 for k, v in vision.model.state_dict().items()}
        made |= {
            k: torch.ones_like(v) for k, v in made.items() if k.endswith("weight") and ("norm" in k or "layrnorm" in k)
        }
        vision.load_sd(made)
        return (vision,)


class AgreeingText:
    """A CLIP whose text projection takes what the judge says of colours to what the vision tower sees of them, and one prompt
    to what is common to all."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("CLIP",)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"clip_vision": ("CLIP_VISION",)}})

    def run(self, clip_vision):
        demo = next(m for name, m in list(sys.modules.items()) if name.endswith("concept-erasure.nodes.demo"))
        _, clip, _ = demo.load_demo()
        plain = torch.tensor(list(COLOURS.values()))[:, None, None, :].expand(-1, SIDE, SIDE, -1)
        seen = clip_vision.encode_image(plain)["image_embeds"].float()
        texts = [f"a picture of {words}{c}" for words in ("the plain colour ", "") for c in COLOURS]
        texts.append(ANYTHING)
        read = torch.cat(
            [clip.encode_from_tokens(clip.tokenize(t), return_pooled="unprojected")[1] for t in texts]
        ).float()
        projection = torch.linalg.lstsq(
            read.double(), torch.cat([seen, seen, seen.mean(0, keepdim=True)]).double(), driver="gelsd"
        ).solution.mT.float()
        # In full precision: seventeen texts that a small tower hardly tells apart leave large numbers here.
        clip.cond_stage_model.clip_l.transformer.text_projection.weight = torch.nn.Parameter(
            projection, requires_grad=False
        )
        return (clip,)


class Plain:
    """Two IMAGEs of one colour."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("IMAGE",)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"colour": ("STRING", {}), "shift": ("FLOAT", {})}})

    def run(self, colour, shift):
        one = torch.tensor(COLOURS[colour]).expand(1, 40, 40, 3)
        return (torch.cat([one, (one + shift).clamp(0, 1)]),)


NODES = (TinyVision, AgreeingText, Plain)
