"""Graphs in API format, built in a few words.

g = Graph()
model, clip, vae = g.demo()
erased = g.erase(model, clip, "cat", keep="dog")
picture = g.image(vae, g.sample(erased[0], clip, "a cat"))
run = server.run(g.api)
server.images(run, picture)
"""

from __future__ import annotations

import dataclasses
import io
import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from comfy_client import ComfyClient, ExecutionInterrupted, Run
from comfy_host import ComfyServer
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from erasure_core import all_methods

Link = list[Any]


class Node(str):
    """A node's id; ``node[i]`` is a link to its i-th output."""

    def __getitem__(self, output: int) -> Link:  # type: ignore[override]
        return [str(self), output]


class Graph:
    """Nodes are numbered in the order in which they are added."""

    def __init__(self) -> None:
        self.api: dict[str, Any] = {}

    def add(self, class_type: str, **inputs: Any) -> Node:
        name = Node(len(self.api) + 1)
        self.api[name] = {"class_type": class_type, "inputs": inputs}
        return name

    def demo(self) -> tuple[Link, Link, Link]:
        """MODEL, CLIP, VAE of EmojiCanvas."""
        node = self.add("ErasureLoadDemo")
        return node[0], node[1], node[2]

    def again(self, model: Link) -> Link:
        """The same MODEL; nothing behind it comes from the cache."""
        return self.add("ProbeAgain", model=model)[0]

    def erase(
        self,
        model: Link,
        clip: Link,
        concept: str,
        *,
        replace_with="",
        keep="",
        keep_everyday=False,
        quality="fast",
        method=None,
        **aids: Link,
    ) -> Node:
        """MODEL, ERASURE, report. ``method`` is a method's name and those of its settings that are not the default;
        ``aids`` are links to vae, pairs, dark, judge."""
        inputs = {"model": model, "clip": clip, "concept": concept, "replace_with": replace_with, "keep": keep}
        inputs |= {"keep_everyday": keep_everyday, **aids}
        if method:
            name, changed = method
            widgets = {f.name: f.default for f in dataclasses.fields(all_methods()[name].settings)} | changed
            inputs["method"] = self.add(f"ErasureMethod{name.upper()}", **widgets)[0]
        return self.add("ErasureEraseConcept", quality=quality, **inputs)

    def apply(self, model: Link, erasure: Link, strength: float = 1.0) -> Link:
        return self.add("ErasureApply", model=model, erasure=erasure, strength=strength)[0]

    def lora(self, model: Link, name: str, strength: float = 1.0) -> Link:
        """The stock node, as somebody without this pack uses it."""
        return self.add("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=strength)[0]

    def save(self, erasure: Link, name: str, **widgets: Any) -> Node:
        defaults = {"folder": "loras", "layout": LORA, "precision": "full (float32)", "overwrite": False}
        return self.add("ErasureSave", erasure=erasure, name=name, **{**defaults, **widgets})

    def load(self, file: str) -> Node:
        return self.add("ErasureLoad", file=file)

    def merge(self, model: Link, clip: Link, *erasures: Link) -> Node:
        named = {f"erasure_{i}": e for i, e in enumerate(erasures, 1)}
        return self.add("ErasureMerge", model=model, clip=clip, **named)

    def text(self, clip: Link, prompt: str) -> Link:
        return self.add("CLIPTextEncode", clip=clip, text=prompt)[0]

    def sample(
        self, model: Link, clip: Link, prompt: str = "a cat", *, seed: int = 1, steps: int = 4, cfg: float = 4.0
    ) -> Link:
        """The latent of a 128 x 128 picture."""
        return self.add(
            "KSampler",
            model=model,
            positive=self.text(clip, prompt),
            negative=self.text(clip, ""),
            latent_image=self.add("EmptyLatentImage", width=128, height=128, batch_size=1)[0],
            seed=seed,
            steps=steps,
            cfg=cfg,
            sampler_name="euler",
            scheduler="normal",
            denoise=1.0,
        )[0]

    def latent(self, samples: Link) -> Node:
        """Saves the latent; read it with :func:`latent`."""
        return self.add("SaveLatent", samples=samples, filename_prefix=f"test-{uuid.uuid4().hex}")

    def image(self, vae: Link, samples: Link) -> Node:
        """Saves the picture; read it with :func:`picture`."""
        decoded = self.add("VAEDecode", vae=vae, samples=samples)[0]
        return self.add("SaveImage", images=decoded, filename_prefix=f"test-{uuid.uuid4().hex}")

    def show(self, text: Link) -> Node:
        """Shows a text; read it with :func:`shown`."""
        return self.add("PreviewAny", source=text)

    def checksum(self, model: Link) -> Node:
        """Read it with :func:`report`."""
        return self.add("ProbeChecksum", model=model)

    def weights(self, model: Link) -> Node:
        """Writes the effective cross-attention weights; read them with :func:`weights`."""
        return self.add("ProbeEffective", model=model, name=f"weights-{uuid.uuid4().hex}.safetensors")


LORA, DIFFUSERS, FULL = "LoRA (ComfyUI, A1111, Forge)", "diffusers", "full delta (large)"


def latent(server: ComfyServer, run: Run, node: Node) -> Tensor:
    """[1, 4, 16, 16] as ComfyUI hands it from node to node (not scaled)."""
    (file,) = run.outputs[node]["latents"]
    return load_file(server.output / file["subfolder"] / file["filename"])["latent_tensor"]


def picture(client: ComfyClient, run: Run, node: Node) -> Tensor:
    """[H, W, 3] in 0..255."""
    return torch.from_numpy(np.array(Image.open(io.BytesIO(client.images(run, node)[0])).convert("RGB"))).float()


def shown(run: Run, node: Node) -> str:
    return "".join(run.outputs[node]["text"])


def report(run: Run, node: Node) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(shown(run, node))
    return answer


def cut_off(server: ComfyServer, graph: Graph, node: Node, state: Path) -> int:
    """Run a training until its state is on disk, then cancel it. How many of its steps that state holds."""

    asked: list[float] = []

    def interrupt(event: dict[str, Any]) -> None:
        if event["type"] == "progress" and event["data"]["node"] == node and state.exists() and not asked:
            asked.append(event["data"]["value"])  # once: a second one might hit the next run
            server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.run(graph.api, on_event=interrupt)
    done = int(load_file(state)["done"])
    assert done > 0
    return done


def weights(server: ComfyServer, graph: Graph, node: Node) -> dict[str, Tensor]:
    """By site name, [d_out, d_in] float32."""
    return load_file(server.output / graph.api[node]["inputs"]["name"])
