"""Nodes for the tests only: they look into the server's memory. The `server` fixture puts them into its custom nodes."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import comfy.lora
import comfy.model_management as mm
import comfy.model_patcher
import comfy.supported_models
import folder_paths
import torch
from safetensors.torch import save_file

PREFIX = "diffusion_model."


class Probe:
    """Runs every time, and has a text for the test."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "run", (), True

    @classmethod
    def IS_CHANGED(cls, **_) -> float:
        return float("nan")


def answer(report: dict) -> dict:
    return {"ui": {"text": (json.dumps(report),)}}


def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
    plain = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in tensors.items()}
    save_file(plain, Path(folder_paths.get_output_directory()) / name)


class Again(Probe):
    """Passes a MODEL on and makes everything behind it run again."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, OUTPUT_NODE = ("MODEL",), False

    def run(self, model):
        return (model,)


class Checksum(Probe):
    """SHA-256 of all weights as they lie in memory once this MODEL is loaded, and which network object they are in."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})

    def run(self, model):
        mm.load_models_gpu([model])
        digest = hashlib.sha256()
        for key, weight in sorted(model.model.state_dict().items()):
            digest.update(key.encode())
            digest.update(weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return answer({"sha256": digest.hexdigest(), "network": id(model.model)})


class Effective(Probe):
    """Writes the cross-attention weights of a MODEL with its patches to the output folder."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "name": ("STRING", {})}})

    def run(self, model, name):
        found = {}
        for key, ((weight, convert), *patches) in model.get_key_patches(PREFIX).items():
            if ".attn2.to_k." in key or ".attn2.to_v." in key:
                own = convert(weight.detach().float().clone(), inplace=True)
                own = comfy.lora.calculate_weight(patches, own, key) if patches else own
                found[key.removeprefix(PREFIX).removesuffix(".weight")] = own
        write(name, found)
        return answer({"weights": len(found)})


class TextStates(Probe):
    """Writes a CONDITIONING to the output folder."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"conditioning": ("CONDITIONING",), "name": ("STRING", {})}})

    def run(self, conditioning, name):
        write(name, {"states": conditioning[0][0]})
        return answer({})


class FluxModel(Probe):
    """A tiny MODEL of another architecture: joint attention, no cross-attention to the text."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {}})
    RETURN_TYPES, OUTPUT_NODE = ("MODEL",), False

    def run(self):
        small = dict(in_channels=16, out_channels=16, vec_in_dim=32, context_in_dim=64, hidden_size=64, mlp_ratio=2.0)
        small |= dict(num_heads=4, depth=1, depth_single_blocks=1, axes_dim=[4, 6, 6], theta=10000, patch_size=2)
        config = comfy.supported_models.Flux(dict(image_model="flux", qkv_bias=True, guidance_embed=True, **small))
        config.set_inference_dtype(torch.float32, None)
        cpu = torch.device("cpu")
        return (comfy.model_patcher.ModelPatcher(config.get_model({}, device=cpu), cpu, cpu),)


NODE_CLASS_MAPPINGS = {f"Probe{node.__name__}": node for node in (Again, Checksum, Effective, TextStates, FluxModel)}
