"""Make every picture of the docs and every thumbnail anew, from a real ComfyUI:

    .nox/host/bin/python tools/pictures.py            everything, some minutes on two cores
    .nox/host/bin/python tools/pictures.py sheets     what needs no Chromium: thumbnails and the before/after sheet
    .nox/host/bin/python tools/pictures.py page       screenshots
    .nox/host/bin/python tools/pictures.py erase_object pairs_then_duo     these thumbnails alone

workflows/*.json (from tools/workflows.py) and *.jpg, docs/images/*. To be run after a node or the demo model has changed.
"""

from __future__ import annotations

import copy
import io
import sys
from collections.abc import Iterable

from comfy_client import ComfyClient, Json
from comfy_host import PACK, REPO, ComfyServer
from demo import make_sheet
from graph_builder import Graph
from PIL import Image, ImageDraw
from sheet import INK, PAPER, font, save_picture

from workflows import DEMOS, FOLDER, OBJECT, SEVERAL, SHARED_FILE, write

sys.path.append(str(REPO / "tests" / "host"))
from browser import Browser, why_not
from canvas import open_gallery, picture
from graphs import queued, shipped, switched_on

IMAGES = REPO / "docs" / "images"
THUMBNAIL = 640
PARTS = {
    "red_team": ("asking", "RECE residual", "free embedding"),
    "mine_erase_mine": ("Found in round 1", "Found in round 2"),
    "prompt_memory_with_key": ("as it is: a beer", "hidden: a beer", "with the key: a beer"),
    "pairs_then_duo": ("unsafe", "safe", "a dog: after"),
}
"""Thumbnails: the previews whose titles start so, a row each."""
IN_README = ("load_shared_erasure", "several_concepts_keep_neighbours")
ON_CHECKPOINTS = {"erase_on_sd15": "on SD 1.5", "erase_on_sdxl": "on SDXL"}
# Badges would say on every node that it comes from this pack.
SETTINGS = {"Comfy.NodeBadge.NodeSourceBadgeMode": "None", "Comfy.NodeBadge.NodeIdBadgeMode": "None"}


def previews(client: ComfyClient, graph: Json) -> dict[str, list[Image.Image]]:
    """Run a graph in interface format; its pictures by the title of the node that shows them."""
    run = client.run(queued(graph, client.object_info()), timeout=1800)
    titles = {str(n["id"]): n.get("title", n["type"]) for n in graph["nodes"] if n["type"] == "PreviewImage"}
    return {
        title: [Image.open(io.BytesIO(png)).convert("RGB") for png in client.images(run, node)]
        for node, title in titles.items()
    }


def halves(pictures: list[Image.Image]) -> tuple[list[Image.Image], list[Image.Image]]:
    """Pictures of before over after, taken apart."""
    tops, bottoms = [], []
    for picture_ in pictures:
        tile = picture_.width
        tops.append(picture_.crop((0, 0, tile, tile)))
        bottoms.append(picture_.crop((0, picture_.height - tile, tile, picture_.height)))
    return tops, bottoms


def mosaic(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """A square thumbnail: a labelled row of pictures for each entry."""
    label, gap = 40, 4
    columns = max(len(row) for row in rows.values())
    tile = min((THUMBNAIL - gap * (columns - 1)) // columns, THUMBNAIL // len(rows) - label)
    out = Image.new("RGB", (THUMBNAIL, THUMBNAIL), PAPER)
    draw = ImageDraw.Draw(out)
    height = THUMBNAIL // len(rows)
    spare = (height - label - tile) // 2
    left = (THUMBNAIL - columns * tile - (columns - 1) * gap) // 2
    for i, (name, row) in enumerate(rows.items()):
        y = i * height + spare
        draw.text((THUMBNAIL / 2, y + label / 2), name, INK, font(24), anchor="mm")
        for k, one in enumerate(row):
            out.paste(one.resize((tile, tile), Image.Resampling.NEAREST), (left + k * (tile + gap), y + label))
    return out


def thumbnail(name: str, shown: dict[str, list[Image.Image]]) -> Image.Image:
    if name == "erase_object":
        return mosaic({"before": shown["before"][:2], "after": shown["after"][:2]})
    if name == "load_shared_erasure":
        return mosaic({title: row[:3] for title, row in shown.items()})
    if name == "compare_methods":
        return framed(shown["Sheet"][0])
    if name in PARTS:
        return mosaic(
            {
                part: [one for title in shown if title.startswith(part) for one in shown[title]][:3]
                for part in PARTS[name]
            }
        )
    pairs = {title.partition(":")[0]: halves(row) for title, row in shown.items()}
    titles = list(pairs)
    some = titles[:2] + titles[len(titles) // 2 :][:1]  # two erased, one kept
    return mosaic({"before": [pairs[t][0][0] for t in some], "after": [pairs[t][1][0] for t in some]})


def framed(picture_: Image.Image) -> Image.Image:
    """A sheet, whole, on a square thumbnail."""
    part = picture_.copy()
    part.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    out = Image.new("RGB", (THUMBNAIL, THUMBNAIL), PAPER)
    out.paste(part, ((THUMBNAIL - part.width) // 2, (THUMBNAIL - part.height) // 2))
    return out


def save_thumbnail(name: str, image: Image.Image) -> None:
    print(save_picture(image, FOLDER / f"{name}.jpg", quality=85))


def single_nodes(info: Json) -> dict[str, Json]:
    """A graph for each of our nodes, with values that show what it is for."""
    values: dict[str, Json] = {
        "ErasureEraseConcept": SEVERAL,
        "ErasureSave": {"name": "no-bomb"},
        "ErasureLoad": {"file": f"loras/{SHARED_FILE}.safetensors"},
        "ErasureLoadDarkEmbeddings": {"file": "what-is-left"},
        "ErasureLoadPairs": {"file": "dog-pairs.safetensors"},
        "ErasureLoadPromptMemory": {"file": "key-to-beer.safetensors"},
        "ErasureJudgeONNX": {"file": "classifier.onnx"},
    }
    sizes = {"ErasureEraseConcept": (400, 330)}
    loose = {
        "MODEL",
        "CLIP",
        "VAE",
        "IMAGE",
        "CLIP_VISION",
        "JUDGE",
        "ERASURE",
        "CONCEPT_PAIRS",
        "DARK_EMBEDDINGS",
        "PROMPT_MEMORY",
    }
    graphs = {}
    for kind in sorted(i for i in info if i.startswith("Erasure")):
        # Alone on the canvas its sockets stay open, which the builder would refuse.
        schema = copy.deepcopy(info[kind])
        required = schema["input"].get("required", {})
        open_ = {name: required.pop(name) for name in list(required) if required[name][0] in loose}
        schema["input"]["optional"] = open_ | schema["input"].get("optional", {})
        graph = Graph({kind: schema}, kind)
        graph.place(0, 0, graph.node(kind, sizes.get(kind, (330, 0)), **values.get(kind, {})))
        graphs[kind] = graph.data()
    return graphs


def page_pictures(server: ComfyServer, info: Json) -> None:
    with Browser(server.url, settings=SETTINGS) as page:
        for name in IN_README:
            graph = shipped(name)
            page.load(graph)
            page.queue(timeout=1800)
            if name == "load_shared_erasure":  # which leaves the file that Load Erasure shows below
                page.load(switched_on(graph))
                page.queue(timeout=1800)
            print(save_picture(picture(page, scale=0.8, sharpness=1.25), IMAGES / f"workflow_{name}.jpg", quality=75))
        for name, title in ON_CHECKPOINTS.items():
            graph = shipped(name)
            page.load(graph)
            node = picture(page, [n["id"] for n in graph["nodes"] if n["type"] == "ErasureEraseConcept"], pad=0)
            save_thumbnail(name, titled(title, node))
        for kind, graph in single_nodes(info).items():
            page.load(graph)
            print(save_picture(picture(page).quantize(128), IMAGES / f"node_{kind}.png"))
    with Browser(server.url, settings=SETTINGS) as page:  # anew, without the tabs of the graphs above
        page.load(shipped("erase_object"))
        # Wide enough for the whole graph at a size at which the page writes text.
        wide = {"width": 1920, "height": 960, "deviceScaleFactor": 1, "mobile": False}
        page.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", wide)
        page.queue(timeout=1800)
        page.fit()
        print(save_picture(_screen(page), IMAGES / "first_run.jpg", quality=80))
        open_gallery(page, PACK)
        print(save_picture(_screen(page), IMAGES / "templates.jpg", quality=80))


def titled(title: str, picture_: Image.Image) -> Image.Image:
    """A thumbnail for a graph that can't run here: no such checkpoint comes with the pack."""
    out = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#18181b")
    ImageDraw.Draw(out).text((THUMBNAIL / 2, 50), title, PAPER, font(44), anchor="mm")
    part = picture_.copy()
    part.thumbnail((THUMBNAIL - 60, THUMBNAIL - 120))
    out.paste(part, ((THUMBNAIL - part.width) // 2, 100))
    return out


def _screen(page: Browser) -> Image.Image:
    page._frames()
    return Image.open(io.BytesIO(page.driver.get_screenshot_as_png())).convert("RGB")


def sheets(server: ComfyServer, names: Iterable[str]) -> None:
    for name in names:
        graph = shipped(name)
        shown = previews(server, graph)
        if name == "load_shared_erasure":
            shown = previews(server, switched_on(graph))
        save_thumbnail(name, thumbnail(name, shown))


def main(wanted: set[str]) -> None:
    with ComfyServer() as server:
        info = server.object_info()
        for path in write(info):
            print(path)
        sheets(server, [name for name in DEMOS if name in wanted or "sheets" in wanted])
        if wanted & {"sheets", "before_after"}:
            print(save_picture(make_sheet(server, OBJECT), IMAGES / "before_after.jpg", quality=88))
        if "page" in wanted:
            if reason := why_not():
                sys.exit(f"{reason}: screenshots were not made anew")
            page_pictures(server, info)


if __name__ == "__main__":
    main(set(sys.argv[1:]) or {"sheets", "page"})
