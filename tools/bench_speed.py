"""How long erasing takes at full size, next to a plain implementation of the published loop.

    python tools/bench_speed.py sd15        # or sdxl, or both; writes docs/results/speed.{json,md}

Random weights (tools/full_size.py), read by the code behind ComfyUI's stock loader in half precision, as on a GPU, but on
the CPU; times don't depend on what the numbers are. Methods run in turn in one process, the best of several counts.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.util
import json
import os
import sys
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psutil
from full_size import UNETS, use_comfyui, write

REPO = Path(__file__).resolve().parent.parent
FOLDER, RESULTS = REPO / ".cache" / "full_size", REPO / "docs" / "results"
METHODS = ("uce", "rece", "speed")
COUNTS = (1, 100)
KEEP = ("a photo of a dog", "tiger", "horse", "car", "house", "tree", "person", "mountain", "bird", "boat")
PART = {"sd15": 4, "sdxl": 20}
"""Published loops are timed on every n-th matrix, and the time multiplied."""
MIXED = ("sdxl",)
"""Here the text of 100 concepts is mixed from that of one, since encoding it on a CPU takes many minutes."""
AIMS = {"sd15": 0.3, "sdxl": 3.0}
"""Seconds for one concept."""
AIM_MANY, AIM_MEMORY = 2.0, 500e6
"""100 concepts may take this many times as long, and this much memory may come on top."""


def load_pack() -> Any:
    """This repository as ComfyUI would import it: under another name, and without being on the path."""
    assert REPO not in map(Path, sys.path)
    found = importlib.util.spec_from_file_location("pack", REPO / "__init__.py", submodule_search_locations=[str(REPO)])
    assert found and found.loader
    module = importlib.util.module_from_spec(found)
    sys.modules["pack"] = module
    found.loader.exec_module(module)
    return module


@dataclass
class Measured:
    seconds: float
    cpu_seconds: float
    """Of all threads together: what it costs on a machine that has other things to do as well."""
    memory: float
    """Most memory that was in use on top of what was before, in bytes."""
    result: Any = field(repr=False)

    def figures(self) -> dict[str, float]:
        return {"seconds": self.seconds, "cpu_seconds": self.cpu_seconds, "memory": self.memory}


class _Watch(threading.Thread):
    """The process's largest resident size, looked at every 2 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.largest = self.process.memory_info().rss

    def run(self) -> None:
        while not self.done.wait(0.002):
            self.largest = max(self.largest, self.process.memory_info().rss)


def give_back() -> None:
    """Return freed memory to the system, so that what is used next is seen. Linux only; elsewhere figures are lower."""
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def measure(what: Callable[[], Any], times: int = 3) -> Measured:
    """The best time of several runs, and the most memory of one more: looking at it takes time."""
    seconds, cpu_seconds, result = [], [], None
    for _ in range(times):
        result = None
        gc.collect()
        start, start_cpu = time.perf_counter(), time.process_time()
        result = what()
        seconds.append(time.perf_counter() - start)
        cpu_seconds.append(time.process_time() - start_cpu)
    result = None
    gc.collect()
    give_back()
    watch = _Watch()
    watch.start()
    result = what()
    watch.done.set()
    watch.join()
    return Measured(min(seconds), min(cpu_seconds), watch.largest - watch.before, result)


def published_loop(weights: dict[str, Any], source: Any, target: Any, keep: Any, ridge: float) -> dict[str, Any]:
    """UCE as published: for each matrix, sums over the rows and an inverse, in float32 (arXiv:2308.14761, eq. 7)."""
    import torch

    edited = {}
    source, target, keep = source.float(), target.float(), keep.float()
    for name, w in weights.items():
        w = w.float()
        left = ridge * w
        right = ridge * torch.eye(w.shape[1])
        for c, to in zip(source, target, strict=True):
            left += torch.outer(w @ to, c)
            right += torch.outer(c, c)
        for p in keep:
            left += torch.outer(w @ p, p)
            right += torch.outer(p, p)
        edited[name] = left @ torch.inverse(right)
    return edited


def published_matrices(weights: dict[str, Any], source: Any, target: Any, keep: Any, ridge: float) -> dict[str, Any]:
    """The same with the sums as matrix products: what a careful re-implementation of the loop does."""
    import torch

    edited = {}
    source, target, keep = source.float(), target.float(), keep.float()
    for name, w in weights.items():
        w = w.float()
        left = ridge * w + (w @ target.T) @ source + (w @ keep.T) @ keep
        right = ridge * torch.eye(w.shape[1]) + source.T @ source + keep.T @ keep
        edited[name] = left @ torch.inverse(right)
    return edited


def words(count: int) -> str:
    things = ("cigarette", "clown", "spider", "sword", "crown", "rocket", "guitar", "violin", "pistol", "tattoo")
    kinds = ("red", "old", "small", "glass", "golden", "broken", "wooden", "huge", "paper", "plastic")
    return "\n".join([f"{kind} {thing}" for kind in kinds for thing in things][:count])


def mixing(port_class: type, known: list[Any]) -> type:
    """``port_class``, but with text made from ``known``: a mixture and a little noise of its own for each prompt."""
    import torch

    stacked, made = torch.stack([t.states for t in known]), {}

    class Mixing(port_class):
        def text(self, prompts):
            # Kept, as ComfyPort keeps what it has encoded.
            made.update({p: self._mixed(p) for p in prompts if p not in made})
            return [made[p] for p in prompts]

        def _mixed(self, prompt):
            generator = torch.Generator().manual_seed(zlib.crc32(prompt.encode()))
            shares = torch.rand(len(known), generator=generator) ** 8
            noise = 0.05 * stacked.std() * torch.randn(stacked.shape[1:], generator=generator)
            states = torch.einsum("p,pld->ld", shares / shares.sum(), stacked) + noise
            return type(known[0])(prompt, states, known[0].kinds)

    return Mixing


def sampling(
    model: Any, family: str, width: int, erasure: Any, apply: Callable[..., Any], rounds: int
) -> dict[str, float]:
    """Seconds of one denoising step without and with the patch, in turn, and of loading the patched weights."""
    import comfy.model_management as mm
    import torch

    adm = UNETS[family].get("adm_in_channels")
    latent, context = torch.randn(2, 4, 32, 32), torch.randn(2, 77, width)
    extra = {"y": torch.randn(2, adm)} if adm else {}
    patched, best, loading = apply(model, erasure, 1.0), {"base": 1e9, "patched": 1e9}, 1e9
    for _ in range(rounds):
        for name, which in (("base", model), ("patched", patched)):
            start = time.perf_counter()
            mm.load_models_gpu([which])
            if name == "patched":
                loading = min(loading, time.perf_counter() - start)
            start = time.perf_counter()
            which.model.apply_model(latent, torch.full((2,), 5.0), c_crossattn=context, **extra)
            best[name] = min(best[name], time.perf_counter() - start)
    return best | {"loading": loading, "ratio": best["patched"] / best["base"]}


def loops(port: Any, count: int, rows: Any, ridge: float, part: int) -> dict[str, dict[str, float]]:
    """The published loops on every ``part``-th matrix, their times multiplied."""
    sites, out = port.sites(), {}
    some = {site.name: port.weight(site) for site in sites[::part]}
    for name, loop in (("as published", published_loop), ("as matrices", published_matrices)):
        got = measure(lambda loop=loop: loop(some, rows.source, rows.target, rows.keep, ridge), 1)
        got.seconds *= len(sites) / len(some)
        got.cpu_seconds *= len(sites) / len(some)
        out[f"{name}, {count}"] = got.figures() | {"matrices timed": len(some)}
        print(f"UCE {name}, {count}: {got.seconds:.2f} s, {got.memory / 1e6:.0f} MB", flush=True)
    return out


def everyday(port: Any, spec: Any, erase: Callable[..., Any], rounds: int) -> dict[str, Any]:
    """What it costs to hold everyday words too: encoding them, once, and then erasing."""
    vocabulary = sys.modules["pack.erasure_core.vocabulary"].VOCABULARY
    start = time.perf_counter()
    port.text(vocabulary)
    out: dict[str, Any] = {"prompts": len(vocabulary), "text": time.perf_counter() - start}
    both = replace(spec, everyday=True)
    for method in ("uce", "rece"):  # SPEED does not hold them
        got = measure(lambda method=method: erase(method=method, spec=both), rounds)
        out[method] = got.figures()
        print(f"{method} with everyday words: {got.seconds:.3f} s, {got.memory / 1e6:.0f} MB", flush=True)
    return out


def bench(family: str, counts: Sequence[int], published: bool, sample: bool, rounds: int) -> dict[str, Any]:
    """All figures of one family, those of the published loops and of sampling only where asked for."""
    import comfy.sd
    import torch

    core = sys.modules["pack.erasure_core"]
    port_module, patching = sys.modules["pack.nodes.port"], sys.modules["pack.nodes.patching"]
    concept = sys.modules["pack.erasure_core.concept"]
    linear_edit = sys.modules["pack.erasure_core.operators.linear_edit"]
    path = write(family, FOLDER)
    out: dict[str, Any] = {"erase": {}, "text": {}, "published": {}}
    with torch.inference_mode():  # as ComfyUI's executor does
        print(f"{family}: loading", flush=True)
        model, clip = comfy.sd.load_checkpoint_guess_config(str(path), output_vae=False, output_clip=True)[:2]
        with sys.modules["pack.nodes.modes"].ordinary_tensors():
            port_class = port_module.ComfyPort
            port = port_class(model, clip)
            out["matrices"], out["width"] = len(port.sites()), port.family.context_dim
            for count in counts:
                spec = core.ConceptSpec.parse(words(count), "", "\n".join(KEEP))
                port.text(["warm up"])
                start = time.perf_counter()
                rows = concept.edit_rows(port, spec, rule=core.Rows.SUMMARY, templates=concept.TEMPLATES["few"])
                seconds = time.perf_counter() - start
                prompts = 3 * (count + len(KEEP)) + 1
                encoded = port_class is port_module.ComfyPort
                out["text"][count] = {
                    "seconds": seconds if encoded else None,
                    "prompts": prompts,
                    "rows": len(rows.source),
                }
                print(
                    f"{family}: {count} concepts: {prompts} prompts, {len(rows.source)} rows, {seconds:.2f} s",
                    flush=True,
                )
                core.erase(port, spec, "uce")  # so that all weights have been read from the disk
                for method in METHODS:
                    # Reading the weights and making the patched MODEL are part of it; the text is in the cache.
                    def erase(method=method, spec=spec, port_class=port_class):
                        fresh = port_class(model, clip)
                        erasure = core.erase(fresh, spec, method)
                        return erasure, patching.apply_erasure(model, erasure, 1.0)

                    got = measure(erase, rounds)
                    out["erase"][f"{method}, {count}"] = got.figures()
                    print(f"{family}: {method}, {count}: {got.seconds:.3f} s, {got.memory / 1e6:.0f} MB", flush=True)
                    if (method, count) == ("uce", 1):
                        example = got.result[0]
                if count == 1:
                    out["everyday"] = everyday(port, spec, erase, rounds)
                if published:
                    ridge = 1e-3 * linear_edit.mean_square(rows.source)
                    out["published"] |= loops(port, count, rows, ridge, PART[family])
                if family in MIXED:
                    port_class = mixing(port_module.ComfyPort, port.text(words(1).split("\n") + list(KEEP)))
                    port = port_class(model, clip)
            if sample:
                out["sampling"] = sampling(model, family, out["width"], example, patching.apply_erasure, rounds)
                print(f"{family}: {out['sampling']}", flush=True)
    return out


def verdicts(family: str, figures: dict[str, Any]) -> dict[str, bool]:
    """Which aims are met."""
    met = {}
    for method in METHODS:
        for count, aim in zip(COUNTS, (AIMS[family], AIM_MANY * AIMS[family]), strict=True):
            if f"{method}, {count}" not in figures["erase"]:
                continue
            name = f"{method.upper()}, {count} concept{'s' * (count > 1)}: at most {aim:g} s"
            met[name] = figures["erase"][f"{method}, {count}"]["seconds"] <= aim
    most = max(e["memory"] for e in figures["erase"].values())
    return met | {f"at most {AIM_MEMORY / 1e6:.0f} MB on top": most <= AIM_MEMORY}


def table(results: dict[str, Any]) -> str:
    lines = [
        "# Speed",
        "",
        f"{results['machine']} Checkpoints of full size with random weights, which times do not depend on. Aims are our own, "
        "set on a machine where UCE as published takes 1.2 s for one concept and 4.4 s for 100 on SD 1.5.",
        "",
    ]
    for family, figures in results["families"].items():
        lines += [f"## {family}: {figures['matrices']} matrices, text width {figures['width']}", ""]
        lines += ["| | 1 concept | 100 concepts | 100 : 1 | memory on top |", "|---|---|---|---|---|"]
        erase, published, text = figures["erase"], figures["published"], figures["text"]
        for method in METHODS:
            entries = [erase.get(f"{method}, {n}") for n in COUNTS]
            times = [f"{e['seconds']:.2f} s" if e else "not run" for e in entries]
            ratio = f"{entries[1]['seconds'] / entries[0]['seconds']:.1f}" if all(entries) else ""
            memory = max(e["memory"] for e in entries if e) / 1e6
            lines.append(f"| {method.upper()} | {times[0]} | {times[1]} | {ratio} | {memory:.0f} MB |")
        for name in ("as published", "as matrices") if published else ():
            cells, memory = [], 0.0
            for n in COUNTS:
                entry = published.get(f"{name}, {n}")
                times = entry["seconds"] / erase[f"uce, {n}"]["seconds"] if entry else 0
                cells.append(f"{entry['seconds']:.1f} s ({times:.0f} x)" if entry else "not run")
                memory = max(memory, entry["memory"] / 1e6 if entry else 0)
            lines.append(f"| UCE {name}, float32 | {cells[0]} | {cells[1]} | | {memory:.0f} MB |")
        encoded = [text.get(str(n)) for n in COUNTS]
        shown = [f"{t['seconds']:.1f} s ({t['prompts']} prompts)" if t and t["seconds"] else "not run" for t in encoded]
        lines += [f"| encoding the text, apart | {shown[0]} | {shown[1]} | | |", ""]
        if "everyday" in figures:
            e = figures["everyday"]
            most = max(e[m]["memory"] for m in ("uce", "rece")) / 1e6
            lines += [
                f"With everyday words held too, as Erase Concept does by default, one concept takes "
                f"{e['uce']['seconds']:.2f} s (UCE) and {e['rece']['seconds']:.2f} s (RECE), at most {most:.0f} MB on top; "
                f"encoding them, once for each text encoder, {e['text']:.1f} s ({e['prompts']} prompts).",
                "",
            ]
        if "sampling" in figures:
            s = figures["sampling"]
            lines += [
                f"One denoising step takes {s['base']:.2f} s without and {s['patched']:.2f} s with the erasure "
                f"(ratio {s['ratio']:.3f}). It lies in the weights, so a step computes nothing more: what is not 1 is the "
                f"machine's noise. Putting it into the weights takes {s['loading']:.2f} s, once.",
                "",
            ]
        if figures["load"] > 0.5:
            lines += [
                f"The machine was busy (load {figures['load']:.1f} before the start): times are upper bounds.",
                "",
            ]
        lines += [f"- {'met' if met else '**missed**'}: {aim}" for aim, met in figures["aims"].items()] + [""]
    lines += [
        '*(n x)*: how many times as long as ours takes for the same rows and weights. "As published" adds up one row after the '
        'other for each matrix and inverts (timed on some of the matrices, then multiplied); "as matrices" is the same in '
        "matrix products. Ours solves once for all matrices, in float64, and keeps the result as factors. RECE makes three "
        "rounds; SPEED filters and augments for each matrix. Where encoding is not run, the text of "
        "100 concepts was mixed from that of one, plus noise.",
        "",
        "`nox -s bench -- speed sd15 sdxl` writes this page.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("families", nargs="+", choices=UNETS)
    parser.add_argument("--counts", nargs="+", type=int, choices=COUNTS, default=list(COUNTS), help="of concepts")
    parser.add_argument("--no-sampling", action="store_true", help="leave out the denoising steps")
    parser.add_argument("--no-published", action="store_true", help="leave out the published loops")
    parser.add_argument("--rounds", type=int, default=8, help="the best of how many runs")
    parser.add_argument("--delete", action="store_true", help="delete the checkpoint afterwards")
    options = parser.parse_args()
    use_comfyui(half=True)
    load_pack()
    file = RESULTS / "speed.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"families": {}}
    import torch

    threads, load = torch.get_num_threads(), os.getloadavg()[0] if hasattr(os, "getloadavg") else 0
    results["machine"] = f"{os.cpu_count()} CPU cores, {threads} threads, torch {torch.__version__}; no GPU."
    for family in options.families:
        parts = not options.no_published, not options.no_sampling
        figures = json.loads(json.dumps(bench(family, options.counts, *parts, options.rounds)))
        figures |= {"aims": verdicts(family, figures), "load": load}
        results["families"][family] = figures
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(results, indent=1) + "\n")
        (RESULTS / "speed.md").write_text(table(results))
        if options.delete:
            write(family, FOLDER).unlink()
    print(table(results))


if __name__ == "__main__":
    main()
