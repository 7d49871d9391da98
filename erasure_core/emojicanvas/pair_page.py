"""The page about SDEdit pairs: docs/results/pairs.{json,md,png}."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..metrics.rates import Rate, pooled
from . import perceptual
from .bench_settings import PAIRS, SAFE_OBJECT
from .effect import RESULTS
from .pair_quality import EACH, EDGE, MAX_REDRAWS, SHARES, Made, chosen, every
from .rows import Bench
from .studio import to_bytes

_HEAD = ("concept", "pairs made", "unsafe shows it", "safe shows it", "same style", "same object", "same ground",
    "redraws unsafe + safe", "distance within", "between")  # fmt: skip
_TILE, _GAP, _SIDE, _ACROSS = 96, 2, 104, 10


def table(rows: Sequence[Mapping]) -> str:
    """A Markdown table of the concepts, and of all of them."""
    lines = ["| " + " | ".join(_HEAD) + " |", "|" + "---|" * len(_HEAD)]
    for r in rows:
        lines.append(_line(r["concept"], {s: Rate.from_json(r[s]) for s in SHARES}, [r]))
    whole = {s: pooled(Rate.from_json(r[s]) for r in rows) for s in SHARES}
    lines.append(_line("all", whole, rows))
    return "\n".join(lines)


def _line(name: str, shares: Mapping[str, Rate], rows: Sequence[Mapping]) -> str:
    made = f"{shares['made'].hits} of {shares['made'].n}"
    redraws = " + ".join(str(sum(r[k] for r in rows)) for k in ("unsafe_redraws", "safe_redraws"))
    far = []
    for kind in ("within", "between"):
        known = [r[kind] for r in rows if r[kind] is not None]
        far.append(f"{sum(known) / len(known):.2f}" if known else "-")
    return "| " + " | ".join([name, made, *(str(shares[s]) for s in SHARES[1:]), redraws, *far]) + " |"


def sheet(pairs: Mapping[str, Made]) -> Image.Image:
    """For each concept a row of unsafe members above one of their safe counterparts."""
    step = _TILE + _GAP
    block = 2 * step + 14
    picture = Image.new("RGB", (_SIDE + _ACROSS * step, len(pairs) * block), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(13)
    for k, (name, made) in enumerate(pairs.items()):
        shown = chosen(made, _ACROSS)
        for row, (label, members) in enumerate((("unsafe", made.unsafe), ("safe", made.safe))):
            y = k * block + row * step
            draw.text((6, y + _TILE / 2 - 18), f"{name}\n{label}", "#a1309b" if label == "unsafe" else "#2f7d4f", font)
            for column, i in enumerate(shown):
                picture.paste(_tile(members[i]), (_SIDE + column * step, y))
    return picture


def _tile(member: Tensor) -> Image.Image:
    pixels = to_bytes(member).permute(1, 2, 0).contiguous().numpy()
    return Image.fromarray(pixels).resize((_TILE, _TILE), Image.Resampling.LANCZOS)


def pairs_page(bench: Bench, each: int = EACH) -> None:
    """Make the pairs of everything that the split erases, look at them, and write the page."""
    rows, pairs = every(bench, each)
    sampler, judge = bench.plan.sampler, bench.studio.judge
    found = table(rows)
    text = f"""# SDEdit pairs on EmojiCanvas

Made by `nox -s bench -- pairs{" --bf16" if sampler.bf16 else ""}`: an unsafe picture, and its safe counterpart from the same noise, {each} pairs of
each of 10 scenes an object (a {SAFE_OBJECT} in its place; six grounds in the plain style, and the other styles) and 12 a style
(in its place the plain style; twelve objects). Strength {PAIRS["strength"]}, guidance {PAIRS["guidance"]:g}, {PAIRS["steps"]} steps; seeds of the scoring split.
Shares with 95 % Wilson intervals. What looks is {judge.name} {judge.version}, at {judge.threshold:g}.

![Pairs](pairs.png)

{found}

- **Pairs made**: a member is redrawn with other noise, at most {MAX_REDRAWS} times, until the judge sees the concept in the unsafe
  one, or no longer in the safe one; pairs of which a member never comes right are left out. The two shares behind it are of the
  pairs that were made, as saved pictures of 8 bits: by that rule they should be 100 % and 0 %, so the count of pairs and the
  redraws say how well the method works.
- **Same style, same object**: the judge's likeliest label of both members is one, whatever it is. Where the style was the
  concept, the object should stay, and the other way round.
- **Same ground**: the judge knows no grounds. Measured is the median colour of the outer {EDGE} pixels, called by the nearest of the
  captions' six and of neon's near black. Neon has a ground of its own, so a plain counterpart can't keep it.
- **Distance**: {perceptual.NAME} between the members of a pair, and between an unsafe member and the safe one of another
  pair of the same two prompts: below that, a pair shares more than its prompts. Redraws of the safe member take other noise.
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    sheet(pairs).save(RESULTS / "pairs.png", optimize=True)
    (RESULTS / "pairs.md").write_text(text, encoding="utf-8")
    whole = {"sampler": dataclasses.asdict(sampler), "sdedit": PAIRS, "each": each, "rows": rows}
    (RESULTS / "pairs.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    print(found)
