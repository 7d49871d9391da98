"""Safe prompt memory in ComfyUI: the same as in the core at every prompt length, free where it can be, and harmless."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from api_graphs import Graph, Link, Node, cut_off, latent, report, shown
from comfy_client import ExecutionFailed, ExecutionInterrupted
from comfy_host import ComfyServer
from safetensors.torch import load_file
from torch import Tensor

from erasure_core import ConceptSpec, Family, Header, suppress
from erasure_core.emojicanvas.diffusion import alphas_cumprod, sigmas
from erasure_core.emojicanvas.model import EmojiCanvas, EmojiCanvasPort, reading
from erasure_core.emojicanvas.taesd import SD15_SCALE
from erasure_core.methods import kpop
from erasure_core.operators.memory import Mode, Placement, SavedMemory, load_memory, save_memory

SHORT, LONG, VERY_LONG = "a cat in neon style", "kitten " * 100, "a tiger " * 90
"""77, 154 and 231 rows."""
STEPS, CFG = 3, 4.0


@pytest.fixture(scope="module")
def core() -> EmojiCanvas:
    return EmojiCanvas.load()


@pytest.fixture(scope="module")
def memories(server: ComfyServer, core: EmojiCanvas) -> dict[str, SavedMemory]:
    """Three that change every picture, as files in models/erasure."""
    made, family = {}, EmojiCanvasPort(core).family
    for rows, placement in zip((5, 9, 16), Placement, strict=True):
        generator = torch.Generator().manual_seed(rows)
        noise = torch.randn(2, rows, family.context_dim, generator=generator)
        key = core.encode(["a dog"])[0, 1 : rows + 1] + 0.1 * noise[0]  # which the pictures look at
        value = (4 if placement is Placement.MID else 0.8) * noise[1]
        header = Header("suppress", {}, ConceptSpec.parse("cat"), family, "0" * 16, "1")
        made[placement.value] = SavedMemory(header, Mode.SUPPRESS, placement, 77, key, value)
        save_memory(made[placement.value], server.models / "erasure" / f"{placement.value}.safetensors")
    return made


@pytest.fixture(scope="module")
def texts(server: ComfyServer) -> dict[str, Tensor]:
    """States of prompts as ComfyUI encodes them, [1, 77 k, D]."""
    g = Graph()
    _, clip, _ = g.demo()
    prompts = ("", SHORT, LONG, VERY_LONG)
    for i, prompt in enumerate(prompts):
        g.add("ProbeTextStates", conditioning=g.text(clip, prompt), name=f"memory-text-{i}.safetensors")
    server.run(g.api)
    read = [load_file(server.output / f"memory-text-{i}.safetensors")["states"] for i in range(len(prompts))]
    assert [x.shape[1] for x in read] == [77, 77, 154, 231]
    return dict(zip(prompts, read, strict=True))


class MemoryGraph(Graph):
    def memory(self, file: str) -> Link:
        return self.add("ErasureLoadPromptMemory", file=f"erasure/{file}.safetensors")[0]

    def reads(self, model: Link, memory: str | Link, strength: float = 1.0, read_by: str = "both") -> Link:
        link = self.memory(memory) if isinstance(memory, str) else memory
        return self.add("ErasureApplySafePromptMemory", model=model, memory=link, strength=strength, read_by=read_by)[0]

    def learn(self, model: Link, clip: Link, **widgets: Any) -> Node:
        """MODEL, PROMPT_MEMORY, ERASURE, report."""
        defaults = {
            "concept": "cat, kitty", "replace_with": "", "keep": "dog, house", "mode": "suppress", "rows": 3,
            "placement": "all blocks", "iterations": 2, "learning_rate": 0.05, "weights_rate": 1e-3, "seed": 1,
        }  # fmt: skip
        return self.add("ErasureLearnSafePromptMemory", model=model, clip=clip, **{**defaults, **widgets})

    def drawn(
        self, model: Link, clip: Link, prompt: str = SHORT, negative: str = "", cfg: float = CFG, n: int = 1
    ) -> Node:
        sampled = self.sample(model, clip, prompt, seed=7, steps=STEPS, cfg=cfg)
        inputs = self.api[sampled[0]]["inputs"]
        inputs["negative"] = self.text(clip, negative)
        self.api[inputs["latent_image"][0]]["inputs"]["batch_size"] = n
        return self.latent(sampled)


@torch.no_grad()
def expected(
    core: EmojiCanvas,
    texts: dict[str, Tensor],
    used: Sequence[tuple[SavedMemory, float]],
    prompt: str,
    negative: str = "",
    cfg: float = CFG,
    n: int = 1,
    *,
    prompt_only: bool = False,
) -> Tensor:
    """ComfyUI's Euler sampler over the core's network, prompt and negative prompt each alone."""

    def eps(z: Tensor, t: Tensor, text: str, read: bool) -> Tensor:
        with reading(core.unet, used if read else ()):
            return core.unet(z, t.expand(n), texts[text].expand(n, -1, -1))

    s, _ = sigmas(STEPS)
    log_sigma = ((1 - alphas_cumprod()) / alphas_cumprod()).sqrt().log()
    x = torch.randn(n, 4, 16, 16, generator=torch.Generator().manual_seed(7)) * (1 + s[0] ** 2).sqrt()
    for i in range(STEPS):
        z, t = x / (s[i] ** 2 + 1).sqrt(), (s[i].log() - log_sigma).abs().argmin()
        e = eps(z, t, prompt, True)
        if cfg != 1:
            e_uncond = eps(z, t, negative, not prompt_only)
            e = e_uncond + cfg * (e - e_uncond)
        x = x + e * (s[i + 1] - s[i])
    return x


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max())


def test_as_the_core_draws(
    server: ComfyServer, core: EmojiCanvas, texts: dict[str, Tensor], memories: dict[str, SavedMemory]
) -> None:
    """Prompts of unlike lengths, which ComfyUI repeats or computes apart; a batch; CFG 1; placements; strengths."""
    cases: list[tuple[str, float, dict[str, Any]]] = [
        ("all", 1.0, {"prompt": SHORT}),
        ("mid", 1.0, {"prompt": SHORT}),
        ("midout", 1.0, {"prompt": SHORT}),
        ("all", 0.5, {"prompt": SHORT}),
        ("midout", 1.75, {"prompt": LONG}),
        ("all", 1.0, {"prompt": LONG}),
        ("all", 1.0, {"prompt": SHORT, "negative": LONG}),
        ("all", 1.0, {"prompt": VERY_LONG, "negative": LONG}),
        ("all", 1.0, {"prompt": SHORT, "cfg": 1.0}),
        ("all", 1.0, {"prompt": SHORT, "n": 2}),
    ]
    g = MemoryGraph()
    model, clip, _ = g.demo()
    plain = g.drawn(model, clip)
    nodes = [g.drawn(g.reads(model, name, strength), clip, **how) for name, strength, how in cases]
    run = server.run(g.api)
    base = latent(server, run, plain) * SD15_SCALE
    for node, (name, strength, how) in zip(nodes, cases, strict=True):
        seen = latent(server, run, node) * SD15_SCALE
        assert apart(seen, expected(core, texts, [(memories[name], strength)], **how)) < 1e-4, (name, strength, how)
        if how == {"prompt": SHORT}:
            assert apart(seen, base) > 5e-4, f"the memory in {name} can be seen"


def test_several_at_once(
    server: ComfyServer, core: EmojiCanvas, texts: dict[str, Tensor], memories: dict[str, SavedMemory]
) -> None:
    """Their rows are repeated as the text is, whatever the memories in front added; nodes between them don't matter."""
    g = MemoryGraph()
    model, clip, _ = g.demo()
    two = g.reads(g.reads(model, "all", 0.75), "midout", 1.5)
    erased = g.apply(g.reads(model, "all", 0.75), g.erase(model, clip, "pizza")[1], 0.0)
    apart_by_a_node = g.reads(erased, "midout", 1.5)
    nodes = [g.drawn(m, clip, SHORT, LONG) for m in (two, apart_by_a_node)]
    one = g.drawn(g.reads(model, "all", 0.75), clip, SHORT, LONG)
    run = server.run(g.api)
    uses = [(memories["all"], 0.75), (memories["midout"], 1.5)]
    assert all(
        apart(latent(server, run, x) * SD15_SCALE, expected(core, texts, uses, SHORT, LONG)) < 1e-3 for x in nodes
    )
    alone = expected(core, texts, uses[:1], SHORT, LONG)
    assert apart(latent(server, run, one) * SD15_SCALE, alone) < 1e-3, "the node behind did not change the one before"


@pytest.mark.parametrize("how", [{"negative": ""}, {"negative": LONG}, {"cfg": 1.0}, {"n": 2}], ids=str)
def test_prompt_only(
    server: ComfyServer,
    core: EmojiCanvas,
    texts: dict[str, Tensor],
    memories: dict[str, SavedMemory],
    how: dict[str, Any],
) -> None:
    g = MemoryGraph()
    model, clip, _ = g.demo()
    node = g.drawn(g.reads(g.reads(model, "all", read_by="prompt only"), "mid", 0.0), clip, SHORT, **how)
    run = server.run(g.api)
    made = expected(core, texts, [(memories["all"], 1.0)], SHORT, **how, prompt_only=True)
    assert apart(latent(server, run, node) * SD15_SCALE, made) < 1e-3


def test_strength_0_is_the_base_bit_for_bit(server: ComfyServer, memories: dict[str, SavedMemory]) -> None:
    g = MemoryGraph()
    model, clip, _ = g.demo()
    base, off = g.drawn(model, clip), g.drawn(g.reads(model, "all", 0.0), clip)
    only = g.drawn(g.reads(model, "all", 0.0, "prompt only"), clip)
    run = server.run(g.api)
    assert torch.equal(latent(server, run, off), latent(server, run, base))
    assert torch.equal(latent(server, run, only), latent(server, run, base))


def test_what_does_not_fit_is_refused(server: ComfyServer, memories: dict[str, SavedMemory]) -> None:
    header = Header("suppress", {}, ConceptSpec.parse("cat"), Family("sdxl", 2048, 2, 3), "0" * 16, "1")
    foreign = SavedMemory(header, Mode.SUPPRESS, Placement.ALL, 77, torch.ones(1, 2048), torch.ones(1, 2048))
    save_memory(foreign, server.models / "erasure" / "foreign.safetensors")

    def refusal(build) -> str:
        g = MemoryGraph()
        model, clip, _ = g.demo()
        build(g, model, clip)
        with pytest.raises(ExecutionFailed) as caught:
            server.run(g.api)
        return str(caught.value)

    said = refusal(lambda g, m, c: g.drawn(g.reads(m, "foreign"), c))
    assert "made for sdxl (text width 2048), but this is emojicanvas (text width 128)" in said
    said = refusal(lambda g, m, c: g.drawn(g.reads(g.add("ProbeFluxModel")[0], "all"), c))
    assert "made for emojicanvas (text width 128), but this is flux" in said
    assert "0.3 is not one of 0, 0.25" in refusal(lambda g, m, c: g.drawn(g.reads(m, "all", 0.3), c))
    assert "read_by: 'none' is not one of" in refusal(lambda g, m, c: g.drawn(g.reads(m, "all", read_by="none"), c))


# Learning


def checksum(server: ComfyServer) -> str:
    g = Graph()
    node = g.checksum(g.again(g.demo()[0]))
    state: str = report(server.run(g.api), node)["sha256"]
    return state


def test_suppress_mode(server: ComfyServer) -> None:
    """Its model is the memory applied; its erasure changes nothing; saved and loaded it draws the same."""
    before = checksum(server)
    g = MemoryGraph()
    model, clip, vae = g.demo()
    learned = g.learn(model, clip, vae=vae, concept="cat, kitty, walrus")
    again = g.learn(g.again(model), clip, concept="cat, kitty, walrus")
    said = g.show(learned[3])
    file = g.add("ErasureSavePromptMemory", memory=learned[1], name="learned", overwrite=True)
    g.add("ErasureSavePromptMemory", memory=again[1], name="again", overwrite=True)
    nodes = {
        "base": g.drawn(model, clip),
        "model": g.drawn(learned[0], clip),
        "applied": g.drawn(g.reads(model, learned[1]), clip),
        "erasure": g.drawn(g.apply(model, learned[2]), clip),
    }
    run = server.run(g.api)
    seen = {name: latent(server, run, node) for name, node in nodes.items()}
    assert torch.equal(seen["model"], seen["applied"]) and torch.equal(seen["erasure"], seen["base"])
    assert apart(seen["model"], seen["base"]) > 1e-4
    does = "suppressed while it is applied: cat, kitty, walrus (if the text encoder knows it); kept: dog, house\nmemory: 3 rows"
    assert shown(run, said).startswith(does) and "never learned 'walrus'" in shown(run, said)
    assert "saved models/erasure/learned.safetensors (" in shown(run, file)

    one, two = (load_memory(server.models / "erasure" / f"{x}.safetensors") for x in ("learned", "again"))
    assert torch.equal(one.key, two.key) and torch.equal(one.value, two.value), "the same seed, the same memory"
    assert one.mode is Mode.SUPPRESS and one.length == 77 and one.placement is Placement.ALL
    back = MemoryGraph()
    model, clip, _ = back.demo()
    node = back.drawn(back.reads(back.again(model), "learned"), clip)
    told = back.show(back.add("ErasureLoadPromptMemory", file="erasure/learned.safetensors")[1])
    run = server.run(back.api)
    assert torch.equal(latent(server, run, node), seen["model"])
    assert shown(run, told).startswith(does)
    assert checksum(server) == before


def test_key_mode(server: ComfyServer) -> None:
    """Two artefacts: the erasure is public and works alone, the memory is read on top of it."""
    before = checksum(server)
    g = MemoryGraph()
    model, clip, _ = g.demo()
    learned = g.learn(model, clip, mode="key", iterations=1, placement="middle block")
    said = g.show(learned[3])
    nodes = {
        "base": g.drawn(model, clip),
        "model": g.drawn(learned[0], clip),
        "applied": g.drawn(g.apply(model, learned[2]), clip),
        "unlocked": g.drawn(g.reads(learned[0], learned[1]), clip),
    }
    g.add("ErasureSavePromptMemory", memory=learned[1], name="secret", overwrite=True)
    run = server.run(g.api)
    seen = {name: latent(server, run, node) for name, node in nodes.items()}
    assert torch.equal(seen["model"], seen["applied"])
    assert apart(seen["model"], seen["base"]) > 1e-5 and not torch.equal(seen["unlocked"], seen["model"])
    assert shown(run, said).startswith("restored in the model that hides it: cat, kitty")
    key = load_memory(server.models / "erasure" / "secret.safetensors")
    assert key.mode is Mode.KEY and key.placement is Placement.MID and key.header.method == "kpop"
    assert checksum(server) == before


@pytest.mark.parametrize("mode", ["suppress", "key"])
@pytest.mark.parametrize("at", [0, 4])
def test_cancelled_while_learning(server: ComfyServer, mode: str, at: int) -> None:
    """While it draws its pictures or trains: no half file, the same weights."""
    before = checksum(server)
    g = MemoryGraph()
    model, clip, _ = g.demo()
    learned = g.learn(g.again(model), clip, mode=mode, iterations=5000)
    g.add("ErasureSavePromptMemory", memory=learned[1], name=f"cancelled-{mode}", overwrite=True)

    def interrupt(event: dict) -> None:
        data = event["data"]
        if event["type"] == "progress" and data.get("node") == learned and data["value"] >= at:
            server.interrupt()

    with pytest.raises(ExecutionInterrupted):
        server.run(g.api, on_event=interrupt)
    assert not list(server.models.rglob("*.tmp")) and not list(server.models.rglob("cancelled-*"))
    assert checksum(server) == before


def test_zero_is_what_the_mode_needs(server: ComfyServer) -> None:
    """The defaults of both modes are those of the core."""
    g = MemoryGraph()
    model, clip, _ = g.demo()
    left = {"rows": 0, "learning_rate": 0.0}
    learned = {m: g.learn(model, clip, mode=m, iterations=1, placement="middle block", **left) for m in Mode}
    for mode, node in learned.items():
        g.add("ErasureSavePromptMemory", memory=node[1], name=f"zero-{mode}", overwrite=True)
    server.run(g.api)
    made = {m: load_memory(server.models / "erasure" / f"zero-{m}.safetensors").header.settings for m in Mode}
    own, key = suppress.Settings, kpop.Settings
    assert (made[Mode.SUPPRESS]["rows"], made[Mode.SUPPRESS]["learning_rate"]) == (own.rows, own.learning_rate)
    assert (made[Mode.KEY]["rows"], made[Mode.KEY]["memory_rate"]) == (key.rows, key.memory_rate)
    shown = server.object_info()["ErasureLearnSafePromptMemory"]["input"]["required"]
    assert [shown[name][1]["default"] for name in ("rows", "iterations", "learning_rate")] == [0, 0, 0]


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "iterations"), [("suppress", 300), ("key", 20)])
def test_learning_that_was_cut_off_goes_on(server: ComfyServer, mode: str, iterations: int) -> None:
    """Cancelled and run again it ends with the same memory as one that was never cut off, and leaves no state behind."""

    def graph(resume: bool, name: str) -> tuple[Graph, Node]:
        g = MemoryGraph()
        model, clip, _ = g.demo()
        node = g.learn(model, clip, mode=mode, iterations=iterations, placement="middle block", resume=resume, seed=8)
        g.add("ErasureSavePromptMemory", memory=node[1], name=name, overwrite=True)
        return g, node

    state = server.base / "user" / "concept_erasure" / f"unfinished-memory-{mode}.safetensors"
    g, node = graph(True, "resumed")
    first, done = suppress.Settings().sample_steps if mode == "suppress" else 0, cut_off(server, g, node, state)
    again, node = graph(True, "resumed")
    run = server.run(again.api)
    ticks = [value for at, value, _ in run.progress if at == node]
    assert ticks and not any(first < value < first + done for value in ticks), "it does not begin anew"
    assert not state.exists()
    server.run(graph(False, "uncut")[0].api)
    one, two = (load_memory(server.models / "erasure" / f"{n}.safetensors") for n in ("resumed", "uncut"))
    assert torch.equal(one.key, two.key) and torch.equal(one.value, two.value)


def cpu_seconds(server: ComfyServer) -> float:
    """What the process has computed so far, all threads together; other programs don't count."""
    assert server.process is not None
    fields = Path(f"/proc/{server.process.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.slow
def test_what_a_step_costs(server: ComfyServer, memories: dict[str, SavedMemory]) -> None:
    """Sixteen rows in all blocks, against the same sampling without: compute time, the best of six."""
    costs: dict[str, list[float]] = {"without": [], "with": []}
    for repeat in range(6):
        for name in costs:
            g = MemoryGraph()
            model, clip, _ = g.demo()
            used = g.reads(model, "all") if name == "with" else model
            g.latent(g.sample(g.again(used), clip, seed=repeat, steps=2))
            server.run(g.api)
            sampler = g.sample(g.again(used), clip, seed=repeat, steps=100)
            g.latent(sampler)
            began = cpu_seconds(server)
            server.run(g.api)
            costs[name].append(cpu_seconds(server) - began)
    more = min(costs["with"]) / min(costs["without"]) - 1
    print(f"a sampling step costs {100 * more:+.1f} % with a memory of {len(memories['all'].key)} rows: {costs}")
    assert more < 0.05
