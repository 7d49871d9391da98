"""The page about training speed: docs/results/passes.{json,md}."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence

import torch
from tqdm import tqdm

from .passes import STEPS, SUPPRESS, WARM_UP, Cost, beside, costs, heard, trained
from .rows import RESULTS, Bench

AIM = 1.15
"""A step takes at most this many times as long as its passes."""


def table(found: Sequence[Cost]) -> str:
    """A Markdown table, a line for each kind of step."""
    lines = [
        "| method | step | forward passes | with gradient | step | its passes, bare | multiple | of CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for c in found:
        calls = [
            f"{n:.1f} of {latents:.0f}" if n else "-"
            for n, latents in ((c.forward, c.forward_latents), (c.backward, c.backward_latents))
        ]
        wall, cpu = (
            "-" if m is None else f"{m:.2f}" if m <= AIM else f"**{m:.2f}**" for m in (c.multiple, c.cpu_multiple)
        )
        bare = "-" if c.multiple is None else f"{1e3 * c.bare:.0f} ms"
        lines.append(
            f"| {c.method} | {c.step} | {calls[0]} | {calls[1]} | {1e3 * c.seconds:.0f} ms | {bare} | {wall} | {cpu} |"
        )
    return "\n".join(lines)


def verdict(found: Sequence[Cost]) -> str:
    """Whether the aim is met, and by which not."""
    over = [f"{c.method} ({c.step}): {c.multiple:.2f}" for c in found if c.multiple and c.multiple > AIM]
    worst = max((c.multiple for c in found if c.multiple), default=0.0)
    if over:
        return f"**missed**: at most {AIM} times its passes: {', '.join(over)}"
    return f"met: at most {AIM} times its passes (the most: {worst:.2f})"


def passes_page(bench: Bench, methods: Sequence[str], steps: int = STEPS) -> None:
    """Train with each of ``methods`` for some steps, time these and their passes, and write the page."""
    found: list[Cost] = []
    rest: dict[str, float] = {}
    with tqdm([m for m in trained() if m in (*methods, SUPPRESS)], unit="method") as bar:
        for method in bar:
            bar.set_description(method)
            intervals = heard(bench, method, steps)
            found += costs(method, intervals)
            rest[method] = round(beside(intervals), 2)
    threads, dtype = torch.get_num_threads(), "bfloat16" if bench.studio.bf16 else "float32"
    shown = table(found)
    free = ", ".join(f"{m} {s:.1f} s" for m, s in rest.items())
    machine = f"the CPU, {threads} thread{'s' * (threads > 1)}, {dtype}, torch {torch.__version__}"
    text = f"""# Training steps and the passes that they make

Made by `nox -s bench -- passes`: {steps} steps of each trained method with the testbed's settings, on
{machine}; the first {WARM_UP} of each kind are not counted.

{shown}

{verdict(found)}

- **Forward passes**: calls of the network without gradient that a step makes, in the mean, "of" so many latents each:
  sampling the latents that it trains on (guidance doubles these), and the frozen or averaged network's predictions to aim at.
  **With gradient**: calls that gradients then run back through. Both are counted by hooks on the network, as they are made.
- **Its passes, bare**: after each step the same calls once more, on a copy of the network without change, memory or hooks, in
  the same type, with random input of the same shapes. A call with gradient is run back to the weights of the layers that are
  trained, as plain fine-tuning would; where a LoRA is trained, only to the outputs of these layers, so that all of its own
  products are counted as beside the pass; to the text where that is what is learned; and where the loss reads attention
  rather than the output, from the attentions. Step and passes are timed in turn; the two columns are medians.
- **Multiple**: the median over steps of one through the other, on the clock, and in processor time of all threads together,
  which other work on the machine disturbs less. What is beyond 1: the change beside the weights in every pass, the
  loss, noise and schedule, the optimiser, and telling the progress.
- Steps without passes have no multiple. Seconds of each run that are neither steps nor passes (copying the network, encoding
  text, looking at pictures, storing the change), once however long it trains: {free}.
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "passes.md").write_text(text, encoding="utf-8")
    whole = {
        "threads": threads,
        "dtype": dtype,
        "torch": torch.__version__,
        "steps": [dataclasses.asdict(c) for c in found],
        "beside_seconds": rest,
    }
    (RESULTS / "passes.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    print(shown)
    print(verdict(found))
