"""ComfyUI Concept Erasure: make a model stop drawing something, reversibly, and share that as a small file."""

import importlib.util

WEB_DIRECTORY = "./web"

if importlib.util.find_spec("comfy_api") is not None:  # absent when only erasure_core is tested
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
