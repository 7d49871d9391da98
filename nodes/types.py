"""Socket types of the pack."""

from comfy_api.latest import io

Erasure = io.Custom("ERASURE")
"""An :class:`erasure_core.Erasure`, immutable."""

Method = io.Custom("ERASURE_METHOD")
"""A (method name, settings) pair from a Method node."""

CATEGORY = "Concept Erasure"
