"""Load EmojiCanvas Demo: the small bundled model, in ComfyUI's own classes."""

from __future__ import annotations

from typing import Any

import comfy.latent_formats
import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy_api.latest import io

from ..erasure_core.emojicanvas.concepts import IMAGE_SIZE
from ..erasure_core.emojicanvas.judging import CanvasJudge
from ..erasure_core.emojicanvas.text import TextConfig
from ..erasure_core.emojicanvas.unet import UNetConfig
from ..erasure_core.emojicanvas.weights import BUNDLE
from .modes import ordinary_tensors
from .types import CATEGORY, Judge


class _DemoConfig(comfy.supported_models_base.BASE):
    unet_config: dict[str, Any] = {}
    unet_extra_config = {"num_heads": UNetConfig().num_heads, "num_head_channels": -1}
    latent_format = comfy.latent_formats.SD15
    memory_usage_factor = 0.2
    erasure_family = "emojicanvas"
    erasure_side = IMAGE_SIZE


def _take(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}


def load_demo() -> tuple:
    """(MODEL, CLIP, VAE) of EmojiCanvas: UNetModel, SD1ClipModel and TAESD with the bundled weights."""
    if not BUNDLE.exists():
        raise FileNotFoundError(f"{BUNDLE.name} is missing from the pack. Install the pack again")
    weights = {k: v.float() for k, v in comfy.utils.load_torch_file(str(BUNDLE), safe_load=True).items()}

    config = _DemoConfig(UNetConfig().comfy())
    config.set_inference_dtype(torch.float32, None)
    net = comfy.model_base.BaseModel(config, model_type=comfy.model_base.ModelType.EPS, device=mm.unet_offload_device())
    net.load_model_weights(_take(weights, "unet."), "")
    model = comfy.model_patcher.ModelPatcher(
        net, load_device=mm.get_torch_device(), offload_device=mm.unet_offload_device()
    )

    target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
    clip = comfy.sd.CLIP(
        target,
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        model_options={"clip_l_model_config": TextConfig().comfy()},
    )
    missing, _ = clip.load_sd(_take(weights, "clip."), full_model=True)
    if missing:
        raise ValueError(f"{BUNDLE.name} lacks {len(missing)} weights of the text encoder. Install the pack again")
    return model, clip, comfy.sd.VAE(sd=_take(weights, "vae."))


class LoadDemo(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureLoadDemo",
            display_name="Load EmojiCanvas Demo",
            category=CATEGORY,
            description="A tiny text-to-image model that comes with the pack: 24 emoji objects in 5 styles at 128 x 128 "
            "pixels, fast on any CPU. For trying erasures in seconds before running them on a real checkpoint.",
            inputs=[],
            outputs=[
                io.Model.Output(display_name="model", tooltip="An SD 1.x type network of 11 million weights."),
                io.Clip.Output(display_name="clip", tooltip="Its text encoder; prompts like 'a cat in neon style'."),
                io.Vae.Output(display_name="vae", tooltip="Its decoder (TAESD). Use 128 x 128 latents."),
                Judge.Output(
                    display_name="judge",
                    tooltip="Names the object and the style of its pictures; knows the words it was drawn by.",
                ),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        model, clip, vae = load_demo()
        with ordinary_tensors():
            judge = CanvasJudge.load()
        return io.NodeOutput(model, clip, vae, judge)
