"""The graphs of workflows/ that train: mining, pairs, and a memory with a key."""

from __future__ import annotations

from comfy_client import Json
from graph_builder import Graph, Node
from workflow_parts import ALIAS, BLUE, CONCEPT, GREEN, GREY, RED, WORD, Drawing, fitted


def mine_erase_mine(info: Json) -> Graph:
    g = Graph(info, "mine_erase_mine")
    d = Drawing(g)
    note = g.note(
        f"""
# Mine, look, erase, mine again

Press **Run**; a few minutes on a CPU, pictures appear while it searches.

1. **Erase Concept** (quality *fast*) takes *{WORD}* out of the words.
2. **Mine Dark Embeddings** searches the erased model for anything that still draws one.
3. A second **Erase Concept** starts from the untouched model and erases the words *and* the finds (its *dark* input).
4. **Mine** again, with another seed: is something left?

**Look at** what was found in each round, and at the scores. The second search finds it again by another way: editing what words
and finds mean (*fast*, *balanced*) does not close all ways.

**Then try** quality *thorough* in the second Erase Concept: it trains against such searches, seven minutes on one CPU core.

Scores come from the **judge** that the demo model brings along; on your own model use *Example Judge*, *CLIP Judge* or *ONNX
Judge*, or none and your eyes.
""",
        (300, 520),
    )
    mining = {"concept": f"{WORD}, {ALIAS}", "count": 3, "steps": 100}
    first = g.node(
        "ErasureEraseConcept",
        (300, 300),
        title="1  Erase the words",
        model=d.demo["MODEL"],
        clip=d.demo["CLIP"],
        **CONCEPT,
    )
    shared = {"clip": d.demo["CLIP"], "vae": d.demo["VAE"], "base_model": d.demo["MODEL"], "judge": d.demo["JUDGE"]}
    mine = g.node("ErasureMineDarkEmbeddings", (320, 545), title="2  What is left?", model=first["MODEL"], seed=1, **mining,
        **shared)  # fmt: skip
    second = g.node(
        "ErasureEraseConcept", (300, 300), title="3  Erase words and finds", model=d.demo["MODEL"], clip=d.demo["CLIP"],
        dark=mine["DARK_EMBEDDINGS"], **CONCEPT,
    )  # fmt: skip
    again = g.node("ErasureMineDarkEmbeddings", (320, 545), title="4  And now?", model=second["MODEL"], seed=2, **mining,
        **shared)  # fmt: skip
    g.place(0, 0, note)
    prompt = d.prompt(f"a {WORD}")
    g.place(340, 0, d.demo, *d.shared, prompt)
    g.group("Model and prompt", (d.demo, *d.shared, prompt), GREEN)
    for row, (erase, search, word) in enumerate(
        ((first, mine, "words erased"), (second, again, "words and finds erased"))
    ):
        y = 655 * row
        drawn, shown = d.preview(f"a {WORD}: {word}", erase["MODEL"], prompt["CONDITIONING"])
        found = g.node("PreviewImage", (340, 250), title=f"Found in round {row + 1}", images=search["images"])
        report = g.node("PreviewAny", (340, 150), title="Scores", source=search["report"])
        g.place(660, y, erase)
        g.place(995, y, drawn, shown)
        g.place(1345, y, search)
        g.place(1700, y, found, report)
        g.group(
            f"{'First' if row == 0 else 'Second'} round", (erase, search, drawn, shown, found, report), (RED, BLUE)[row]
        )
    return g


def pairs_then_duo(info: Json) -> Graph:
    g = Graph(info, "pairs_then_duo")
    d = Drawing(g)
    note = g.note(
        """
# Pairs of pictures, then DUO

Press **Run**; a few minutes on a CPU, pictures appear while it trains.

1. **Make SDEdit Pair** draws *a dog* in several styles, then draws each picture over with another prompt, from the same noise:
the prompts of one line belong together. The judge sorts out pairs that failed.
2. **Method: DUO** learns to prefer the pictures without. Here each picture is read with the prompt that drew it
(*own_prompts*), which holds what the safe prompts draw.

**Look at** the pairs: what differs is what will be unlearned. Then look at before and after: the prompt by its name, by a word
that nobody named, and a prompt that must stay. The concept goes, and the rest changes too: colours, above all. A higher
*base_prior_weight* or *beta* disturbs less and erases less.

**Then try** *own_prompts* off: DUO as its paper has it, with an empty prompt, so that no words play a part. It takes more
pairs and steps, and on the demo model some objects stay (docs/results/effect.md). For your own model use photographs of the
concept on *images*, 32 pairs or more, and DUO's own settings.
""",
        (300, 560),
    )
    styles = ("", " in pixel art style", " in pencil sketch style", " in neon style", " in brindlewash style", "")
    others = ("house", "crown", "car", "tulip", "pizza", "cactus")
    pair = g.node(
        "ErasureMakeSDEditPair", (300, 0), model=d.demo["MODEL"], clip=d.demo["CLIP"], vae=d.demo["VAE"],
        judge=d.demo["JUDGE"], unsafe_prompt="\n".join(f"a dog{style}" for style in styles),
        safe_prompt="\n".join(f"a {other}{style}" for other, style in zip(others, styles, strict=True)),
        strength=0.7, count=24, cfg=4.0, concept="dog",
    )  # fmt: skip
    unsafe, safe = (g.node("PreviewImage", (340, 250), title=t, images=pair[t]) for t in ("unsafe", "safe"))
    method = g.node("ErasureMethodDUO", (300, 0), **fitted("duo", own_prompts=True, batch=6))
    erase = g.node(
        "ErasureEraseConcept", (300, 300), model=d.demo["MODEL"], clip=d.demo["CLIP"], vae=d.demo["VAE"],
        method=method["ERASURE_METHOD"], pairs=pair["CONCEPT_PAIRS"], concept="dog", keep="horse",
    )  # fmt: skip
    g.place(0, 0, note)
    g.place(340, 0, d.demo, *d.shared)
    g.group("Model, size and seed", (d.demo, *d.shared), GREEN)
    g.place(660, 0, pair)
    g.place(985, 0, unsafe, safe)
    g.group("1  Pairs", (pair, unsafe, safe), BLUE)
    g.place(660, pair.height + 500, method, erase)  # the pair's node grows pictures
    g.group("2  Unlearn", (method, erase), RED)
    for row, words in enumerate(("a dog", "a pooch", "a horse")):
        y, members = 360 * row, []
        prompt = d.prompt(words)
        members.append(prompt)
        g.place(1380, y, prompt)
        for x, (title, model) in zip(
            (1600, 2145), (("before", d.demo["MODEL"]), ("after", erase["MODEL"])), strict=True
        ):
            drawn, shown = d.preview(f"{words}: {title}", model, prompt["CONDITIONING"])
            g.place(x, y, drawn)
            g.place(x + 220, y, shown)
            members += [drawn, shown]
        g.group(words, members, GREY)
    return g


def prompt_memory_with_key(info: Json) -> Graph:
    g = Graph(info, "prompt_memory_with_key")
    d = Drawing(g)
    note = g.note(
        f"""
# Hide it from everybody, and keep the key

Press **Run**; some ten minutes on a CPU, pictures appear while it learns.

**Learn Safe Prompt Memory** in mode *key* trains two things at once: the weights learn to hide *{WORD}*, and a few rows, the
memory, learn to bring it back. Publish the erasure (**Save Erasure**), keep the memory (**Save Prompt Memory**): it is the key.
And keep this workflow to yourself: whoever has its words, settings and seed can learn the same key.
Choose a seed that nobody guesses.

**Look at** the rows: as it is, hidden, and hidden but with the key (**Apply Safe Prompt Memory**). The right column must stay.

**Then try** mode *suppress*: no weight changes, the rows alone, read beside every prompt, push *{WORD}* away. Set
*iterations* to 0, which is as many as the mode needs, and leave the key's node out.
""",
        (300, 470),
    )
    key = g.node(
        "ErasureLearnSafePromptMemory", (300, 520), model=d.demo["MODEL"], clip=d.demo["CLIP"], vae=d.demo["VAE"],
        mode="key", iterations=80, weights_rate=fitted("kpop")["learning_rate"], **CONCEPT,
    )  # fmt: skip
    back = g.node(
        "ErasureApplySafePromptMemory", (300, 0), title="Unlock with the key", model=key["MODEL"],
        memory=key["PROMPT_MEMORY"],
    )  # fmt: skip
    g.place(0, 0, note)
    g.place(340, 0, d.demo, *d.shared)
    g.group("Model, size and seed", (d.demo, *d.shared), GREEN)
    g.place(660, 0, key)
    g.place(660, key.height + 420, back)  # the node grows pictures
    g.group("Learn, and unlock", (key, back), RED)
    prompts = {words: d.prompt(words) for words in (f"a {WORD}", "a crown")}
    for prompt, x in zip(prompts.values(), (1000, 1545), strict=True):
        g.place(x, 0, prompt)
    g.group("Prompts", prompts.values(), BLUE)
    y = 220
    for title, model in {"as it is": d.demo["MODEL"], "hidden": key["MODEL"], "with the key": back["MODEL"]}.items():
        members: list[Node] = []
        for (words, prompt), x in zip(prompts.items(), (1000, 1545), strict=True):
            drawn, shown = d.preview(f"{title}: {words}", model, prompt["CONDITIONING"])
            g.place(x, y, drawn)
            g.place(x + 220, y, shown)
            members += [drawn, shown]
        g.group(title, members, GREY)
        y += max(node.height for node in members) + 110
    return g
