"""Gate Erasures: as much of each as the prompt resembles what it suppresses."""

from __future__ import annotations

from comfy_api.latest import io, ui

from ..erasure_core import gate_strengths, gated
from .modes import ordinary_tensors
from .patching import Gated, apply_erasure, check_without, gated_for
from .port import ComfyPort
from .types import CATEGORY, Erasure


class GateErasures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureGate",
            display_name="Gate Erasures",
            category=CATEGORY,
            description="Puts erasures on a model only as far as the prompt resembles what they suppress: fully where it names "
            "it, hardly where it is about something else. The way SPM is meant to be used; works for every erasure.",
            inputs=[
                io.Model.Input(
                    "model", tooltip="The model from before the erasures, of the family that they were made for."
                ),
                io.Clip.Input(
                    "clip", tooltip="Its CLIP: it reads the prompt and the words that the erasures suppress."
                ),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    default="",
                    tooltip="The prompt that the model will be sampled with. Link the same text into CLIP Text Encode.",
                ),
                Erasure.Input("erasure_1", tooltip="From Erase Concept or Load Erasure."),
                Erasure.Input("erasure_2", optional=True, tooltip="From Erase Concept or Load Erasure."),
                Erasure.Input("erasure_3", optional=True, tooltip="From Erase Concept or Load Erasure."),
                Erasure.Input("erasure_4", optional=True, tooltip="From Erase Concept or Load Erasure."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The model, patched for this prompt and no other."),
                io.String.Output(display_name="report", tooltip="The strength of each erasure."),
            ],
        )

    @classmethod
    def execute(cls, model, clip, prompt, erasure_1, erasure_2=None, erasure_3=None, erasure_4=None) -> io.NodeOutput:
        given = [e for e in (erasure_1, erasure_2, erasure_3, erasure_4) if e is not None]
        with ordinary_tensors():
            check_without(model, given)
            port = ComfyPort(model, clip)
            strengths = gate_strengths(port, given, prompt)
            patched = apply_erasure(model, gated(port, given, prompt), 1.0)
            patched = gated_for(patched, Gated(prompt, tuple(given), tuple(strengths)))
        report = "\n".join(
            f"{', '.join(c.name for c in erasure.header.spec.erase)}: strength {m:.2f}"
            for erasure, m in zip(given, strengths, strict=True)
        )
        return io.NodeOutput(patched, report, ui=ui.PreviewText(report))
