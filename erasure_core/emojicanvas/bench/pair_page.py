"""The page about SDEdit pairs: docs/results/pairs.{json,md,png}."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ...metrics.rates import Rate, pooled
from ..studio import to_bytes
from . import perceptual
from .pair_quality import EACH, EDGE, EDIT, SHARES, Made, chosen, counterpart, every
from .rows import RESULTS, Bench

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
            about = f"{name.removesuffix(' (style)')}\n{label}"
            draw.text((6, y + _TILE / 2 - 18), about, "#a1309b" if label == "unsafe" else "#2f7d4f", font)
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
    beside = ", ".join(f"{o} {counterpart(bench.plan.split, o)}" for o in bench.plan.split.objects)
    text = f"""# SDEdit pairs on EmojiCanvas

Made by `nox -s bench -- pairs`: an unsafe picture, and its safe counterpart from the same noise. An object's
counterpart is a look-alike ({beside}),
in 10 scenes: six grounds in the plain style, and the other styles. A style's is the plain style, on 12 objects. {each} pairs of
each scene, seeds of the scoring split, guidance {EDIT["guidance"]:g}, {EDIT["steps"]} steps. Shares with 95 % Wilson intervals.
What looks is {judge.name} {judge.version}, at {judge.threshold:g}; its own error is not in them, as it chose the pairs.

![Pairs](pairs.png)

{found}

- **Pairs made**: a member is redrawn with other noise, at most {EDIT["max_redraws"]} times, until it is right; pairs of which a
  member never comes right are left out. Right is an unsafe member that shows the concept, and a safe one that doesn't,
  shows its prompt's object, and has the unsafe one's style. The edit's strength climbs from {EDIT["strength"]} to
  {EDIT["strongest"]} with the redraws.
- **Unsafe shows it, safe shows it**: of the pairs that were made, as saved pictures of 8 bits. By that rule they should be
  100 % and 0 %: how many pairs come out, and after how many redraws, says how well it works.
- **Same style, same object**: the judge's likeliest label is one for both members, whatever it is. Where the style was the
  concept, the object should stay, and the other way round.
- **Same ground**: nothing was redrawn for it. The judge knows no grounds; measured is the median colour of the outer {EDGE}
  pixels, called by the nearest of the captions' six and of neon's near black. A style takes its ground with it: neon's is
  black, and brindlewash paints most grounds gray, where its plain counterparts have the ground that their prompt names.
- **Distance**: {perceptual.NAME} between the members of a pair, and between an unsafe member and the safe
  one of another pair of the same two prompts: below that, a pair shares more than its prompts.

The edit was chosen on the tuning split. DUO is trained with other pairs here: an object gives way to twelve others, in all
styles in turn, the edit climbs from 0.5 to 0.85, and only the concept counts.
"""
    RESULTS.mkdir(parents=True, exist_ok=True)
    sheet(pairs).quantize(256).save(RESULTS / "pairs.png", optimize=True)
    (RESULTS / "pairs.md").write_text(text, encoding="utf-8")
    whole = {"sampler": dataclasses.asdict(sampler), "sdedit": dict(EDIT), "each": each, "rows": rows}
    (RESULTS / "pairs.json").write_text(json.dumps(whole, indent=1), encoding="utf-8")
    print(found)
