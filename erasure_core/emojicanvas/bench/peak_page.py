"""How much memory each method takes on top of drawing (docs/results/peak.{json,md}).

A process that has already grown hides what a method needs, so each one is measured in a process of its own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch
from tqdm import tqdm

from ...api import erase
from ...methods import all_methods
from ..model import EmojiCanvasPort
from .passes import SHORT
from .peak import PeakMemory
from .rows import RESULTS, Bench, Plan
from .settings import aids_for, settings_for

STEPS = 4
"""The peak is reached in the first steps: forward, backward, optimiser."""


def peak(plan: Plan, method: str, threads: int) -> int:
    """Bytes that erasing the plan's first concept takes at most, beyond what was in use after drawing pictures."""
    torch.set_num_threads(threads)
    bench = Bench(plan)
    erasing = bench.plan.erasings()[0]
    bench.studio.model.generate(["a house"] * 4, list(range(4)), steps=2, cfg=plan.sampler.cfg, bf16=bench.studio.bf16)
    port = EmojiCanvasPort(bench.studio.model, bf16=bench.studio.bf16)
    aids = aids_for(method, port, erasing, bench.studio.judge)
    settings = settings_for(method, short(method))
    with PeakMemory() as measured:
        erase(port, bench.spec(erasing), method, settings, aids=aids)
    return measured.bytes


def short(method: str) -> Mapping[str, Any]:
    """Settings of a training that is long enough for its peak."""
    return {"iterations": STEPS, **SHORT.get(method, {})} if all_methods()[method].trains else {}


def peak_page(bench: Bench, methods: Sequence[str]) -> None:
    """Measure ``methods`` and write the page."""
    found: dict[str, int] = {}
    with tqdm(methods, unit="method") as bar:
        for method in bar:
            bar.set_description(method)
            with ProcessPoolExecutor(1, get_context("spawn")) as fresh:
                found[method] = round(fresh.submit(peak, bench.plan, method, torch.get_num_threads()).result() / 1e6)
    weights = sum(p.numel() for p in bench.studio.model.unet.parameters())
    only = "".join(f" {x}" for x in ("--only", *bench.plan.only) if bench.plan.only)
    rows = "\n".join(f"| {m} | {mb} |" for m, mb in sorted(found.items(), key=lambda x: x[1]))
    text = f"""# Memory that erasing takes

Made by `nox -s bench -- peak{only}`: resident memory on top of drawing, at most, while
{bench.plan.erasings()[0].label} is erased with the testbed's settings, each method in a process of its own; {STEPS} steps
of those that train, which their peak does not depend on. EmojiCanvas' network has {weights / 1e6:.1f} million weights
({4 * weights / 1e6:.0f} MB in float32), that of SD 1.5 860 million.

| method | MB |
|---|---|
{rows}
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "peak.md").write_text(text, encoding="utf-8")
    (RESULTS / "peak.json").write_text(json.dumps({"megabytes": found}, indent=1), encoding="utf-8")
    print(rows)
