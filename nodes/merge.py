"""Merge Erasures."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..erasure_core import merge
from ..erasure_core.artifact import same_base
from ..erasure_core.fusion import beyond_words
from .erase_notes import doubted
from .modes import ordinary_tensors
from .patching import apply_erasure, check_without
from .port import ComfyPort
from .types import CATEGORY, Erasure


class MergeErasures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureMerge",
            display_name="Merge Erasures",
            category=CATEGORY,
            description="Joins several erasures into one, so that each still does what it does on its own words and disturbs "
            "the others less than stacking them would. Save the result as one file.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model from before the erasures, of the family that they were made for."
                ),
                io.Clip.Input("clip", tooltip="Its CLIP: the words are encoded again."),
                Erasure.Input("erasure_1", tooltip="From Erase Concept or Load Erasure."),
                Erasure.Input("erasure_2", tooltip="From Erase Concept or Load Erasure."),
                Erasure.Input("erasure_3", optional=True, tooltip="From Erase Concept or Load Erasure."),
                Erasure.Input("erasure_4", optional=True, tooltip="From Erase Concept or Load Erasure."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model with all of them, at full strength."),
                Erasure.Output(display_name="erasure", tooltip="For Apply Erasure (with a strength) and Save Erasure."),
                io.String.Output(display_name="report", tooltip="What was joined."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, erasure_1, erasure_2, erasure_3=None, erasure_4=None) -> io.NodeOutput:
        named = {
            f"erasure_{n}": e for n, e in enumerate((erasure_1, erasure_2, erasure_3, erasure_4), 1) if e is not None
        }
        given = list(named.values())
        with ordinary_tensors():
            check_without(model, given)
            merged = merge(ComfyPort(model, clip), given)
            patched = apply_erasure(model, merged, 1.0)
        report = merged.summary(doubted(merged.header.spec, merged.header.family))
        first = merged.header.base
        if others := [name for name, e in named.items() if not same_base(first, e.header.base)]:
            report += (
                f"\nWARNING: {', '.join(others)}: made on another base model than erasure_1, whose base ({first}) the merged "
                "one names. What was made on another base may suppress less"
            )
        if aimed := [name for name, e in named.items() if beyond_words(e)]:
            report += (
                f"\nWARNING: {', '.join(aimed)}: made to hold against more than words, which merging does not keep. Put it on "
                "with an Apply Erasure of its own instead"
            )
        return io.NodeOutput(patched, merged, report, ui=ui.PreviewText(report))
