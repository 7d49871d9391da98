"""What EmojiCanvas draws, and what erasing changes about it, in figures.

    python -m erasure_core.emojicanvas.bench base         # is the model good? docs/results/base.{json,png}
    python -m erasure_core.emojicanvas.bench effect --method uce rece   # docs/results/effect.{json,md}
    python -m erasure_core.emojicanvas.bench tune --method uce --set ridge=0.01     # one line, on the tuning split

``effect`` and ``tune`` take every registered method. Pictures of the unchanged model are drawn once and kept in the
cache, and so is each finished row; ``--fresh`` measures rows again after a method's code has changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..api import erase
from ..artifact import Erasure
from ..concept import Concept, ConceptSpec
from ..methods import all_methods, settings_from
from ..metrics.rates import Rate, pooled, rate
from .concepts import OBJECTS, STYLES, prompt
from .judge import Judge, Verdict
from .model import EmojiCanvas, EmojiCanvasPort
from .splits import SCORING, STYLE_OBJECTS, TUNING, Erasing, Questions, Shot, Split, erasings, questions
from .studio import Sampler, Studio, to_bytes
from .weights import BUNDLE, JUDGE

CACHE, RESULTS = Path(".cache/emojicanvas/bench"), Path("docs/results")
MEASURES = {
    "direct": "direct",
    "named": "named words",
    "unseen": "unseen words",
    "neighbours": "neighbours",
    "kept_objects": "kept objects",
    "kept_styles": "kept styles",
    "beside": "rest of the picture",
}
"""Shares of pictures. The first three should fall to 0, the others stay as in the base model."""


def _flags(verdict: Verdict, names: Sequence[str]) -> Tensor:
    """[B] bool: picture b shows ``names[b]``."""
    shown = {name: verdict.shows(name) for name in set(names)}
    return torch.tensor([bool(shown[name][b]) for b, name in enumerate(names)], dtype=torch.bool)


def figures(asked: Questions, erasing: Erasing, pictures: Mapping[str, Tensor], judge: Judge) -> dict[str, Rate]:
    """The :data:`MEASURES` of one set of pictures. An object is shown if the judge names it, a style likewise."""
    by_style = bool(erasing.styles)
    verdicts = {k: judge.judge(v) for k, v in pictures.items()}

    def of(group: str, style: bool) -> Rate:
        shots = asked.groups()[group]
        if not shots:
            return Rate(0, 0)
        return rate(_flags(verdicts[group], [s.style if style else s.object for s in shots]))

    return {
        "direct": of("direct", by_style),
        "named": of("named", by_style),
        "unseen": of("unseen", by_style),
        "neighbours": of("neighbours", False),
        "kept_objects": of("kept", False),
        "kept_styles": of("kept", True),
        "beside": of("direct", not by_style),
    }


def measure(
    studio: Studio, asked: Questions, erasing: Erasing, erasure: Erasure | None, bar: tqdm
) -> tuple[dict[str, Rate], float]:
    """The figures with an erasure (or of the base), and how far kept pictures moved (mean absolute, 0 to 1)."""
    groups = {k: v for k, v in asked.groups().items() if v}
    drawn = studio.draw([s for g in groups.values() for s in g], erasure, bar).split([len(g) for g in groups.values()])
    pictures = dict(zip(groups, drawn, strict=True))
    base = studio.draw(groups["kept"], None, bar)
    return figures(asked, erasing, pictures, studio.judge), float((pictures["kept"] - base).abs().mean()) / 2


def spec_of(erasing: Erasing, replace_with: str = "") -> ConceptSpec:
    """The request: its names and named aliases; every other object and style is kept."""
    keep = tuple(k for k in erasing.keep() if k != replace_with)
    return ConceptSpec(tuple(Concept(words, replace_with) for words in erasing.words()), keep)


def parse_settings(method: str, pairs: Sequence[str]) -> dict[str, Any]:
    """``name=value`` or ``method.name=value`` as typed settings of ``method``; those of other methods are skipped."""
    fields = {f.name: f.default for f in dataclasses.fields(all_methods()[method].settings)}
    out: dict[str, Any] = {}
    for pair in pairs:
        left, _, text = pair.partition("=")
        owner, _, name = left.rpartition(".")
        if owner not in ("", method):
            continue
        if name not in fields:
            raise SystemExit(f"--set {pair}: {method} has no setting {name!r}; there are {', '.join(fields)}")
        default: Any = fields[name]
        if isinstance(default, bool):
            out[name] = text.lower() in ("1", "true", "yes", "on")
        else:
            out[name] = type(default)(text)  # an Enum is made from its value
    return out


def _plain(settings: Any) -> dict[str, Any]:
    return {k: v.value if isinstance(v, Enum) else v for k, v in dataclasses.asdict(settings).items()}


@dataclasses.dataclass
class Bench:
    """One model, judge, split and size."""

    studio: Studio
    split: Split
    seeds: int
    rounds: int
    replace_with: str
    rows_file: Path

    def rows(self) -> dict[str, dict]:
        return json.loads(self.rows_file.read_text(encoding="utf-8")) if self.rows_file.exists() else {}

    def key(self, erasing: Erasing, method: str, settings: Mapping[str, Any]) -> str:
        protocol = [
            self.split.name,
            self.seeds,
            self.rounds,
            self.replace_with,
            dataclasses.astuple(self.studio.sampler),
        ]
        return json.dumps([*protocol, erasing.label, method, settings], sort_keys=True)

    def run(self, chosen: Mapping[str, Mapping[str, Any]], fresh: bool = False) -> list[dict]:
        """The base's row and each method's for everything that the split erases, measured where not yet cached."""
        rows, wanted, base_shots, count = self.rows(), [], [], 0
        for erasing in erasings(self.split):
            asked = questions(self.split, erasing, self.seeds, self.rounds)
            shots = [s for g in asked.groups().values() for s in g]
            base_shots += shots
            for method, settings in {"none": {}, **chosen}.items():
                key = self.key(erasing, method, settings)
                wanted.append((key, erasing, asked, method, settings))
                if method != "none" and (fresh or key not in rows):
                    count += len(shots)
        base = len(self.studio.missing(base_shots))
        print(f"{base} pictures of the base and {count} with erasures to draw", flush=True)
        port, out = EmojiCanvasPort(self.studio.model), []
        with tqdm(total=base + count, unit="picture", smoothing=0.1) as bar:
            for key, erasing, asked, method, settings in wanted:
                # the base's row costs no drawing once its pictures are there
                if key not in rows or fresh or method == "none":
                    bar.set_description(f"{method}: {erasing.label}")
                    rows[key] = self._row(port, erasing, asked, method, settings, bar)
                    self.rows_file.write_text(json.dumps(rows, indent=1), encoding="utf-8")
                out.append(rows[key])
        return out

    def _row(
        self, port: EmojiCanvasPort, erasing: Erasing, asked: Questions, method: str, settings: Mapping, bar: tqdm
    ) -> dict:
        began = time.perf_counter()
        erasure = None if method == "none" else erase(port, spec_of(erasing, self.replace_with), method, settings)
        seconds = time.perf_counter() - began
        found, moved = measure(self.studio, asked, erasing, erasure, bar)
        return {
            "erased": erasing.label,
            "kind": erasing.kind,
            "method": method,
            "settings": dict(settings),
            "seconds": round(seconds, 2) if erasure else None,
            "kept_moved": round(moved, 4),
            **{k: v.to_json() for k, v in found.items()},
        }


def summary(rows: Sequence[Mapping]) -> list[dict]:
    """Rows of one kind and method as one: counts are added up, the rest averaged."""
    out = []
    for kind in dict.fromkeys(r["kind"] for r in rows):
        for method in dict.fromkeys(r["method"] for r in rows if r["kind"] == kind):
            same = [r for r in rows if r["kind"] == kind and r["method"] == method]
            seconds = [r["seconds"] for r in same if r["seconds"] is not None]
            row: dict[str, Any] = {
                "erased": f"{kind} ({len(same)})" if len(same) > 1 else same[0]["erased"],
                "kind": kind,
                "method": method,
            }
            row["settings"], row["seconds"] = (
                same[0]["settings"],
                round(sum(seconds) / len(seconds), 2) if seconds else None,
            )
            row["kept_moved"] = round(sum(r["kept_moved"] for r in same) / len(same), 4)
            out.append(row | {m: pooled(Rate.from_json(r[m]) for r in same).to_json() for m in MEASURES})
    return out


def table(rows: Sequence[Mapping]) -> str:
    """A Markdown table; the base's row ("none") stands before those of the methods."""
    head = ["erased", "method", *MEASURES.values(), "kept pictures moved", "seconds"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in rows:
        cells = [r["erased"], r["method"], *(str(Rate.from_json(r[m])) for m in MEASURES), f"{r['kept_moved']:.3f}"]
        lines.append("| " + " | ".join([*cells, "-" if r["seconds"] is None else f"{r['seconds']:g}"]) + " |")
    return "\n".join(lines)


def effect(bench: Bench, chosen: Mapping[str, Mapping[str, Any]], fresh: bool) -> None:
    """Measure ``chosen`` methods on the scoring split and write the tables, with all other methods' default rows."""
    bench.run(chosen, fresh)
    known = {"none": {}, **{m: _plain(spec.settings()) for m, spec in all_methods().items()}, **chosen}
    cached = bench.rows()
    keys = [bench.key(e, m, s) for e in erasings(bench.split) for m, s in known.items()]
    rows = [cached[k] for k in keys if k in cached]
    s, judge = bench.studio.sampler, bench.studio.judge
    text = f"""# Effect of erasing on EmojiCanvas

Made by `python -m erasure_core.emojicanvas.bench effect --seeds {bench.seeds} --rounds {bench.rounds}` with a model
trained for {bench.studio.model.steps_trained} steps, {s.steps} Euler steps, guidance {s.cfg:g}, {judge.name} \
{judge.version}, on scoring prompts and seeds only. Shares of pictures with 95 % Wilson intervals.

- **Direct, named, unseen**: pictures for the erased name, for aliases that the eraser was told, and for synonyms that
  it was not told, that still show the concept. Lower is better.
- **Neighbours, kept objects, kept styles**: pictures of look-alikes, and of all other objects in all styles, that show
  what they should. Best as high as "none", the unchanged model.
- **Rest of the picture**: for the erased prompts, the style where an object was erased, the object where a style was.
- **Moved**: mean absolute change of kept pictures at the same noise, 0 to 1.

A style has no synonyms here; its alias is the bare word ("a neon cat"), which captions never used.

## Summary

{table(summary(rows))}

## Each erasure

{table(rows)}
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "effect.md").write_text(text, encoding="utf-8")
    (RESULTS / "effect.json").write_text(
        json.dumps({"sampler": dataclasses.asdict(s), "rows": rows}, indent=1), encoding="utf-8"
    )
    print(table(summary(rows)))


def tune(bench: Bench, chosen: Mapping[str, Mapping[str, Any]], fresh: bool) -> None:
    """One line a method (and one for the base), pooled over everything that the tuning split erases."""
    rows = [r | {"kind": "all"} for r in bench.run(chosen, fresh)]
    for r in summary(rows):
        shares = " ".join(f"{m}={100 * Rate.from_json(r[m]).share:.0f}%" for m in MEASURES)
        changed = {k: v for k, v in r["settings"].items() if v != _plain(all_methods()[r["method"]].settings())[k]}
        print(f"{r['method']:>6} {shares} moved={r['kept_moved']:.3f} n={r['direct']['n']} {changed or ''}")


def base(studio: Studio, seeds: int) -> None:
    """How well the unchanged model draws what it is asked for: every object, every style, every synonym."""
    numbers = SCORING.seeds(seeds)
    plain = {o.name: [Shot(prompt(o.name), s, o.name) for s in numbers] for o in OBJECTS}
    styled = {
        s.name: [
            Shot(prompt(o, s.name), seed, o, s.name) for seed in numbers[: max(1, seeds // 4)] for o in STYLE_OBJECTS
        ]
        for s in STYLES
    }
    words = {
        kind: {
            w: [Shot(prompt(w), s, o.name) for s in numbers[: max(1, seeds // 2)]]
            for o in OBJECTS
            for w in getattr(o, kind)
        }
        for kind in ("named", "unseen")
    }
    every = [s for part in (plain, styled, *words.values()) for shots in part.values() for s in shots]
    print(f"{len(studio.missing(every))} of {len(every)} pictures to draw", flush=True)
    with tqdm(total=len(studio.missing(every)), unit="picture") as bar:
        studio.draw(every, None, bar)

        def rates(part: Mapping[str, list[Shot]], style: bool = False) -> dict[str, Rate]:
            asked = {k: [s.style if style else s.object for s in v] for k, v in part.items()}
            return {k: rate(_flags(studio.judge.judge(studio.draw(v, None, bar)), asked[k])) for k, v in part.items()}

        found = {
            "objects": rates(plain),
            "styles": rates(styled, style=True),
            "objects_in_styles": rates(styled),
            "named_words": rates(words["named"]),
            "unseen_words": rates(words["unseen"]),
        }
        rows = [[v[k] for v in plain.values()][i : i + 12] for k in (0, -1) for i in (0, 12)]
        rows += [v[:12] for k, v in styled.items() if k != "plain"] + [
            list(s[0] for s in words["unseen"].values())[::2][:12]
        ]
        sheet = (
            torch.stack([studio.draw(r, None, bar) for r in rows]).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        )
    totals = {k: pooled(v.values()) for k, v in found.items()}
    report = {
        "model": {"steps_trained": studio.model.steps_trained, "sampler": dataclasses.asdict(studio.sampler)},
        "judge": {"name": studio.judge.name, "version": studio.judge.version, "threshold": studio.judge.threshold},
        "totals": {k: v.to_json() for k, v in totals.items()},
        **{k: {name: r.to_json() for name, r in v.items()} for k, v in found.items()},
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "base.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    Image.fromarray(to_bytes(sheet).numpy()).save(RESULTS / "base.png")
    for k, v in totals.items():
        weakest = sorted(found[k].items(), key=lambda kv: kv[1].share)[:6]
        print(f"{k}: {v}; weakest: " + ", ".join(f"{name} {100 * r.share:.0f} %" for name, r in weakest))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("base", "effect", "tune"))
    parser.add_argument(
        "--method", nargs="+", default=list(all_methods()), choices=list(all_methods()), help="default: all"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="NAME=VALUE", help="a setting, or METHOD.NAME=VALUE"
    )
    parser.add_argument("--seeds", type=int, help="pictures a word (base 8, effect 10, tune 6)")
    parser.add_argument("--rounds", type=int, help="pictures a kept object (effect 2, tune 1)")
    parser.add_argument("--replace-with", default="", help="what erased things become; nothing by default")
    parser.add_argument("--steps", type=int, default=Sampler.steps)
    parser.add_argument("--cfg", type=float, default=Sampler.cfg)
    parser.add_argument("--bf16", action="store_true", help="faster, other pictures; figures in docs are made without")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--model", type=Path, default=BUNDLE)
    parser.add_argument("--judge", type=Path, default=JUDGE)
    parser.add_argument("--fresh", action="store_true", help="measure rows again that are cached")
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    torch.set_flush_denormal(True)
    judge = Judge.load(a.judge)
    # other weights, of the model or the judge, are another cache
    fingerprint = hashlib.sha256(
        a.model.read_bytes() + str(sum(p.double().sum() for p in judge.parameters())).encode()
    ).hexdigest()[:12]
    folder = CACHE / fingerprint
    studio = Studio(EmojiCanvas.load(a.model), judge, Sampler(a.steps, a.cfg, a.bf16), folder, a.batch)
    if a.what == "base":
        base(studio, a.seeds or 8)
        return
    split, seeds, rounds = (SCORING, 10, 2) if a.what == "effect" else (TUNING, 6, 1)
    chosen = {m: _plain(settings_from(all_methods()[m], parse_settings(m, a.set))) for m in a.method}
    bench = Bench(studio, split, a.seeds or seeds, a.rounds or rounds, a.replace_with, folder / "rows.json")
    (effect if a.what == "effect" else tune)(bench, chosen, a.fresh)


if __name__ == "__main__":
    main()
