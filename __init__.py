"""ComfyUI Concept Erasure: make a model stop drawing something, reversibly, and share that as a small file."""

import importlib.util
import sys

WEB_DIRECTORY = "./web"

if sys.version_info < (3, 11):  # noqa: UP036  (ComfyUI runs what is in custom_nodes, whatever pyproject.toml asks for)
    raise ImportError(
        f"ComfyUI Concept Erasure needs Python 3.11 or newer, and this is Python {sys.version_info[0]}.{sys.version_info[1]}. "
        "Install ComfyUI with a newer Python; until then none of its nodes are there"
    )

if importlib.util.find_spec("folder_paths") is not None:  # of ComfyUI; absent when only erasure_core is tested
    if importlib.util.find_spec("comfy_api") is None or importlib.util.find_spec("comfy_api.latest") is None:
        raise ImportError(
            "ComfyUI Concept Erasure needs ComfyUI 0.3.75 or newer, and this one is older: it has no comfy_api.latest. Update "
            "ComfyUI; until then none of its nodes are there"
        )
    from .nodes import comfy_entrypoint

    __all__ = ["WEB_DIRECTORY", "comfy_entrypoint"]
