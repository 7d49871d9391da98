"""Judges from ONNX files, against what the same files must say of plain colours."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest
import tiny_onnx
import torch
from torch import Tensor

from erasure_core.integrations.onnx_judge import OnnxJudge, Outputs, Pixels, labels_beside, parse_groups, parse_labels
from erasure_core.metrics.judged import JudgedBy
from erasure_core.metrics.judges import Judge

pytestmark = pytest.mark.core
RGB = ("red", "green", "blue")


@pytest.fixture(autouse=True)
def _runtime() -> None:
    pytest.importorskip("onnxruntime")


def plain(*colours: tuple[float, float, float]) -> Tensor:
    return torch.tensor(colours)[:, :, None, None].expand(-1, -1, 20, 12)


@pytest.mark.parametrize("shape", [("n", 3, 8, 8), (1, 3, 8, 8), (2, 3, 8, 8), ("n", "c", "h", "w")], ids=str)
def test_a_classifier(tmp_path, shape) -> None:
    judge = OnnxJudge(tiny_onnx.mean_colour(tmp_path / "rgb.onnx", shape), RGB)
    assert isinstance(judge, Judge) and judge.labels == RGB and judge.name == "rgb"
    x = plain((1, 0, 0), (0, 1, 0), (0.2, 0.3, 0.4))
    expected = torch.tensor([[1, 0, 0], [0, 1, 0], [0.2, 0.3, 0.4]]).softmax(1)
    for i, label in enumerate(RGB):
        assert torch.allclose(judge.probability(x, label.upper()), expected[:, i], atol=1e-3)
    assert judge.probability(x[:0], "red").shape == (0,)
    with pytest.raises(ValueError, match=r"rgb does not know 'cat'. It knows: red, green, blue"):
        judge.probability(x, "cat")


def test_its_version_tells_files_and_readings_apart(tmp_path) -> None:
    file, same, other = (tmp_path / f"{name}.onnx" for name in ("rgb", "same", "other"))
    for path, shape in ((file, (1, 3, 8, 8)), (same, (1, 3, 8, 8)), (other, (2, 3, 8, 8))):
        tiny_onnx.mean_colour(path, shape)
    first = OnnxJudge(file, RGB).version
    assert first.startswith("onnx-") and first == OnnxJudge(same, RGB).version
    others = [
        OnnxJudge(other, RGB),
        OnnxJudge(file, RGB[::-1]),
        OnnxJudge(file, RGB, groups={"warm": ["red"]}),
        OnnxJudge(file, RGB, pixels=Pixels.SIGNED),
        OnnxJudge(file, RGB, outputs=Outputs.NONE),
    ]
    assert len({first, *(judge.version for judge in others)}) == 6
    (tmp_path / "same.onnx.data").write_bytes(b"weights")
    assert OnnxJudge(same, RGB).version != first


def test_channels_last(tmp_path) -> None:
    judge = OnnxJudge(tiny_onnx.mean_colour_last(tmp_path / "rgb.onnx"), RGB, outputs=Outputs.NONE)
    assert torch.allclose(judge.probability(plain((0.1, 0.6, 0.3)), "green"), torch.tensor([0.6]), atol=1e-5)


@pytest.mark.parametrize("anchors_last", [True, False])
def test_a_detector_counts_its_surest_box(tmp_path, anchors_last: bool) -> None:
    judge = OnnxJudge(
        tiny_onnx.detector(tmp_path / "d.onnx", anchors_last=anchors_last), ["g", "b"], outputs=Outputs.NONE
    )
    x = torch.zeros(1, 3, 8, 8)
    x[0, 1, 2, 5], x[0, 2, 7, 7] = 0.9, 0.4
    assert float(judge.probability(x, "g")) == pytest.approx(0.9)
    assert float(judge.probability(x, "b")) == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("pixels", "seen"),
    [
        (Pixels.UNIT, [0.1, 0.6, 0.3]),
        (Pixels.SIGNED, [-0.8, 0.2, -0.4]),
        (Pixels.BYTES, [25.5, 153.0, 76.5]),
        (Pixels.IMAGENET, [(0.1 - 0.485) / 0.229, (0.6 - 0.456) / 0.224, (0.3 - 0.406) / 0.225]),
        (Pixels.OPEN_NSFW, [76.5 - 104, 153.0 - 117, 25.5 - 123]),
    ],
)
def test_pixels_as_the_network_was_trained(pixels: Pixels, seen: list[float]) -> None:
    assert torch.allclose(pixels.scale(plain((0.1, 0.6, 0.3)))[0, :, 0, 0], torch.tensor(seen), atol=1e-4)


def test_groups_and_parts_of_labels(tmp_path) -> None:
    path = tiny_onnx.mean_colour(tmp_path / "rgb.onnx")
    x = plain((0.5, 0.25, 0.25))
    groups = parse_groups("warm = tomato, green\n\n all=red, green, blue")
    one = OnnxJudge(path, ["red, tomato", "green", "blue"], groups=groups)
    p = torch.tensor([0.5, 0.25, 0.25]).softmax(0)
    assert float(one.probability(x, "tomato")) == pytest.approx(float(p[0]), abs=1e-5)
    assert float(one.probability(x, "Warm")) == pytest.approx(float(p[0] + p[1]), abs=1e-5)
    assert one.labels is not None and {"warm", "all", "tomato", "red, tomato"} <= set(one.labels)
    assert JudgedBy.of(one).labels[:2] == ("warm = tomato, green", "all = red, green, blue"), (
        "results name what was counted"
    )
    assert JudgedBy.of(OnnxJudge(path, RGB)).labels == ("red", "green", "blue")
    many = OnnxJudge(path, RGB, groups={"warm": ["red", "green"]}, outputs=Outputs.SIGMOID)
    assert float(many.probability(x, "warm")) == pytest.approx(float(torch.tensor(0.5).sigmoid()), abs=1e-5)


@pytest.mark.parametrize("text", ["no sign", "= red", "warm ="])
def test_groups_that_say_nothing(text: str) -> None:
    with pytest.raises(ValueError, match="must read: name = label, label"):
        parse_groups(text)


def test_labels_beside_the_file(tmp_path) -> None:
    path = tmp_path / "x.onnx"
    assert labels_beside(path) == []
    as_json = tmp_path / "x.json"
    for form in (list(RGB), {"2": "blue", "0": "red", "1": "green"}, {"blue": 2, "red": 0, "green": 1},
                 {"model_type": "vit", "id2label": {"0": "red", "1": "green", "2": "blue"}}):  # fmt: skip
        as_json.write_text(json.dumps(form))
        assert labels_beside(path) == list(RGB)
    for broken in ("{", "[1, 2]", '{"a": "b"}', "3", "[" * 100_000):
        as_json.write_text(broken)
        with pytest.raises(ValueError, match=r"labels: x.json can't be read"):
            labels_beside(path)
    (tmp_path / "x.txt").write_text("red\r\n\ngreen\nblue \n")
    assert labels_beside(path) == list(RGB), "a .txt file comes first"
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"labels: x.txt can't be read"):
        labels_beside(path)


def test_files_that_are_no_judges(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"labels: 2 names, but rgb has outputs of shape \(1, 3\)"):
        OnnxJudge(tiny_onnx.mean_colour(tmp_path / "rgb.onnx", (1, 3, 8, 8)), RGB[:2])
    with pytest.raises(ValueError, match="groups: 'warm' names cat, which is not among the labels"):
        OnnxJudge(tmp_path / "rgb.onnx", RGB, groups={"warm": ["red", "cat"]})
    with pytest.raises(ValueError, match="must take one picture of 4 dimensions"):
        OnnxJudge(tiny_onnx.flat(tmp_path / "flat.onnx"), RGB)
    with pytest.raises(ValueError, match="not pictures of 3 colours"):
        OnnxJudge(tiny_onnx.gray(tmp_path / "gray.onnx"), RGB)
    with pytest.raises(ValueError, match="at most 4096"):
        OnnxJudge(tiny_onnx.mean_colour(tmp_path / "big.onnx", (1, 3, 100_000, 8)), RGB)
    (tmp_path / "broken.onnx").write_bytes(b"PK\x03\x04 something else")
    with pytest.raises(ValueError, match=r"broken.onnx can't be read as an ONNX model"):
        OnnxJudge(tmp_path / "broken.onnx", RGB)


def test_without_onnxruntime(tmp_path, monkeypatch) -> None:
    def missing(name: str):
        raise ImportError(name)

    path = tiny_onnx.mean_colour(tmp_path / "rgb.onnx")
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match="ONNX files need the package onnxruntime"):
        OnnxJudge(path, RGB)


def test_what_the_help_page_says_can_be_pasted() -> None:
    """Labels and groups of the files that it tells of: each group's labels are there, and so are the choices it names."""
    page = (Path(__file__).parents[2] / "web/docs/ErasureJudgeONNX.md").read_text(encoding="utf-8")
    nudenet, groups, open_nsfw = re.findall(r"```\n(.*?)```", page, re.DOTALL)
    labels = parse_labels(nudenet)
    assert len(set(labels)) == 18 and parse_labels(open_nsfw) == ["safe", "nsfw"]
    assert set(parse_groups(groups)["nudity"]) < set(labels)
    for pixels in re.findall(r"\*\*pixels\*\* \*([^*]+)\*,", page):
        assert pixels in list(Pixels)
    for outputs in re.findall(r"\*\*outputs\*\* \*([^*]+)\*,", page):
        assert outputs in list(Outputs)
