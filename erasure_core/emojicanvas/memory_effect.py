"""What prompt memories do to pictures: suppress mode with and without the memory, key mode with and without the key.

python -m erasure_core.emojicanvas.memory_effect suppress key --split tuning
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Iterator

import torch

from ..artifact import Erasure
from ..methods import Aids, kpop, settings_from
from ..metrics.rates import Rate
from ..operators.memory import Mode, SavedMemory
from ..suppress import Settings, suppress
from .bench_settings import settings_for
from .judge import Judge
from .model import EmojiCanvas, EmojiCanvasPort
from .rows import figures, spec_of
from .splits import SCORING, TUNING, Erasing, Split, questions
from .studio import Sampler


def score(
    canvas: EmojiCanvas,
    judge: Judge,
    split: Split,
    erasing: Erasing,
    *,
    erasure: Erasure | None = None,
    memory: SavedMemory | None = None,
    strength: float = 1.0,
    seeds: int = 6,
    rounds: int = 1,
    sampler: Sampler | None = None,
) -> dict[str, Rate]:
    """The shares that erasures are scored by (:func:`effect.figures`), drawn with an erasure, a memory, or both.

    Args:
        seeds: pictures a word.
        rounds: pictures a kept object.
    """
    asked = questions(split, erasing, seeds, rounds)
    groups = {k: v for k, v in asked.groups().items() if v}
    shots = [shot for group in groups.values() for shot in group]
    drawn = canvas.generate(
        [s.prompt for s in shots],
        [s.seed for s in shots],
        delta=erasure,
        memories=() if memory is None else [(memory, strength)],
        **dataclasses.asdict(sampler or Sampler()),
    )
    pictures = dict(zip(groups, drawn.split([len(g) for g in groups.values()]), strict=True))
    return figures(asked, erasing, pictures, judge)


def learn(
    canvas: EmojiCanvas, mode: Mode, erasing: Erasing, **settings: object
) -> tuple[SavedMemory, Erasure | None, float]:
    """(memory, the public erasure of key mode, seconds); ``settings`` differ from those that the testbed runs with."""
    port, spec, began = EmojiCanvasPort(canvas), spec_of(erasing), time.perf_counter()
    if mode is Mode.SUPPRESS:
        memory = suppress(port, spec, Settings(**settings), quiet, Aids())  # type: ignore[arg-type]
        return memory, None, time.perf_counter() - began
    hidden = kpop.hide(port, spec, settings_from(kpop.SPEC, settings_for("kpop", settings)), quiet, Aids())
    return hidden.key, hidden.erasure, time.perf_counter() - began


def quiet(done: int, total: int) -> None:
    """Shows no progress."""


def rows(
    canvas: EmojiCanvas, judge: Judge, split: Split, mode: Mode, erasing: Erasing, seeds: int, rounds: int
) -> Iterator[tuple[str, dict[str, Rate], float]]:
    """(what is drawn, figures, seconds of learning) of the base and of everything that the mode makes."""
    memory, erasure, seconds = learn(canvas, mode, erasing)
    drawn: dict[str, tuple[Erasure | None, SavedMemory | None]] = {"base": (None, None), "memory": (None, memory)}
    if erasure is not None:
        drawn = {"base": (None, None), "without the key": (erasure, None), "with the key": (erasure, memory)}
    for name, (change, read) in drawn.items():
        found = score(canvas, judge, split, erasing, erasure=change, memory=read, seeds=seeds, rounds=rounds)
        yield name, found, seconds if name != "base" else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modes", nargs="+", choices=[m.value for m in Mode])
    parser.add_argument("--split", choices=("tuning", "scoring"), default="tuning")
    parser.add_argument("--objects", nargs="+", help="default: all that the split erases")
    parser.add_argument("--seeds", type=int, default=6, help="pictures a word")
    parser.add_argument("--rounds", type=int, default=1, help="pictures a kept object")
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    split = {"tuning": TUNING, "scoring": SCORING}[a.split]
    canvas, judge = EmojiCanvas.load(), Judge.load()
    measures = ("direct", "named", "unseen", "neighbours", "kept_objects", "kept_styles")
    print(" | ".join(("mode", "object", "drawn with", *measures, "seconds")))
    for mode in map(Mode, a.modes):
        for name in a.objects or split.objects:
            for drawn, found, seconds in rows(canvas, judge, split, mode, Erasing((name,)), a.seeds, a.rounds):
                cells = (mode.value, name, drawn, *(str(found[m]) for m in measures), f"{seconds:.0f}")
                print(" | ".join(cells), flush=True)


if __name__ == "__main__":
    main()
