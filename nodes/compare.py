"""Compare Erasures: erasures at several strengths, the same prompts and seeds, on one sheet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import comfy.utils
import torch
from comfy_api.latest import io, ui
from PIL import Image
from torch import Tensor

from ..erasure_core import Erasure as CoreErasure
from ..erasure_core import all_methods
from ..erasure_core.metrics.judged import JudgedBy
from ..erasure_core.metrics.rates import Rate, rate
from .methods import seed_widget
from .modes import ordinary_tensors
from .patching import apply_erasure, check_ungated
from .sampling import Drawing, decode, encode, sample, widgets
from .sheet import sheet, to_image, to_tensor
from .types import CATEGORY, Erasure, Judge

_COUNT = 6
_AS_IT_IS = "as it is"
_LOW, _HIGH, _MOST = -2.0, 3.0, 12
_PREVIEW = 1024


@dataclass(frozen=True, eq=False)
class Variant:
    """One model of the comparison: an erasure at a strength, or none."""

    label: str
    strength: float
    erasure: CoreErasure | None = None

    @property
    def title(self) -> str:
        return self.label if self.erasure is None or self.strength == 1 else f"{self.label} x {self.strength:g}"


@dataclass
class Seen:
    """What was drawn, by variant and prompt."""

    variants: Sequence[Variant]
    prompts: Sequence[str]
    pictures: dict[tuple[Variant, str], list[Image.Image]] = field(default_factory=dict)
    shares: dict[tuple[Variant, str], Rate] = field(default_factory=dict)

    def cell(self, variant: Variant, prompt: str) -> list[Image.Image]:
        return self.pictures.get((variant, prompt), [])

    def caption(self, variant: Variant, prompt: str) -> str:
        share = self.shares.get((variant, prompt))
        return "" if share is None else f"{share.hits} of {share.n}"

    def sheet(self, notes: Sequence[str], tile: int) -> Image.Image:
        """Several prompts: a row for each variant, a column for each prompt. One: erasures against strengths."""
        base, *others = self.variants
        if len(self.prompts) > 1:
            grid = [[(v, p) for p in self.prompts] for v in self.variants]
            rows, columns = [v.title for v in self.variants], list(self.prompts)
        else:
            rows = list(dict.fromkeys(v.label for v in others)) or [base.label]
            strengths = list(dict.fromkeys(v.strength for v in others))
            (prompt,), columns = self.prompts, [_AS_IT_IS, *(f"strength {s:g}" for s in strengths)]
            grid = [[(v, prompt) for v in (base, *(v for v in others if v.label == row))] for row in rows]
            notes = [f'"{prompt}"', *notes]
        seeds = max((len(x) for x in self.pictures.values()), default=1)
        return sheet(
            [[self.cell(*key) for key in row] for row in grid], rows, columns,
            captions=[[self.caption(*key) for key in row] for row in grid] if self.shares else (),
            notes=notes, tile=tile, across=min(seeds, 4 if len(self.prompts) > 1 else 2),
        )  # fmt: skip


def strengths_of(text: str) -> list[float]:
    """Numbers by commas or lines, 0 left out: it is there anyway.

    Raises:
        ValueError: something else, or too many.
    """
    parts = [x.strip() for x in text.replace("\n", ",").split(",") if x.strip()]
    try:
        found = list(dict.fromkeys(float(x) for x in parts))
    except ValueError:
        raise ValueError(f"strengths: {text.strip()!r} must be numbers by commas, for example 0.5, 1") from None
    if len(found) > _MOST or not all(_LOW <= x <= _HIGH for x in found):
        raise ValueError(f"strengths: at most {_MOST} numbers from {_LOW:g} to {_HIGH:g}, got {text.strip()!r}")
    return [x for x in found if x]


def lines_of(text: str) -> list[str]:
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def labels_of(erasures: Sequence[CoreErasure], text: str) -> list[str]:
    """One for each erasure: the user's, or its method, numbered where two would read the same.

    Raises:
        ValueError: more labels than erasures.
    """
    given = [line.strip() for line in text.splitlines()] if text.strip() else []
    if len(given) > len(erasures):
        raise ValueError(
            f"labels: {len(given)} for {len(erasures)} erasures. Write one a line, in the order of the inputs"
        )
    known = all_methods()
    made: list[str] = []
    for number, erasure in enumerate(erasures):
        method = erasure.header.method
        name = (given[number] if number < len(given) else "") or (known[method].title if method in known else method)
        same = sum(label == name or label.startswith(f"{name} (") for label in made)
        made.append(f"{name} ({same + 1})" if same else name)
    return made


def look_for(text: str, prompts: Sequence[str]) -> list[str]:
    """What the judge looks for in the pictures of each prompt.

    Raises:
        ValueError: nothing, or neither one line nor one for each prompt.
    """
    wanted = [line.strip() for line in text.splitlines() if line.strip()]
    if len(wanted) == 1:
        return wanted * len(prompts)
    if len(wanted) != len(prompts):
        raise ValueError(
            f"concept: {len(wanted)} lines for {len(prompts)} prompts. Write what the judge should look for: one line for all "
            "prompts, or one line each"
        )
    return wanted


class CompareErasures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureCompare",
            display_name="Compare Erasures",
            category=CATEGORY,
            description="Draws the same prompts and seeds with up to six erasures at several strengths, beside the model as it "
            "is, and lays them out as one labelled sheet. A judge counts what is still there.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model without any erasure, with the LoRAs that it is used with."),
                io.Clip.Input("clip", tooltip="The CLIP that belongs to it."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to it."),
                io.String.Input(
                    "prompts",
                    multiline=True,
                    default="",
                    placeholder="a cigarette\na pencil",
                    tooltip="One a line. Several: a column each. A single one: erasures against strengths.",
                ),
                io.String.Input(
                    "strengths",
                    default="0.5, 1",
                    tooltip="By commas; each erasure is drawn at each. The model as it is (0) is always there, drawn once.",
                ),
                io.Int.Input(
                    "seeds", default=2, min=1, max=64, tooltip="Pictures of each cell; the same seeds in all of them."
                ),
                seed_widget("The first seed, the others follow. KSampler draws the same picture at the same seed."),
                *widgets(),
                io.Int.Input(
                    "tile",
                    default=192,
                    min=32,
                    max=1024,
                    step=8,
                    tooltip="Longer side of a picture on the sheet, in pixels. Small ones are enlarged by whole pixels only.",
                ),
                *(
                    Erasure.Input(f"erasure_{i}", optional=True, tooltip="From Erase Concept, Load or Merge Erasure.")
                    for i in range(1, _COUNT + 1)
                ),
                io.String.Input(
                    "labels",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="Names of the erasures on the sheet, one a line. Empty: their methods.",
                ),
                Judge.Input(
                    "judge", optional=True, tooltip="Counts, below each cell, the pictures that show the concept."
                ),
                io.String.Input(
                    "concept",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What the judge looks for: one line for all prompts, or one line for each.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="sheet", tooltip="The labelled sheet, one picture: for Save Image."),
                io.String.Output(
                    display_name="report", tooltip="A table (Markdown): how far pictures moved, and the judge's counts."
                ),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompts, strengths):
        try:
            if prompts is not None and not lines_of(prompts):  # None is linked: known only when the graph runs
                return "prompts: write at least one"
            if strengths is not None:
                strengths_of(strengths)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, prompts, strengths, seeds, seed, steps, cfg, sampler_name, scheduler, width, height, tile,
        labels="", judge=None, concept="", **erasures: Any,
    ) -> io.NodeOutput:  # fmt: skip
        lines, levels = lines_of(prompts), strengths_of(strengths)
        if not lines:
            raise ValueError("prompts: write at least one")
        given = [erasures[f"erasure_{i}"] for i in range(1, _COUNT + 1) if erasures.get(f"erasure_{i}") is not None]
        if given and not levels:
            raise ValueError("strengths: write at least one number other than 0, or no erasure is drawn")
        named = labels_of(given, labels)
        how = Drawing(steps, cfg, sampler_name, scheduler, width, height)
        how.check()
        check_ungated(model=model)
        variants = [
            Variant(_AS_IT_IS, 0.0),
            *(Variant(n, s, e) for n, e in zip(named, given, strict=True) for s in levels),
        ]
        wanted = None if judge is None else dict(zip(lines, look_for(concept, lines), strict=True))
        for word in set((wanted or {}).values()):
            judge.probability(torch.zeros(1, 3, 64, 64), word)  # says at once where it doesn't know one
        by = None if wanted is None else JudgedBy.of(judge, list(dict.fromkeys(wanted.values())))
        notes = [f"{steps} steps, cfg {cfg:g}, {sampler_name} / {scheduler}, seeds {seed} to {seed + seeds - 1}"]
        if wanted is not None and by is not None:
            looked = ", ".join(dict.fromkeys(wanted.values()))
            notes.append(f"counted: {looked}, by {by}; {by.note}")
        seen, total = Seen(variants, lines), len(variants) * len(lines) * seeds * steps
        bar, done, change = comfy.utils.ProgressBar(total), 0, {}
        with ordinary_tensors():
            # Patches are put on and taken off at each change of the variant, which is therefore the outer loop.
            conds = {prompt: encode(clip, prompt) for prompt in ("", *lines)}
            plain: dict[str, Tensor] = {}
            for variant in variants:
                patched = model if variant.erasure is None else apply_erasure(model, variant.erasure, variant.strength)
                for prompt in lines:

                    def step(share: float, before: int = done) -> None:
                        bar.update_absolute(before + round(share * seeds * steps), total)

                    each = range(seed, seed + seeds)
                    latents = sample(patched, conds[prompt], conds[""], each, how, at_once=1, step=step)
                    # One by one: in batches the last bits, and now and then a pixel, differ from KSampler's.
                    pictures, key = decode(vae, latents, at_once=1), (variant, prompt)
                    done += seeds * steps
                    seen.pictures[key] = [to_image(x) for x in pictures]
                    change[key] = float((pictures - plain.setdefault(prompt, pictures)).abs().mean())
                    if wanted is not None:
                        said = judge.probability(pictures.movedim(-1, 1), wanted[prompt])
                        seen.shares[key] = rate(said >= judge.threshold)
                    bar.update_absolute(done, total, ("JPEG", seen.sheet(notes, tile), _PREVIEW))
        made, report = to_tensor(seen.sheet(notes, tile)), table(seen, change, notes, by)
        return io.NodeOutput(
            made, report, ui=ui.PreviewImage(made, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        )


def table(
    seen: Seen, change: dict[tuple[Variant, str], float], notes: Sequence[str], by: JudgedBy | None = None
) -> str:
    """Markdown: a row for each variant; for each prompt the judge's count and how far the pictures moved, in percent."""
    head = ["erasure", "strength", *(p.replace("|", "/") for p in seen.prompts)]
    rows = [head, ["---"] * len(head)]
    for variant in seen.variants:
        cells = []
        for prompt in seen.prompts:
            share, moved = seen.shares.get((variant, prompt)), f"moved {100 * change[variant, prompt]:.1f} %"
            counted = "" if share is None or by is None else f"{share.hits} of {share.n} ({by.counted(share)}), "
            cells.append(counted + ("-" if variant.erasure is None and not counted else moved))
        rows.append([variant.label, f"{variant.strength:g}", *cells])
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    explained = "moved: mean difference of all pixels from the model as it is, of their whole range"
    return "\n".join([*lines, "", *notes, explained])
