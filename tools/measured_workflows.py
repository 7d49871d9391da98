"""The graphs of workflows/ that compare and count: methods side by side, and attacks."""

from __future__ import annotations

from comfy_client import Json
from graph_builder import Graph
from workflow_parts import BLUE, CONCEPT, DEMO_SAMPLER, GREEN, GREY, RED, SEED, WORD, Drawing, fitted

METHODS = ("UCE", "RECE", "SPEED", "ESD", "CPE")
_TRAIN = ("ESD", "CPE")
_SAMPLING = {name: DEMO_SAMPLER[name] for name in ("steps", "cfg", "sampler_name", "scheduler")}


def compare_methods(info: Json) -> Graph:
    g = Graph(info, "compare_methods")
    note = g.note(
        f"""
# Methods side by side

Press **Run**: seconds of solving, a minute or two of training, on a CPU. Then **Compare Erasures** draws one sheet, the same
seeds everywhere.

**Look at** the rows, a method each, below the model as it is: left *a {WORD}* (named, must go), middle *a lager* (not named),
right *a crown* (must stay). The judge counts, below each cell, what is still there; the table says how far pictures moved.

**Then try**
- **strengths** `0.5, 1`: two rows for each method
- a single prompt, and one line in **concept**: methods against strengths
- your own concept in all **Erase Concept** nodes, or other settings in a **Method** node
""",
        (300, 520),
    )
    demo = g.node("ErasureLoadDemo", (300, 0))
    g.place(0, 0, note)
    g.place(0, note.height + 120, demo)
    makers, erasures = [], {}
    for i, title in enumerate(METHODS, 1):
        method = g.node(f"ErasureMethod{title}", (300, 0), **fitted(title.lower()))
        erase = g.node(
            "ErasureEraseConcept", (300, 0), title=f"Erase Concept: {title}", model=demo["MODEL"], clip=demo["CLIP"],
            vae=demo["VAE"], method=method["ERASURE_METHOD"], **CONCEPT,
        )  # fmt: skip
        makers.append((method, erase))
        erasures[f"erasure_{i}"] = erase["ERASURE"]
    y = 0
    for method, erase in makers:
        g.place(350, y, method)
        g.place(670, y, erase)
        y += max(method.height, erase.height) + (420 if erase.title.endswith(_TRAIN) else 80)  # those grow a picture
    g.group("1  One erasure for each method", [node for pair in makers for node in pair], RED)
    sheet = g.node(
        "ErasureCompare", (340, 700), model=demo["MODEL"], clip=demo["CLIP"], vae=demo["VAE"], judge=demo["JUDGE"],
        prompts=f"a {WORD}\na lager\na crown", concept=f"{WORD}\n{WORD}\ncrown", strengths="1", seeds=2, seed=SEED, tile=128,
        labels="\n".join(METHODS), **_SAMPLING, **erasures,
    )  # fmt: skip
    shown = g.node("PreviewImage", (700, 800), title="Sheet", images=sheet["sheet"])
    table = g.node("PreviewAny", (700, 260), title="Table", source=sheet["report"])
    g.place(1030, 0, sheet)
    g.place(1400, 0, shown, table)
    g.group("2  The same prompts and seeds", (sheet, shown, table), BLUE)
    return g


def red_team(info: Json) -> Graph:
    g = Graph(info, "red_team")
    d = Drawing(g)
    note = g.note(
        f"""
# Erase, then attack

Press **Run**; some three minutes on a CPU.

1. **Erase Concept** (quality *fast*) takes *{WORD}* out of the words. Asking for one no longer draws it.
2. **Red-Team Attack** *rece_residual* computes, in a second, text states that still get through the edited weights.
3. **Red-Team Attack** *free_embedding* searches over everything that the network can read, here with a fifth of its steps.

**Look at** the pictures of each find, and at the reports: how many show a {WORD} by asking, and how many under attack. *Fast*
edits what words mean; a search that does not go through words finds the concept again.

**Then try**
- another **attack**, and a higher **effort**: 1 is its whole budget
- quality *thorough* in **Erase Concept** (seven minutes on one CPU core), and the same attacks again

4. **Erasure Receipt** draws before and after at seeds of its own, counts, and keeps it all, attacks included, in the erasure's
file: connect **Save Erasure** to its *erasure*.

On your own model use *Example Judge*, *CLIP Judge* or *ONNX Judge*; without a judge nothing is counted.
""",
        (310, 620),
    )
    erase = g.node("ErasureEraseConcept", (300, 300), model=d.demo["MODEL"], clip=d.demo["CLIP"], **CONCEPT)
    g.place(0, 0, note)
    g.place(350, 0, d.demo, *d.shared)
    g.group("Model, size and seed", (d.demo, *d.shared), GREEN)
    prompt = d.prompt(f"a {WORD}")
    before, shown = d.preview(f"asking: a {WORD}", erase["MODEL"], prompt["CONDITIONING"])
    g.place(670, 0, erase)
    g.place(995, 0, prompt, before)
    g.place(1220, 0, shown)
    g.group("1  Erase, and ask", (erase, prompt, before, shown), GREY)
    results, x = None, 670
    for number, (attack, title, effort) in enumerate(
        (("rece_residual", "RECE residual", 1.0), ("free_embedding", "free embedding", 0.2)), 2
    ):
        widgets = {} if results is None else {"results": results}
        tried = g.node(
            "ErasureAttack", (320, 560), title=f"Red-Team Attack: {title}", model=erase["MODEL"],
            base_model=d.demo["MODEL"], clip=d.demo["CLIP"], vae=d.demo["VAE"], judge=d.demo["JUDGE"],
            concept=CONCEPT["concept"], attack=attack, effort=effort, pictures=8, cfg=_SAMPLING["cfg"], **widgets,
        )  # fmt: skip
        found = g.node("PreviewImage", (360, 300), title=f"{title}: finds", images=tried["images"])
        report = g.node("PreviewAny", (360, 230), title="Report", source=tried["report"])
        g.place(x, 540, tried)
        g.place(x + 345, 540, found, report)
        g.group(f"{number}  Attack: {title}", (tried, found, report), RED)
        results, x = tried["results"], x + 765
    receipt = g.node(
        "ErasureReceipt", (320, 0), model=d.demo["MODEL"], clip=d.demo["CLIP"], vae=d.demo["VAE"], judge=d.demo["JUDGE"],
        erasure=erase["ERASURE"], attacks=results, prompt="a {}", pictures=4, **_SAMPLING,
    )  # fmt: skip
    sheet = g.node("PreviewImage", (560, 700), title="Receipt", images=receipt["sheet"])
    g.place(x, 0, receipt)
    g.place(x + 345, 0, sheet)
    g.group("4  Receipt", (receipt, sheet), BLUE)
    return g
