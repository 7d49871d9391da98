"""The ComfyUI face of the pack; the only place that imports comfy."""

from .extension import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
