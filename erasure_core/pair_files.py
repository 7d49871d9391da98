"""Sets of concept pairs as files: safetensors with a checked header, as every file of the pack."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch

from .artifact import Header
from .checked import Checked
from .concept import Concept, ConceptSpec
from .formats import FileError, Layout, header_json, header_text, opened, parse_header, read_tensor, write
from .pairs import MAX_PAIRS, ConceptPairs, Scene
from .version import __version__

_METADATA, _SCENES = "concept_pairs", "concept_pairs_scenes"


def save_pairs(pairs: ConceptPairs, path: str | os.PathLike[str]) -> Path:
    """Write the set as one safetensors file: first beside ``path``, then in one move.

    Raises:
        FileError: values that are not numbers, a prompt that says nothing, or the disk refuses. No half file is left.
    """
    contents = {"unsafe": pairs.unsafe, "safe": pairs.safe}
    for name, latents in contents.items():
        if not torch.isfinite(latents).all():
            raise FileError(f"pairs: {name} has values that are not numbers. Make them again")
    try:
        first, *_ = [ConceptSpec((Concept((unsafe,), safe),)) for unsafe, safe in pairs.scenes]
    except ValueError as error:
        raise FileError(f"pairs: {error}") from None
    header = Header("sdedit", {"note": pairs.note[:2000]}, first, pairs.family, "", __version__)
    metadata = {
        _METADATA: header_json(header, [], Layout.LORA),
        _SCENES: json.dumps({"scenes": pairs.scenes, "shown": pairs.shown}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"Concept pairs: {pairs.scenes[0][0]}"[:200],
        "modelspec.implementation": "ComfyUI Concept Erasure",
        "modelspec.description": pairs.summary()[:2000],
    }
    plain = {
        k: x.detach().to("cpu", torch.float32).clone(memory_format=torch.contiguous_format) for k, x in contents.items()
    }
    return write(Path(path), plain, metadata)


def load_pairs(path: str | os.PathLike[str]) -> ConceptPairs:
    """Read a set.

    Raises:
        FileError: missing, cut off, oversized, pickled, foreign, or tensors that contradict each other.
    """
    path = Path(path)
    with opened(path) as f:
        header = _header(f.metadata(), path)
        scenes, shown = _read_scenes(f.metadata().get(_SCENES, ""))
        names = set(f.keys())
        if names != {"unsafe", "safe"}:
            raise FileError(f"{path.name}: a set of pairs holds 'unsafe' and 'safe', not {sorted(names)!r:.80}")
        unsafe, safe = (read_tensor(f, name, 4, path) for name in ("unsafe", "safe"))
    if len(unsafe) > MAX_PAIRS:
        raise FileError(f"{path.name}: {len(unsafe)} pairs, at most {MAX_PAIRS} are read")
    try:
        note = str(header.settings.get("note", ""))
        return ConceptPairs(unsafe, safe, scenes, header.family, note, shown)
    except ValueError as error:
        raise FileError(f"{path.name}: {error}") from None


def _read_scenes(text: str) -> tuple[tuple[Scene, ...], tuple[int, ...]]:
    read = Checked("scenes")
    raw = read.parse(text)
    scenes: list[Scene] = []
    for entry in read.entries(raw.get("scenes"), "scenes", MAX_PAIRS):
        unsafe, safe = (read.text(x, "prompt") for x in read.entries(entry, "scene", 2) + [None] * (2 - len(entry)))
        scenes.append((unsafe, safe))
    shown = [read.whole(n, "shown", 0, MAX_PAIRS) for n in read.entries(raw.get("shown"), "shown", MAX_PAIRS)]
    return tuple(scenes), tuple(shown)


def read_pairs_header(path: str | os.PathLike[str]) -> Header:
    """Only the header of a set; cheap.

    Raises:
        FileError: as :func:`load_pairs`.
    """
    path = Path(path)
    with opened(path) as f:
        return _header(f.metadata(), path)


def _header(metadata: Mapping[str, str] | None, path: Path) -> Header:
    return parse_header(header_text(metadata, _METADATA, path, "a set of pairs. Save one with Save Concept Pairs"))[0]
