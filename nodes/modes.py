"""The border between ComfyUI, which runs nodes in inference mode, and the core, which needs ordinary tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def ordinary_tensors() -> Iterator[None]:
    """Leave ComfyUI's inference mode: tensors made inside can be changed, saved and differentiated."""
    with torch.inference_mode(False), torch.no_grad():
        yield


@contextmanager
def host_mode() -> Iterator[None]:
    """Back in ComfyUI's own mode, for all of its functions that may load, move or unload a model.

    Its weights are inference tensors. Moved to another device outside of inference mode they lose what makes them readable,
    for stock nodes too, until the model is loaded again. What comes out is an inference tensor: copy it outside.
    """
    with torch.inference_mode():
        yield
