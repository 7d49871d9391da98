"""What several of the graphs in workflows/ are made of."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from comfy_client import Json
from graph_builder import Graph, Node, Output, Subgraph

sys.path.append(
    str(Path(__file__).resolve().parent.parent)
)  # the core is not installed here; ComfyUI is another process
from erasure_core.emojicanvas.testbed import TESTBED

DEMO_SAMPLER = {"steps": 20, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0}
SEED = 7
BATCH = 4
WORD, ALIAS = "beer", "ale"
CONCEPT = {"concept": f"{WORD}, {ALIAS}", "keep": "bomb, crown, cactus, banana, house, penguin, neon style"}
"""What the graphs erase that train, compare and attack."""
RED, GREEN, BLUE, GREY = "#a1309b", "#8AA84A", "#3f789e", "#88A"


def fitted(method: str, **changed: Any) -> Json:
    """Settings of a method that suit the demo model."""
    return {**TESTBED.get(method, {}), **changed}


def compare(info: Json, sampler: Json, direction: str, factor: float) -> Subgraph:
    """Sample one prompt with two models at the same seeds and lay the pictures side by side."""
    inputs = {"before": "MODEL", "after": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING"}
    g = Subgraph(info, "Before and after", inputs | {"latent": "LATENT", "vae": "VAE", "seed": "INT"})
    columns: list[tuple[Node, Node]] = []
    for name in ("before", "after"):
        ksampler = g.node(
            "KSampler",
            (270, 0),
            title=f"Sample: {name}",
            model=g.input(name),
            seed=g.input("seed"),
            positive=g.input("positive"),
            negative=g.input("negative"),
            latent_image=g.input("latent"),
            **sampler,
        )
        columns.append((ksampler, g.node("VAEDecode", samples=ksampler["LATENT"], vae=g.input("vae"))))
    (s0, d0), (s1, d1) = columns
    both = g.node(
        "ImageStitch",
        (270, 0),
        image1=d0["IMAGE"],
        image2=d1["IMAGE"],
        direction=direction,
        spacing_width=4,
        spacing_color="white",
    )
    scale = g.node("ImageScaleBy", (270, 0), image=both["IMAGE"], upscale_method="nearest-exact", scale_by=factor)
    g.output("both", scale["IMAGE"])
    g.output("after", d1["IMAGE"])
    g.place(0, 0, s0, s1)
    g.place(320, 0, d0, d1)
    g.place(600, 0, both, scale)
    return g


def sample(info: Json) -> Subgraph:
    inputs = {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"}
    g = Subgraph(info, "Sample and decode", inputs | {"vae": "VAE", "seed": "INT"})
    sampler = g.node(
        "KSampler",
        (270, 0),
        model=g.input("model"),
        seed=g.input("seed"),
        positive=g.input("positive"),
        negative=g.input("negative"),
        latent_image=g.input("latent"),
        **DEMO_SAMPLER,
    )
    decode = g.node("VAEDecode", samples=sampler["LATENT"], vae=g.input("vae"))
    scale = g.node("ImageScaleBy", (270, 0), image=decode["IMAGE"], upscale_method="nearest-exact", scale_by=3.0)
    g.output("IMAGE", scale["IMAGE"])
    g.place(0, 0, sampler)
    g.place(320, 0, decode, scale)
    return g


class Drawing:
    """The demo model, and what all pictures of a graph share; `preview` shows one prompt drawn by one model."""

    def __init__(self, g: Graph, batch: int = BATCH) -> None:
        self.g = g
        self.demo = g.node("ErasureLoadDemo", (260, 0))
        self.negative = g.node("CLIPTextEncode", collapsed=True, title="Negative prompt", clip=self.demo["CLIP"])
        self.latent = g.node("EmptyLatentImage", (260, 0), width=128, height=128, batch_size=batch)
        self.seed = g.node("PrimitiveInt", (260, 0), title="Seed, for all", value=SEED)
        self._sample = sample(g.info)

    @property
    def shared(self) -> tuple[Node, ...]:
        return self.latent, self.seed, self.negative

    def prompt(self, words: str) -> Node:
        return self.g.node("CLIPTextEncode", (210, 88), title="Prompt", clip=self.demo["CLIP"], text=words)

    def preview(self, title: str, model: Output, positive: Output) -> tuple[Node, Node]:
        """(what draws, what shows)."""
        drawn = self.g.instance(
            self._sample,
            width=210,
            model=model,
            positive=positive,
            negative=self.negative["CONDITIONING"],
            latent=self.latent["LATENT"],
            vae=self.demo["VAE"],
            seed=self.seed["INT"],
        )
        return drawn, self.g.node("PreviewImage", (310, 230), title=title, images=drawn["IMAGE"])
