"""The state of a training in a file, so that it can go on where it was cut off.

The file belongs to one very training: it is keyed by all that decides the outcome, and any other one starts anew and
overwrites it. It is a safetensors file, written in one move.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..checked import FileError
from ..formats import write

_METADATA, _SKETCH = "training", "sketch"
_SHARE = 20
_NEAR = 0.01
"""Half precision moves a sketch by a thousandth of its size, another text encoder by far more."""


@dataclass(frozen=True)
class Checkpoint:
    """Where a training keeps its state, and how often: at most once in ``seconds``; 0 is after every step."""

    path: Path
    seconds: float = 60.0
    key: str = ""
    sketch: tuple[float, ...] = ()
    """Numbers of what doesn't come out bit for bit the same in every session, such as text states; they must be near."""

    def of(self, *what: object, sketch: Sequence[float] = ()) -> Checkpoint:
        """The state of one very training, which is known by plain values and tensors, and by numbers near ``sketch``."""
        digest = hashlib.sha256(self.key.encode())
        for part in what:
            if isinstance(part, Tensor):
                whole = part.detach().cpu().contiguous()
                digest.update(f"{whole.dtype} {tuple(whole.shape)}".encode())
                digest.update(whole.view(torch.uint8).numpy().tobytes() if whole.numel() else b"")
            else:
                digest.update(json.dumps(part, sort_keys=True).encode())
        return replace(self, key=digest.hexdigest(), sketch=tuple(sketch))

    def pause(self, took: float) -> float:
        """Seconds from a save that took so many to the next one: large states take a twentieth of the time at most."""
        return max(self.seconds, _SHARE * took) if self.seconds else 0.0

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Write it in place of an older one.

        Raises:
            FileError: the disk refuses; the older one is still there.
        """
        plain = {name: x.detach().cpu().contiguous() for name, x in state.items()}
        write(self.path, plain, {_METADATA: self.key, _SKETCH: json.dumps(self.sketch)})

    def keep(self, state: Mapping[str, Tensor]) -> None:
        """:meth:`save`, but a disk that refuses costs no training: a warning says so, and the next one tries again."""
        try:
            self.save(state)
        except FileError as error:
            warnings.warn(f"the state of the training was not kept: {error}", stacklevel=2)

    def load(self) -> dict[str, Tensor] | None:
        """The state on the CPU, where there is a readable one of this very training, however large."""
        try:
            with safe_open(self.path, framework="pt") as f:
                if not self._is_ours(f):
                    return None
                return {name: f.get_tensor(name).clone() for name in f.keys()}  # noqa: SIM118
        except (OSError, SafetensorError):
            return None

    def remove(self) -> None:
        """The training has ended. A file of another training stays."""
        try:
            with safe_open(self.path, framework="pt") as f:
                ours = self._is_ours(f)
        except (OSError, SafetensorError):
            return
        if ours:
            self.path.unlink(missing_ok=True)

    def _is_ours(self, f: Any) -> bool:
        metadata = f.metadata() or {}
        if metadata.get(_METADATA) != self.key:
            return False
        one, other = torch.tensor(self.sketch), torch.tensor(json.loads(metadata.get(_SKETCH, "[]")))
        return one.shape == other.shape and bool((one - other).norm() <= _NEAR * one.norm())
