"""ONNX files of a few hundred bytes, written by hand: the package onnx is not needed to make them.

An ONNX file is one protobuf message; only the handful of fields below are used (onnx.proto has the numbers).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

Shape = Sequence[int | str]
_FLOAT, _INT64, _INTS = 1, 7, 7


def _varint(n: int) -> bytes:
    out = b""
    while n > 0x7F:
        out, n = out + bytes([n & 0x7F | 0x80]), n >> 7
    return out + bytes([n])


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _tensor_type(name: str, shape: Shape) -> bytes:
    dims = b"".join(_field(1, _field(1, d) if isinstance(d, int) else _field(2, d)) for d in shape)
    return _field(1, name) + _field(2, _field(1, _field(1, _FLOAT) + _field(2, dims)))


def _node(op: str, inputs: Sequence[str], output: str, **ints: Sequence[int] | int) -> bytes:
    out = b"".join(_field(1, i) for i in inputs) + _field(2, output) + _field(4, op)
    for name, value in ints.items():
        if isinstance(value, int):
            out += _field(5, _field(1, name) + _field(3, value) + _field(20, 2))
        else:
            out += _field(5, _field(1, name) + b"".join(_field(8, v) for v in value) + _field(20, _INTS))
    return out


def _constant(name: str, values: Sequence[int]) -> bytes:
    raw = struct.pack(f"<{len(values)}q", *values)
    return _field(1, len(values)) + _field(2, _INT64) + _field(8, name) + _field(9, raw)


def _write(path: Path, shape: Shape, out_shape: Shape, nodes: Sequence[bytes], constants: Sequence[bytes] = ()) -> Path:
    graph = b"".join(_field(1, n) for n in nodes) + _field(2, "g") + b"".join(_field(5, c) for c in constants)
    graph += _field(11, _tensor_type("x", shape)) + _field(12, _tensor_type("y", out_shape))
    path.write_bytes(_field(1, 8) + _field(8, _field(1, "") + _field(2, 13)) + _field(7, graph))
    return path


def mean_colour(path: Path, shape: Shape = ("n", 3, 8, 8)) -> Path:
    """A classifier of three outputs, the mean red, green and blue of a picture, channels first."""
    nodes = [_node("GlobalAveragePool", ["x"], "mean"), _node("Flatten", ["mean"], "y")]
    return _write(path, shape, (shape[0], 3), nodes)


def mean_colour_last(path: Path, shape: Shape = (1, 8, 8, 3)) -> Path:
    """The same, channels last."""
    nodes = [
        _node("Transpose", ["x"], "turned", perm=[0, 3, 1, 2]),
        _node("GlobalAveragePool", ["turned"], "mean"),
        _node("Flatten", ["mean"], "y"),
    ]
    return _write(path, shape, (shape[0], 3), nodes)


def detector(path: Path, side: int = 8, *, anchors_last: bool = True) -> Path:
    """A YOLO head over pixels: box numbers (red, green, blue, red) and two classes, green and blue; each pixel an anchor."""
    nodes = [
        _node("Concat", ["x", "x"], "six", axis=1),
        _node("Reshape", ["six", "shape"], "flat" if not anchors_last else "y"),
    ]
    if not anchors_last:
        nodes.append(_node("Transpose", ["flat"], "y", perm=[0, 2, 1]))
    shape = (1, 6, side * side) if anchors_last else (1, side * side, 6)
    return _write(path, (1, 3, side, side), shape, nodes, [_constant("shape", (1, 6, side * side))])


def flat(path: Path) -> Path:
    """Takes a list of numbers rather than a picture."""
    return _write(path, (1, 3), (1, 3), [_node("Identity", ["x"], "y")])


def gray(path: Path) -> Path:
    """Takes pictures of one colour."""
    return _write(
        path, (1, 1, 8, 8), (1, 1), [_node("GlobalAveragePool", ["x"], "mean"), _node("Flatten", ["mean"], "y")]
    )
