"""The graphs of workflows/, built from the schemas of a running ComfyUI.

    .nox/host/bin/python tools/workflows.py

writes them anew after a node has changed. The texts below are what a person reads first; keep them short.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from comfy_client import Json
from graph_builder import TITLE, Graph, Node, Output
from measured_workflows import compare_methods, red_team
from trained_workflows import mine_erase_mine, pairs_then_duo, prompt_memory_with_key
from workflow_parts import BATCH, BLUE, DEMO_SAMPLER, GREEN, GREY, RED, SEED, compare, sample

FOLDER = Path(__file__).resolve().parent.parent / "workflows"
# The object of the demo: what is typed into Erase Concept, and prompts that show what it does.
OBJECT = {"concept": "bomb, explosive", "keep": "rocket, beer", "quality": "fast"}
ASKED, NAMED, NOT_NAMED, KEPT = "a bomb", "explosive", "dynamite", ("a rocket", "a beer")
SHARED_FILE = "emojicanvas-no-bomb"
SEVERAL = {
    "concept": "bomb, explosive\nbeer, ale\nrose, briar",
    "keep": "tulip, strawberry, rocket, house, crown, frog, penguin",
    "quality": "fast",
}
STYLE = {
    "concept": "brindlewash style",
    "keep": "pixel art style, pencil sketch style, neon style, frog, rose, car",
    "quality": "fast",
}


def erase_object(info: Json) -> Graph:
    g = Graph(info, "erase_object")
    note = g.note(
        f"""
# Erase an object

Press **Run**. Nothing is downloaded: *Load EmojiCanvas Demo* is a tiny model that comes with the pack, made for a CPU.

**Look at** the two previews: the same four seeds. *before* comes straight from the loader, *after* passes through
**Erase Concept**.

**Then try**
- other prompts: `{NAMED}` was named, `{NOT_NAMED}` was not, `{KEPT[0]}` and `{KEPT[1]}` must look as before
- another concept: `cat, kitty`, replaced with `dog`
- quality *balanced*: reaches further, and changes more of what you did not name
- another number in **Seed, for both**

For your own model, open *erase_on_sd15* or *erase_on_sdxl*.
""",
        (300, 440),
    )
    demo = g.node("ErasureLoadDemo", (310, 0))
    erase = g.node("ErasureEraseConcept", (310, 300), model=demo["MODEL"], clip=demo["CLIP"], **OBJECT)
    report = g.node("PreviewAny", (310, 140), title="What was done", source=erase["report"])
    prompt = g.node("CLIPTextEncode", (220, 110), title="Prompt", clip=demo["CLIP"], text=ASKED)
    negative = g.node("CLIPTextEncode", (220, 88), title="Negative prompt", clip=demo["CLIP"])
    latent = g.node("EmptyLatentImage", (220, 0), width=128, height=128, batch_size=BATCH)
    seed = g.node("PrimitiveInt", (220, 0), title="Seed, for both", value=SEED)
    samplers, shown = [], []
    for name, model in (("before", demo["MODEL"]), ("after", erase["MODEL"])):
        sampler = g.node(
            "KSampler",
            (230, 0),
            title=f"Sample: {name}",
            model=model,
            seed=seed["INT"],
            positive=prompt["CONDITIONING"],
            negative=negative["CONDITIONING"],
            latent_image=latent["LATENT"],
            **DEMO_SAMPLER,
        )
        decode = g.node("VAEDecode", collapsed=True, samples=sampler["LATENT"], vae=demo["VAE"])
        scale = g.node(
            "ImageScaleBy",
            title="Enlarge",
            collapsed=True,
            image=decode["IMAGE"],
            upscale_method="nearest-exact",
            scale_by=3.0,
        )
        samplers.append((sampler, decode, scale))
        shown.append(g.node("PreviewImage", (370, 340), title=name, images=scale["IMAGE"]))
    g.place(0, 0, note)
    g.place(345, 0, demo, erase, report)
    g.place(700, 0, prompt, negative, latent, seed)
    y = 0
    for sampler, decode, scale in samplers:
        y = g.place(965, y, sampler)
        g.place(965, y, decode)
        y = g.place(1103, y, scale)
    g.place(1240, 0, *shown)
    g.group("1  Model and erasure", (demo, erase, report), GREEN)
    g.group("2  What to draw", (prompt, negative, latent, seed), BLUE)
    g.group("3  Same seeds", [node for row in samplers for node in row[:1]] + [samplers[1][1]], GREY)
    g.group("4  Compare", shown, RED)
    return g


def _table(g: Graph, note: Node, erase_inputs: dict[str, str], columns: dict[str, tuple[str, ...]]) -> Graph:
    """Demo model, one erasure, and a preview of before over after for each prompt, in titled columns."""
    demo = g.node("ErasureLoadDemo", (310, 0))
    erase = g.node("ErasureEraseConcept", (310, 330), model=demo["MODEL"], clip=demo["CLIP"], **erase_inputs)
    report = g.node("PreviewAny", (310, 150), title="What was done", source=erase["report"])
    negative = g.node("CLIPTextEncode", collapsed=True, title="Negative prompt", clip=demo["CLIP"])
    latent = g.node("EmptyLatentImage", (300, 0), width=128, height=128, batch_size=BATCH)
    seed = g.node("PrimitiveInt", (300, 0), title="Seed, for all", value=SEED)
    g.place(0, g.place(0, 0, note) + 50, latent, seed, negative)
    g.place(350, 0, demo, erase, report)
    g.group("1  Model and erasure", (demo, erase, report), GREEN)
    g.group("2  For all prompts", (latent, seed, negative), BLUE)
    both = compare(g.info, DEMO_SAMPLER, "down", 2.0)
    for column, (title, prompts) in enumerate(columns.items()):
        x, y, members = 710 + column * 645, 0, []
        for words in prompts:
            prompt = g.node("CLIPTextEncode", (210, 88), title="Prompt", clip=demo["CLIP"], text=words)
            pair = g.instance(
                both,
                width=210,
                before=demo["MODEL"],
                after=erase["MODEL"],
                positive=prompt["CONDITIONING"],
                negative=negative["CONDITIONING"],
                latent=latent["LATENT"],
                vae=demo["VAE"],
                seed=seed["INT"],
            )
            shown = g.node("PreviewImage", (385, 288), title=f"{words}: before over after", images=pair["both"])
            g.place(x, y, prompt, pair)
            y = g.place(x + 220, y, shown)
            members += [prompt, pair, shown]
        g.group(title, members, RED if column == 0 else BLUE)
    return g


def erase_style(info: Json) -> Graph:
    g = Graph(info, "erase_style")
    note = g.note(
        """
# Erase a style

Press **Run**. *Brindlewash* is a painterly style of the demo model under a made-up name; it stands in for an artist.

**Look at** each preview: four seeds, *before* above, *after* below.
- left: pictures that ask for the style lose it and keep their object
- right: another style, and no style, stay as they are

**Then try** another style of the model in **Erase Concept**: `neon style`, `pixel art style`, `pencil sketch style`, with
`brindlewash style` among the kept ones.

On a large model, type an artist's name, other spellings behind commas, and keep artists who paint alike.

Double-click *Before and after* to change sampler, steps or CFG for all prompts at once.
""",
        (300, 470),
    )
    erased = ("a frog in brindlewash style", "a rose in brindlewash style")
    return _table(g, note, STYLE, {"3  Erased style": erased, "4  Must stay": ("a frog in neon style", "a frog")})


def several_concepts(info: Json) -> Graph:
    g = Graph(info, "several_concepts_keep_neighbours")
    note = g.note(
        """
# Several concepts, neighbours kept

Press **Run**. One **Erase Concept** takes three concepts, one a line, other words for each behind commas. **keep** names
what is similar and would suffer.

**Look at** each preview: four seeds, *before* above, *after* below.
- left: bomb, beer and rose are suppressed
- right: tulip and strawberry (close to rose) and rocket stay

**Then try**
- taking `tulip` and `strawberry` out of **keep**
- writing `frog` into **replace_with**
- a **Method: RECE** node with more rounds on the *method* input

Three Erase Concept nodes in a row work too but disturb each other more; **Merge Erasures** joins files of several people.

Double-click *Before and after* to change sampler, steps or CFG for all prompts at once.
""",
        (300, 540),
    )
    columns = {"3  Erased": ("a bomb", "a beer", "a rose"), "4  Must stay": ("a tulip", "a strawberry", "a rocket")}
    return _table(g, note, SEVERAL, columns)


def load_shared_erasure(info: Json) -> Graph:
    g = Graph(info, "load_shared_erasure")
    note = g.note(
        f"""
# Save an erasure, load it elsewhere

**First run.** Press **Run**. Row 1 computes an erasure and saves it as `{SHARED_FILE}.safetensors` in `models/loras`. Rows 2
and 3 still show the bomb: their nodes are bypassed (purple), because there was no file yet.

**Second run.** Select the three purple nodes (Ctrl+click), press **Ctrl+B**, then **R** so that the lists show the new file,
and **Run** again.
- row 2: **Load** and **Apply Erasure**. Moving the strength computes nothing anew.
- row 3: the **stock LoRA loader**. Whoever gets your file needs nothing of this pack.

**Look at** the three previews: at strength 1 they show the same pictures.
Another concept needs another **name** in Save Erasure.

**To share**, send the file. Others put it into their `models/loras` and need row 2 or 3 only.
""",
        (310, 500),
    )
    demo = g.node("ErasureLoadDemo", (220, 0))
    prompt = g.node("CLIPTextEncode", (220, 110), title="Prompt", clip=demo["CLIP"], text=ASKED)
    negative = g.node("CLIPTextEncode", (220, 88), title="Negative prompt", clip=demo["CLIP"])
    latent = g.node("EmptyLatentImage", (220, 0), width=128, height=128, batch_size=BATCH)
    seed = g.node("PrimitiveInt", (220, 0), title="Seed, for all", value=SEED)
    g.place(0, 0, note)
    g.place(350, 0, demo, prompt, negative, latent, seed)
    g.group("Model and prompt", (demo, prompt, negative, latent, seed), GREY)

    erase = g.node("ErasureEraseConcept", (290, 270), model=demo["MODEL"], clip=demo["CLIP"], **OBJECT)
    save = g.node("ErasureSave", (260, 0), erasure=erase["ERASURE"], name=SHARED_FILE, folder="loras")
    load = g.node("ErasureLoad", (290, 0), bypass=True, model=demo["MODEL"], file=f"loras/{SHARED_FILE}.safetensors")
    apply = g.node("ErasureApply", (260, 0), bypass=True, model=demo["MODEL"], erasure=load["ERASURE"], strength=1.0)
    lora = g.node(
        "LoraLoaderModelOnly",
        (290, 0),
        bypass=True,
        title="Load LoRA (stock node)",
        model=demo["MODEL"],
        lora_name=f"{SHARED_FILE}.safetensors",
        strength_model=1.0,
    )
    drawing = sample(info)
    y = 0
    rows: tuple[tuple[str, tuple[Node, ...], Output, str], ...] = (
        ("1  Make and save", (erase, save), erase["MODEL"], GREEN),
        ("2  Load and apply, with a strength", (load, apply), apply["MODEL"], BLUE),
        ("3  The same file in a stock node", (lora,), lora["MODEL"], RED),
    )
    for title, makers, model, color in rows:
        pictures = g.instance(
            drawing,
            width=210,
            model=model,
            positive=prompt["CONDITIONING"],
            negative=negative["CONDITIONING"],
            latent=latent["LATENT"],
            vae=demo["VAE"],
            seed=seed["INT"],
        )
        shown = g.node("PreviewImage", (500, 220), title=title[3:], images=pictures["IMAGE"])
        for maker, x in zip(makers, (625, 935), strict=False):
            g.place(x, y, maker)
        g.place(1215, y, pictures)
        g.place(1445, y, shown)
        members = (*makers, pictures, shown)
        g.group(title, members, color)
        y += max(node.height for node in members) + TITLE + 80
    return g


def _on_checkpoint(
    g: Graph,
    file: str,
    url: str,
    note: str,
    size: int,
    prompts: tuple[str, str],
    sampler: Json,
    erase_inputs: dict[str, str],
) -> Graph:
    """A stock checkpoint, a LoRA (bypassed), Erase Concept, and two prompts before and after."""
    read_me = g.note(note, (380, 560))
    where = {"models": [{"name": file, "url": url, "directory": "checkpoints"}]}
    loader = g.node("CheckpointLoaderSimple", (340, 0), ckpt_name=file, properties=where)
    lora = g.node(
        "LoraLoader",
        (340, 0),
        bypass=True,
        title="Your LoRA (bypassed; Ctrl+B)",
        model=loader["MODEL"],
        clip=loader["CLIP"],
        lora_name="your-lora.safetensors",
    )
    erase = g.node("ErasureEraseConcept", (340, 310), model=lora["MODEL"], clip=lora["CLIP"], **erase_inputs)
    apply = g.node("ErasureApply", (340, 0), model=lora["MODEL"], erasure=erase["ERASURE"], strength=1.0)
    report = g.node("PreviewAny", (340, 110), title="What was done", source=erase["report"])
    save = g.node("ErasureSave", (340, 0), bypass=True, title="Save Erasure (bypassed; Ctrl+B)", erasure=erase["ERASURE"],
                  name="my-erasure", folder="loras")  # fmt: skip
    negative = g.node("CLIPTextEncode", (300, 88), title="Negative prompt", clip=lora["CLIP"])
    latent = g.node("EmptyLatentImage", (300, 0), width=size, height=size, batch_size=1)
    seed = g.node("PrimitiveInt", (300, 0), title="Seed, for all", value=SEED)
    g.place(0, 0, read_me)
    g.place(430, 0, loader, lora, erase, apply, report, save, gap=16)
    g.group("1  Model, LoRAs, erasure", (loader, lora, erase, apply, report, save), GREEN)
    g.place(40, 680, negative, latent, seed)
    g.group("4  For both prompts", (negative, latent, seed), GREY)
    both = compare(g.info, sampler, "right", 1.0)
    y = 0
    titles = (("2  A prompt with the concept", RED), ("3  A prompt that must stay", BLUE))
    for (title, color), words in zip(titles, prompts, strict=True):
        prompt = g.node("CLIPTextEncode", (300, 140), title="Prompt", clip=lora["CLIP"], text=words)
        pair = g.instance(
            both,
            width=300,
            before=lora["MODEL"],
            after=apply["MODEL"],
            positive=prompt["CONDITIONING"],
            negative=negative["CONDITIONING"],
            latent=latent["LATENT"],
            vae=loader["VAE"],
            seed=seed["INT"],
        )
        shown = g.node("PreviewImage", (760, 420), title="before | after", images=pair["both"])
        g.place(830, y, prompt, pair)
        g.place(1160, y, shown)
        g.group(title, (prompt, pair, shown), color)
        y += 530
    return g


_CHECKPOINT_NOTE = """
# Erase a concept on {name}

**Before you press Run**: put `{file}` into `models/checkpoints`, press **R**, and choose it (or your own {name} checkpoint).

**What to do**: type what should go into **concept**, one concept a line, other words for it behind commas. Type what is
similar into **keep**. Press **Run**.

**Look at** the upper pair (the concept, before and after at the same seed) and the lower pair (something else: it should
hardly change).
- The concept shines through: add other words for it, or raise the strength a little.
- Other things change: name them in **keep**, choose quality *fast*, or lower the strength.

Moving the strength computes nothing anew. Double-click *Before and after* to change sampler, steps or CFG; its output
*after* goes into a Save Image node.

**LoRAs** go between checkpoint and Erase Concept, where the bypassed loader is: select it, press **Ctrl+B**, choose your file.
What stands *behind* the erasure is not covered by it.

**Keep it**: *Save Erasure* below the report is bypassed; **Ctrl+B** switches it on. Do that before a long training: what isn't
saved is gone when ComfyUI ends.

**No more erasure?** Connect around it. Your checkpoint was never changed.
{more}
**What it can't promise** is in the README. The project's tests run this graph with the demo model in place of the checkpoint.
"""


def erase_on_sd15(info: Json) -> Graph:
    file = "v1-5-pruned-emaonly-fp16.safetensors"
    return _on_checkpoint(
        Graph(info, "erase_on_sd15"),
        file,
        f"https://huggingface.co/Comfy-Org/stable-diffusion-v1-5-archive/resolve/main/{file}",
        _CHECKPOINT_NOTE.format(name="SD 1.5", file=file, more=""),
        512,
        ("portrait of a sailor smoking a cigarette", "portrait of a sailor holding a coffee cup"),
        {"steps": 20, "cfg": 7.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
        {
            "concept": "cigarette, cigarettes, cigar, smoking, tobacco, vape",
            "keep": "pencil, pen, lollipop, coffee cup, portrait, sailor",
            "quality": "balanced",
        },
    )


def erase_on_sdxl(info: Json) -> Graph:
    file = "sd_xl_base_1.0.safetensors"
    more = """
**SDXL** reads a prompt in two ways: word by word (cross-attention) and as one summary (the pooled vector). The erasure edits
the first only, so traces may come back through the second.
"""
    return _on_checkpoint(
        Graph(info, "erase_on_sdxl"),
        file,
        f"https://huggingface.co/stabilityai/stable-diffusion-xl-base-1.0/resolve/main/{file}",
        _CHECKPOINT_NOTE.format(name="SDXL", file=file, more=more),
        1024,
        ("a tabby cat on a windowsill, photo", "a dog on a windowsill, photo"),
        {"steps": 25, "cfg": 6.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0},
        {
            "concept": "cat, kitten, kitty, tabby",
            "replace_with": "dog",
            "keep": "dog, tiger, lion, rabbit",
            "quality": "balanced",
        },
    )


WORKFLOWS: dict[str, Callable[[Json], Graph]] = {
    "erase_object": erase_object,
    "erase_style": erase_style,
    "several_concepts_keep_neighbours": several_concepts,
    "load_shared_erasure": load_shared_erasure,
    "compare_methods": compare_methods,
    "mine_erase_mine": mine_erase_mine,
    "red_team": red_team,
    "pairs_then_duo": pairs_then_duo,
    "prompt_memory_with_key": prompt_memory_with_key,
    "erase_on_sd15": erase_on_sd15,
    "erase_on_sdxl": erase_on_sdxl,
}
DEMOS = tuple(name for name in WORKFLOWS if not name.startswith("erase_on_"))
"""Those that run with what comes with the pack."""


def build(info: Json) -> dict[str, Json]:
    """Every graph by its file's stem; `info` is ComfyUI's /object_info."""
    return {name: make(info).data() for name, make in WORKFLOWS.items()}


def text(graph: Json) -> str:
    return json.dumps(graph, indent=1, ensure_ascii=False) + "\n"


def write(info: Json, folder: Path = FOLDER) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, graph in build(info).items():
        paths.append(folder / f"{name}.json")
        paths[-1].write_text(text(graph), encoding="utf-8", newline="\n")
    return paths


if __name__ == "__main__":
    from comfy_host import ComfyServer

    with ComfyServer() as server:
        for path in write(server.object_info()):
            print(path)
