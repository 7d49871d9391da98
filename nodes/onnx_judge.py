"""ONNX Judge: any classifier or detector file in models/erasure_judges."""

from __future__ import annotations

import os
from pathlib import Path

import folder_paths
from comfy_api.latest import io, ui

from ..erasure_core import FileError
from ..erasure_core.integrations.onnx_judge import (
    MAX_SIDE,
    OnnxJudge,
    Outputs,
    Pixels,
    labels_beside,
    parse_groups,
    parse_labels,
    weights_of,
)
from .judges import threshold_widget
from .modes import ordinary_tensors
from .saved import LINKED, meant, portable
from .types import CATEGORY, Judge

FOLDER = "erasure_judges"
_NONE = "(no .onnx file in models/erasure_judges)"

folder_paths.add_model_folder_path(FOLDER, os.path.join(folder_paths.models_dir, FOLDER))


class JudgeONNX(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureJudgeONNX",
            display_name="ONNX Judge",
            category=f"{CATEGORY}/judges",
            description="Any picture classifier or detector as a judge: put its .onnx file into models/erasure_judges. Needs "
            "the Python package onnxruntime; nothing is downloaded.",
            inputs=[
                io.Combo.Input(
                    "file",
                    options=judge_files() or [_NONE],
                    tooltip="Files in models/erasure_judges. Press R to refresh.",
                ),
                io.String.Input(
                    "labels",
                    multiline=True,
                    default="",
                    placeholder="one label a line, in the model's order",
                    tooltip="What the outputs mean, in order. Empty: read from a .txt or .json file of the same name.",
                ),
                io.String.Input(
                    "groups",
                    multiline=True,
                    default="",
                    placeholder="nudity = FEMALE_BREAST_EXPOSED, BUTTOCKS_EXPOSED",
                    tooltip="Further concepts, each made of labels: name = label, label. One a line.",
                ),
                io.Combo.Input(
                    "pixels",
                    options=[p.value for p in Pixels],
                    default=Pixels.UNIT.value,
                    tooltip="How the model was trained to read colours; its page says so. Wrong, and it sees little.",
                ),
                io.Combo.Input(
                    "outputs",
                    options=[o.value for o in Outputs],
                    default=Outputs.SOFTMAX.value,
                    tooltip="softmax: one label is right. sigmoid: several may be. none: the model gives probabilities itself, "
                    "as most detectors do.",
                ),
                threshold_widget(),
                io.Int.Input(
                    "side",
                    default=224,
                    min=16,
                    max=MAX_SIDE,
                    tooltip="Size of its pictures, only where the file leaves it open.",
                ),
            ],
            outputs=[
                Judge.Output(display_name="judge", tooltip="For every node that has a judge input."),
                io.String.Output(display_name="report", tooltip="What it knows."),
            ],
        )

    @classmethod
    def validate_inputs(cls, file, groups):
        try:
            if file is not None:
                resolve(file)
            if groups is not None:
                parse_groups(groups)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def fingerprint_inputs(cls, file, **_):
        if file is None:
            return LINKED
        path = resolve(file)
        read = (*weights_of(path), path.with_suffix(".txt"), path.with_suffix(".json"))
        return ":".join(f"{p.name}:{p.stat().st_mtime_ns}:{p.stat().st_size}" for p in read if p.is_file())

    @classmethod
    def execute(cls, file, labels, groups, pixels, outputs, threshold, side) -> io.NodeOutput:
        path = resolve(file)
        for what, value, kind in (("pixels", pixels, Pixels), ("outputs", outputs, Outputs)):
            if value not in list(kind):  # ComfyUI 0.3.75 does not look at what API calls send for a choice
                raise ValueError(f"{what}: {value!r} is not one of {', '.join(kind)}")
        names = parse_labels(labels) or labels_beside(path)
        if not names:
            raise ValueError(
                f"labels: write what the outputs of {path.name} mean, one a line, or put {path.stem}.txt beside the file"
            )
        with ordinary_tensors():
            judge = OnnxJudge(
                path, names, groups=parse_groups(groups), pixels=Pixels(pixels), outputs=Outputs(outputs),
                threshold=threshold, side=side,
            )  # fmt: skip
        report = f"{judge.name} knows: {', '.join(judge.labels or ())}"[:2000]
        return io.NodeOutput(judge, report, ui=ui.PreviewText(report))


def judge_files() -> list[str]:
    """The .onnx files that ComfyUI lists in models/erasure_judges."""
    return sorted(_listed())


def _listed() -> dict[str, str]:
    """The name that ComfyUI has for each entry of the list."""
    names = folder_paths.get_filename_list(FOLDER)
    return {portable(name): name for name in names if name.lower().endswith(".onnx")}


def resolve(file: str) -> Path:
    """The path of a listed file, or of what :func:`meant` takes for it; nothing else is reachable.

    Raises:
        FileError: it isn't listed, or could be several.
    """
    listed = _listed()
    entry = meant(file, listed, lambda: listed)
    path = None if entry is None else folder_paths.get_full_path(FOLDER, listed[entry])
    if path is None:
        raise FileError(
            f"file: {file[:80]!r} is not in models/{FOLDER}. Put an .onnx file there and choose it from the list"
        )
    return Path(path)
