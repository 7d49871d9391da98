"""One small node per registered method, its widgets made from the method's settings."""

from __future__ import annotations

import dataclasses
from enum import StrEnum

from comfy_api.latest import io

from ..erasure_core import MethodSpec, all_methods
from ..erasure_core.methods import settings_from
from .types import CATEGORY, Method


def widget(field: dataclasses.Field):
    """The input of a setting, with its range and tooltip."""
    tooltip, default = field.metadata["help"], field.default
    if isinstance(default, StrEnum):
        options = [choice.value for choice in type(default)]
        return io.Combo.Input(field.name, options=options, default=default.value, tooltip=tooltip)
    if isinstance(default, bool):
        return io.Boolean.Input(field.name, default=default, tooltip=tooltip)
    if isinstance(default, str):
        return io.String.Input(field.name, default=default, tooltip=tooltip)
    kind = io.Int if isinstance(default, int) else io.Float
    bounds = {"min": field.metadata["low"], "max": field.metadata["high"], "step": field.metadata["step"]}
    if kind is io.Float:
        bounds["round"] = 1e-8
    elif field.name == "seed":
        bounds["control_after_generate"] = False
    return kind.Input(field.name, default=default, tooltip=tooltip, **bounds)


def seed_widget(tooltip: str, **options):
    """A seed that stays. ComfyUI draws another after each run unless told not to, and then all that was trained, mined or
    measured from it would be done again, and no training could be resumed."""
    return io.Int.Input("seed", default=0, min=0, max=2**53, control_after_generate=False, tooltip=tooltip, **options)


def settings_of(spec: MethodSpec, values: dict) -> dict:
    """Widget values, checked: API calls can send anything, and ComfyUI 0.3.75 does not look at choices."""
    settings_from(spec, values)
    return dict(values)


def _node(spec: MethodSpec) -> type[io.ComfyNode]:
    class MethodNode(io.ComfyNode):
        @classmethod
        def define_schema(cls):
            return io.Schema(
                node_id=f"ErasureMethod{spec.name.upper()}",
                display_name=f"Method: {spec.title}",
                category=f"{CATEGORY}/methods",
                description=f"{spec.summary} Connect it to Erase Concept. Paper: {spec.paper}",
                inputs=[widget(f) for f in dataclasses.fields(spec.settings)],
                outputs=[Method.Output(display_name="method", tooltip="For the method input of Erase Concept.")],
            )

        @classmethod
        def execute(cls, **values) -> io.NodeOutput:
            return io.NodeOutput((spec.name, settings_of(spec, values)))

    MethodNode.__name__ = MethodNode.__qualname__ = f"Method{spec.name.upper()}"
    return MethodNode


def method_nodes() -> list[type[io.ComfyNode]]:
    """A node class for each method in the registry."""
    return [_node(spec) for spec in all_methods().values()]
