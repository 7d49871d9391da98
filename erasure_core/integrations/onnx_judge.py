"""Any ONNX classifier or detector file as a judge. Needs onnxruntime, which neither the core nor ComfyUI brings along.

What the file says of itself is read (input size and layout, batch, kind of output); what it does not say is chosen by hand:
the labels, how pixels are scaled, and what turns the outputs into probabilities.
"""

from __future__ import annotations

import hashlib
import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..metrics.judges import check_pictures, marked, unknown

MAX_LABELS = 100_000
MAX_SIDE = 4096
_MAX_LABEL_BYTES = 8 << 20
_BOX = 4  # numbers before the class scores of each anchor in a YOLO head
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_OPEN_NSFW_MEAN = (104.0, 117.0, 123.0)


class Pixels(StrEnum):
    """How the network was trained to see pictures."""

    UNIT = "0 to 1"
    SIGNED = "-1 to 1"
    BYTES = "0 to 255"
    IMAGENET = "ImageNet mean and deviation"
    OPEN_NSFW = "blue green red minus mean (open_nsfw)"

    def scale(self, x: Tensor) -> Tensor:
        """[N, 3, H, W] in [0, 1] -> as the network reads it."""
        match self:
            case Pixels.SIGNED:
                return 2 * x - 1
            case Pixels.BYTES:
                return 255 * x
            case Pixels.IMAGENET:
                mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in _IMAGENET)
                return (x - mean) / deviation
            case Pixels.OPEN_NSFW:
                return 255 * x.flip(1) - torch.tensor(_OPEN_NSFW_MEAN).view(3, 1, 1)
        return x


class Outputs(StrEnum):
    """What turns the outputs into probabilities."""

    SOFTMAX = "softmax"
    """One label is right."""
    SIGMOID = "sigmoid"
    """Any number of labels may be."""
    NONE = "none"
    """They are probabilities already; most detectors."""

    def probabilities(self, x: Tensor) -> Tensor:
        match self:
            case Outputs.SOFTMAX:
                return x.softmax(-1)
            case Outputs.SIGMOID:
                return x.sigmoid()
        return x.clamp(0, 1)


class OnnxJudge:
    """A classifier [N, K], or a detector of YOLO form [N, 4 + K, A] or [N, A, 4 + K], of which the surest box counts.

    Pictures are stretched to the network's size. A concept is a label, one of the names in a label ("tabby, tabby cat"), or
    a group: its labels' sum where one label is right, else the largest.

    Args:
        labels: names of the K outputs, in order.
        groups: further concepts, each a list of labels.
        side: size of the input where the file leaves it open.

    Raises:
        ValueError: onnxruntime is missing, or file, labels and groups don't fit each other; says what to do.
    """

    def __init__(
        self,
        path: Path,
        labels: Sequence[str],
        *,
        groups: Mapping[str, Sequence[str]] | None = None,
        pixels: Pixels = Pixels.UNIT,
        outputs: Outputs = Outputs.SOFTMAX,
        threshold: float = 0.5,
        side: int = 224,
    ) -> None:
        self.name, self.threshold = path.stem, threshold
        self._pixels, self._outputs = pixels, outputs
        self._session, self._input = _open(path)
        self._type = _TYPES[self._input.type]
        self._last, self._size = _layout(path, self._input.shape, side)
        fixed = self._input.shape[0]
        self._batch: int | None = fixed if isinstance(fixed, int) and fixed > 0 else None
        self._names = tuple(label.strip() for label in labels)
        self.groups = {name: tuple(parts) for name, parts in (groups or {}).items()}
        """Concepts that are made of labels. A judge that has such names their members in every result."""
        made_of = (self._names, self.groups, pixels.value, outputs.value, self._size)
        self.version = marked("onnx", *(_content(p) for p in weights_of(path)), json.dumps(made_of))
        self._members: dict[str, list[int]] = {}
        for index, label in enumerate(self._names):
            for name in dict.fromkeys([label, *(part.strip() for part in label.split(","))]):
                self._members.setdefault(name.casefold(), []).append(index)
        for group, parts in (groups or {}).items():
            missing = [p for p in parts if p.casefold() not in self._members]
            if missing or not parts:
                raise ValueError(
                    f"groups: {group!r} names {', '.join(missing) or 'nothing'}, which is not among the labels"
                )
            self._members[group.casefold()] = [i for p in parts for i in self._members[p.casefold()]]
        self.labels: tuple[str, ...] | None = tuple(dict.fromkeys([*(groups or {}), *self._all_names()]))
        self._scores(
            torch.zeros(1, 3, 8, 8)
        )  # a file that doesn't fit its labels is refused now, not in the middle of a run

    def _all_names(self) -> list[str]:
        return [name for label in self._names for name in dict.fromkeys([label, *map(str.strip, label.split(","))])]

    def probability(self, pictures: Tensor, concept: str) -> Tensor:
        members = self._members.get(concept.strip().casefold())
        if not members:
            raise unknown(self, concept)
        pictures = check_pictures(pictures).cpu()
        if not len(pictures):
            return torch.zeros(0)
        chosen = self._scores(pictures)[:, sorted(set(members))]
        return chosen.sum(1).clamp(max=1) if self._outputs is Outputs.SOFTMAX else chosen.amax(1)

    def _scores(self, pictures: Tensor) -> Tensor:
        """[N, K] probabilities."""
        x = self._pixels.scale(F.interpolate(pictures, self._size, mode="bilinear", antialias=True))
        x = x.movedim(1, -1) if self._last else x
        n = self._batch or 16
        out = []
        for part in x.split(n):
            short = n - len(part) if self._batch else 0
            full = torch.cat([part, part.new_zeros(short, *part.shape[1:])]) if short else part
            given = np.ascontiguousarray(full.numpy().astype(self._type))
            answer = self._session.run(None, {self._input.name: given})[0]
            out.append(self._read(torch.from_numpy(np.asarray(answer, dtype=np.float32)))[: len(part)])
        return torch.cat(out)

    def _read(self, x: Tensor) -> Tensor:
        """Class probabilities [N, K] from the network's first output."""
        k = len(self._names)
        if x.ndim == 3 and _BOX + k in x.shape[1:]:
            x = x if x.shape[1] == _BOX + k else x.movedim(2, 1)
            return self._outputs.probabilities(x[:, _BOX:].movedim(1, 2)).amax(1)
        flat = x.flatten(1)
        if flat.shape[1] != k:
            raise ValueError(
                f"labels: {k} names, but {self.name} has outputs of shape {tuple(x.shape)}. Write one label a line, in the "
                "order in which the network was trained"
            )
        return self._outputs.probabilities(flat)


def weights_of(path: Path) -> list[Path]:
    """The file, and what a large model has beside it: x.onnx.data."""
    return sorted(p for p in path.parent.glob(f"{escape(path.name)}*") if p.is_file())


def _content(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _open(path: Path) -> tuple[Any, Any]:
    """The session, and its one picture input."""
    try:
        runtime: Any = importlib.import_module("onnxruntime")
    except ImportError:
        raise ValueError(
            "judge: ONNX files need the package onnxruntime, which is not installed here. Install it with the Python that runs "
            "ComfyUI: python -m pip install onnxruntime"
        ) from None
    try:
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions share no other base
        raise ValueError(f"file: {path.name} can't be read as an ONNX model ({str(error)[:200]})") from None
    inputs = session.get_inputs()
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or inputs[0].type not in _TYPES:
        found = ", ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
        raise ValueError(
            f"file: {path.name} must take one picture of 4 dimensions as floats, but it takes {found:.200}"
        )
    return session, inputs[0]


def _layout(path: Path, shape: Sequence[Any], side: int) -> tuple[bool, tuple[int, int]]:
    """(channels last, (height, width)) of an input; sizes that it leaves open are ``side``."""
    last = shape[3] == 3 and shape[1] != 3
    if not last and isinstance(shape[1], int) and shape[1] != 3:
        raise ValueError(f"file: {path.name} takes inputs of shape {list(shape)}, which are not pictures of 3 colours")
    height, width = (n if isinstance(n, int) and n > 0 else side for n in (shape[1:3] if last else shape[2:4]))
    if max(height, width) > MAX_SIDE:
        raise ValueError(f"file: {path.name} wants pictures of {height} x {width}; at most {MAX_SIDE} are made")
    return last, (height, width)


def parse_labels(text: str) -> list[str]:
    """One label a line."""
    return [line.strip() for line in text.splitlines() if line.strip()]


def parse_groups(text: str) -> dict[str, list[str]]:
    """Lines of the form ``name = label, label``.

    Raises:
        ValueError: a line without a name or labels.
    """
    groups = {}
    for line in filter(str.strip, text.splitlines()):
        name, _, members = line.partition("=")
        found = [m.strip() for m in members.split(",") if m.strip()]
        if not name.strip() or not found:
            raise ValueError(f"groups: {line.strip()[:80]!r} must read: name = label, label")
        groups[name.strip()] = found
    return groups


def labels_beside(path: Path) -> list[str]:
    """Labels from a file of the same name that ends in .txt (one a line) or .json (a list, {"0": "cat"}, {"cat": 0}, or a
    Hugging Face config with id2label); empty where there is none.

    Raises:
        ValueError: the file is there, but not of these forms.
    """
    readers: dict[str, Callable[[str], list[str]]] = {".txt": parse_labels, ".json": _labels_of_json}
    for ending, read in readers.items():
        beside = path.with_suffix(ending)
        if not beside.is_file():
            continue
        if beside.stat().st_size > _MAX_LABEL_BYTES:
            raise ValueError(f"labels: {beside.name} is too large for a list of labels")
        try:
            labels = read(beside.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError, OSError) as error:
            raise ValueError(
                f"labels: {beside.name} can't be read ({str(error)[:100]}). Write one label a line"
            ) from None
        if len(labels) > MAX_LABELS:
            raise ValueError(f"labels: {beside.name} has {len(labels)} labels, at most {MAX_LABELS} are read")
        return labels
    return []


def _labels_of_json(text: str) -> list[str]:
    raw = json.loads(text)
    if isinstance(raw, dict) and isinstance(raw.get("id2label"), dict):
        raw = raw["id2label"]
    if isinstance(raw, dict):
        pairs = [(v, k) if isinstance(v, int) else (int(k), v) for k, v in raw.items()]
        raw = [label for _, label in sorted(pairs, key=lambda pair: pair[0])]
    if not isinstance(raw, list) or not all(isinstance(label, str) for label in raw):
        raise ValueError("it is no list of texts")
    return [label.strip() for label in raw]
