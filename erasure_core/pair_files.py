"""Sets of concept pairs as files: safetensors with a checked header, as every file of the pack."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch

from .artifact import Header
from .concept import Concept, ConceptSpec
from .formats import FileError, Layout, header_json, opened, parse_header, read_tensor, write
from .pairs import MAX_PAIRS, ConceptPairs
from .version import __version__

_METADATA = "concept_pairs"


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
        spec = ConceptSpec((Concept((pairs.unsafe_prompt,), pairs.safe_prompt),))
    except ValueError as error:
        raise FileError(f"pairs: {error}") from None
    header = Header("sdedit", {"note": pairs.note[:2000]}, spec, pairs.family, "", __version__)
    metadata = {
        _METADATA: header_json(header, [], Layout.LORA),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"Concept pairs: {pairs.unsafe_prompt}"[:200],
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
        header = read_pairs_header(f.metadata(), path)
        names = set(f.keys())
        if names != {"unsafe", "safe"}:
            raise FileError(f"{path.name}: a set of pairs holds 'unsafe' and 'safe', not {sorted(names)!r:.80}")
        unsafe, safe = (read_tensor(f, name, 4, path) for name in ("unsafe", "safe"))
    if len(unsafe) > MAX_PAIRS:
        raise FileError(f"{path.name}: {len(unsafe)} pairs, at most {MAX_PAIRS} are read")
    concept = header.spec.erase[0]
    try:
        note = str(header.settings.get("note", ""))
        return ConceptPairs(unsafe, safe, concept.name, concept.to, header.family, note)
    except ValueError as error:
        raise FileError(f"{path.name}: {error}") from None


def read_pairs_header(metadata: Mapping[str, str] | None, path: Path) -> Header:
    """The header in a file's metadata; every field is checked.

    Raises:
        FileError: it is another kind of file, or a damaged header.
    """
    if not metadata or _METADATA not in metadata:
        raise FileError(f"{path.name}: a safetensors file, but not a set of pairs. Save one with Save Concept Pairs")
    return parse_header(metadata[_METADATA])[0]
