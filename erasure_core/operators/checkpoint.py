"""The state of a training in a file, so that it can go on where it was cut off.

The file belongs to one very training: it is keyed by all that decides the outcome, and any other one starts anew and
overwrites it. It is a safetensors file, written in one move.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..formats import FileError, opened, write

_METADATA = "training"


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, and how often: at most once in ``seconds``."""

    path: Path
    seconds: float = 60.0
    key: str = ""

    def of(self, *what: object) -> Checkpoint:
        """The state of one very training, which is known by plain values and tensors."""
        digest = hashlib.sha256(self.key.encode())
        for part in what:
            if isinstance(part, Tensor):
                whole = part.detach().cpu().contiguous()
                digest.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
                digest.update(whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
            else:
                digest.update(json.dumps(part, sort_keys=True).encode())
        return replace(self, key=digest.hexdigest())

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Write it in place of an older one.

        Raises:
            FileError: the disk refuses; the older one is still there.
        """
        plain = {name: x.detach().to("cpu", copy=True).contiguous() for name, x in state.items()}
        write(self.path, plain, {_METADATA: self.key})

    def load(self) -> dict[str, Tensor] | None:
        """The state, where there is a readable one of this very training."""
        try:
            with opened(self.path) as f:
                if (f.metadata() or {}).get(_METADATA) != self.key:
                    return None
                return {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118
        except FileError:
            return None

    def remove(self) -> None:
        """The training has ended. A file of another training stays."""
        if self.load() is not None:
            self.path.unlink(missing_ok=True)
