"""Apply Erasure."""

from __future__ import annotations

from comfy_api.latest import io

from .modes import ordinary_tensors
from .patching import apply_erasure
from .types import CATEGORY, Erasure


class ApplyErasure(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureApply",
            display_name="Apply Erasure",
            category=CATEGORY,
            description="Puts an erasure on a model at a strength. Moving the slider costs nothing: nothing is computed "
            "again. Put it behind LoRAs and other model patches, just before the sampler.",
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="The model from before the erasure, of the family that it was made for. Not the one that "
                    "Erase Concept hands out: that carries it already.",
                ),
                Erasure.Input("erasure", tooltip="From Erase Concept, Load Erasure or Merge Erasures."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=3.0,
                    step=0.05,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="0 is the untouched model, 1 the erasure as computed. Lower it if other things change, raise it "
                    "a little if traces remain; below 0 exaggerates the concept.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The patched model.")],
        )

    @classmethod
    def execute(cls, model, erasure, strength) -> io.NodeOutput:
        with ordinary_tensors():
            return io.NodeOutput(apply_erasure(model, erasure, strength))
