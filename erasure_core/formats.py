"""Files: one safetensors file that is a LoRA everywhere and an Erasure here.

Three layouts, all with the same header in the metadata key ``erasure``:
``lora`` (``lora_unet_*.lora_up/lora_down/alpha``: ComfyUI's Load LoRA, kohya, A1111, Forge; a change without factors as in
``full``), ``diffusers`` (``unet.*.lora_A/lora_B``: ``load_lora_weights``; a change without factors gets an identity as one),
``full`` (``diffusion_model.*.diff``: dense, ComfyUI's Load LoRA).

Reading trusts nothing: sizes, names, shapes, types and numbers are checked before anything is used; there is no pickle.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import names
from .artifact import Delta, Erasure, Header
from .concept import Concept, ConceptError, ConceptSpec, clean
from .port import Family

MAX_FILE_BYTES = 8 << 30
MAX_HEADER_BYTES = 8 << 20
MAX_JSON_CHARACTERS = 1 << 20
MAX_SITES = 5000
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_FORMAT = 1
_SITE = re.compile(r"^(input_blocks|output_blocks|middle_block)(\.[A-Za-z0-9_]+){1,12}$")
_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$", *(d + i for d in ("com", "lpt") for i in "123456789¹²³")}


class Layout(StrEnum):
    LORA = "lora"
    DIFFUSERS = "diffusers"
    FULL = "full"


class FileError(ValueError):
    """A file can't be read or written as an erasure; the message names the file, the fault, and what to do."""


def check_file_name(name: str) -> str:
    """A plain file name without folders, returned without a trailing ``.safetensors``.

    Raises:
        FileError: it is empty, too long, hidden, reserved, or could point outside its folder.
    """
    stem = name.strip()
    while stem.endswith(".safetensors"):
        stem = stem.removesuffix(".safetensors")
    if not stem or len(stem.encode(errors="replace")) > 150:
        raise FileError(f"name: {name[:60]!r} must have 1 to 150 characters")
    if any(c in '/\\:*?"<>|' for c in stem) or clean(stem) != stem or stem.startswith(".") or stem.endswith((".", " ")):
        raise FileError(
            f"name: {name[:60]!r} must be a plain file name, without folders, drive letters, '..' or any of /\\:*?\"<>|"
        )
    if stem.split(".")[0].rstrip().casefold() in _RESERVED:
        raise FileError(f"name: {stem!r} is reserved by Windows. Choose another one")
    return stem


def header_json(header: Header, sites: list[str], layout: Layout) -> str:
    return json.dumps(
        {
            "format": _FORMAT,
            "layout": layout.value,
            "method": header.method,
            "settings": dict(header.settings),
            "erase": [{"words": list(c.words), "to": c.to} for c in header.spec.erase],
            "keep": list(header.spec.keep),
            "family": {
                "name": header.family.name,
                "context_dim": header.family.context_dim,
                "num_res_blocks": header.family.num_res_blocks,
                "levels": header.family.levels,
            },
            "base": header.base,
            "version": header.version,
            "strength": header.strength,
            "sites": sites,
        },
        ensure_ascii=True,
    )


def tensors(erasure: Erasure, layout: Layout, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The named tensors of a file in ``layout``; nothing is shared between them. Changes of rank 0 are left out."""
    out: dict[str, Tensor] = {}
    family = erasure.header.family
    changes = {site: delta for site, delta in erasure.deltas.items() if delta.rank}
    if layout is Layout.DIFFUSERS:  # it has no name for a dense change
        changes = {site: delta.factored() for site, delta in changes.items()}
    widest = max((delta.rank for delta in changes.values() if delta.down is not None), default=0)

    def put(name: str, tensor: Tensor) -> None:
        out[name] = tensor.to("cpu", dtype).clone(memory_format=torch.contiguous_format)

    for site, delta in changes.items():
        if layout is Layout.FULL or delta.down is None:
            put(names.to_comfy(site) + ".diff", delta.dense())
        elif layout is Layout.LORA:
            base = names.to_kohya(site, family)
            put(base + ".lora_up.weight", delta.up)
            put(base + ".lora_down.weight", delta.down)
            out[base + ".alpha"] = torch.tensor(float(delta.rank))
        else:
            base = names.to_peft(site, family)
            # One rank for all: older diffusers scale layers of other ranks wrongly where a file has no alphas.
            more = widest - delta.rank
            put(base + ".lora_B.weight", torch.nn.functional.pad(delta.up, (0, more)))
            put(base + ".lora_A.weight", torch.nn.functional.pad(delta.down, (0, 0, 0, more)))
    return out


def save(
    erasure: Erasure, path: str | os.PathLike[str], *, layout: Layout = Layout.LORA, dtype: torch.dtype = torch.float32
) -> Path:
    """Write ``erasure`` to ``path``: first to a temporary file beside it, then in one move.

    Raises:
        FileError: nothing to save, a value does not fit ``dtype``, or the disk refuses. No half file is left.
    """
    path = Path(path)
    out = tensors(erasure, layout, dtype)
    if not out:
        raise FileError("erasure: it changes nothing (rank 0), so there is nothing to save")
    for name, tensor in out.items():
        if not torch.isfinite(tensor).all():
            raise FileError(f"erasure: {name} has values that {dtype} cannot hold. Save in full precision")
    words = ", ".join(c.name for c in erasure.header.spec.erase)
    metadata = {
        "erasure": header_json(erasure.header, [site for site, d in erasure.deltas.items() if d.rank], layout),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"Concept erasure: {words}"[:200],
        "modelspec.architecture": f"{erasure.header.family.name}/lora",
        "modelspec.implementation": "ComfyUI Concept Erasure",
        "modelspec.description": erasure.summary()[:2000],
    }
    return write(path, out, metadata)


def write(path: Path, contents: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file: first to a temporary file beside ``path``, then in one move.

    Raises:
        FileError: the disk refuses. No half file is left, and an older one stays as it was.
    """
    temporary = path.parent / f".erasure-{uuid.uuid4().hex}.tmp"
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors itself writes for the owner only
        save_file(dict(contents), temporary, dict(metadata))
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise FileError(
            f"{path.name}: could not be written ({error}). Free some space or choose another folder"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _text(value: Any, what: str, limit: int = 2000) -> str:
    if not isinstance(value, str) or len(value) > limit:
        raise FileError(f"header: {what} must be text of at most {limit} characters")
    return clean(value)


def _int(value: Any, what: str, low: int, high: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise FileError(f"header: {what} must be a whole number from {low} to {high}")
    return value


def _list(value: Any, what: str, limit: int) -> list[Any]:
    if not isinstance(value, list) or len(value) > limit:
        raise FileError(f"header: {what} must be a list of at most {limit} entries")
    return value


def _dict(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict) or len(value) > 100:
        raise FileError(f"header: {what} must be an object")
    return value


def parse_header(text: str) -> tuple[Header, list[str], Layout]:
    """Read the JSON of the metadata key ``erasure``; every field is checked.

    Raises:
        FileError: the first thing that is wrong with it.
    """
    if len(text) > MAX_JSON_CHARACTERS:
        raise FileError(f"header: {len(text)} characters, at most {MAX_JSON_CHARACTERS} are read")
    try:
        raw = _dict(json.loads(text), "it")
    except (ValueError, RecursionError) as error:  # ValueError: also numbers of thousands of digits
        if isinstance(error, FileError):
            raise
        raise FileError(f"header: it is not valid JSON ({type(error).__name__})") from None
    number = _int(raw.get("format"), "format", 0, 1 << 30)
    if number != _FORMAT:
        raise FileError(f"header: format {number} is not {_FORMAT}. Update Concept Erasure to read newer files")
    settings = _dict(raw.get("settings", {}), "settings")
    for key, value in settings.items():
        if not isinstance(value, str | int | float | bool) or len(str(value)) > 2000 or len(key) > 100:
            raise FileError("header: settings must be short plain values")
    settings = {clean(key): clean(value) if isinstance(value, str) else value for key, value in settings.items()}
    strength = raw.get("strength", 1.0)
    if not isinstance(strength, int | float) or isinstance(strength, bool) or not abs(strength) <= 1e6:
        raise FileError("header: strength must be a number")
    family = _dict(raw.get("family"), "family")
    erase = [_dict(c, "erase") for c in _list(raw.get("erase"), "erase", 1000)]
    try:
        spec = ConceptSpec(
            tuple(
                Concept(
                    tuple(_text(w, "word") for w in _list(c.get("words"), "words", 1000)) or ("",),
                    _text(c.get("to", ""), "to"),
                )
                for c in erase
            ),
            tuple(_text(k, "keep") for k in _list(raw.get("keep", []), "keep", 100_000)),
        )
    except ConceptError as error:
        raise FileError(f"header: {error}") from None
    sites = [_text(s, "site", 200) for s in _list(raw.get("sites"), "sites", MAX_SITES)]
    for site in sites:
        if not _SITE.match(site):
            raise FileError(f"header: {site[:60]!r} is not the name of a UNet weight")
    if len(set(sites)) != len(sites):
        raise FileError("header: sites are listed twice")
    layout_name = _text(raw.get("layout", "lora"), "layout", 20)
    if layout_name not in list(Layout):
        raise FileError(f"header: layout {layout_name!r} is unknown")
    header = Header(
        _text(raw.get("method"), "method", 100),
        settings,
        spec,
        Family(
            _text(family.get("name"), "family name", 60),
            _int(family.get("context_dim"), "context_dim", 1, 65536),
            _int(family.get("num_res_blocks"), "num_res_blocks", 1, 64),
            _int(family.get("levels"), "levels", 1, 64),
        ),
        _text(raw.get("base", ""), "base", 128),
        _text(raw.get("version", ""), "version", 40),
        float(strength),
    )
    return header, sites, Layout(layout_name)


def check_container(path: Path) -> None:
    """Refuse by the first bytes what is not a safetensors file, before any parser sees it."""
    if not path.is_file():
        raise FileError(f"{path.name}: there is no such file")
    try:
        size = path.stat().st_size
        with path.open("rb") as f:
            head = f.read(16)
    except OSError as error:
        raise FileError(f"{path.name}: it can't be read ({error.strerror})") from None
    if size > MAX_FILE_BYTES:
        raise FileError(f"{path.name}: {size >> 20} MiB is too large for an erasure")
    # A safetensors file starts with its header's length, which may look like these, but its ninth byte is a brace.
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and head[8:9] != b"{":
        raise FileError(
            f"{path.name}: this is a pickled file (.pt / .ckpt), which can run code. Only .safetensors files are read"
        )
    if len(head) < 10:
        raise FileError(f"{path.name}: it is empty or cut off. Copy or download it again")
    length = struct.unpack("<Q", head[:8])[0]
    if head[8:9] != b"{":
        raise FileError(f"{path.name}: this is not a safetensors file")
    if length > MAX_HEADER_BYTES:
        raise FileError(f"{path.name}: its header claims {length} bytes, at most {MAX_HEADER_BYTES} are read")
    if 8 + length > size:
        raise FileError(f"{path.name}: it is cut off. Copy or download it again")


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """The file as ``safe_open`` gives it, its first bytes checked before.

    Raises:
        FileError: missing, cut off, oversized, pickled, foreign or damaged.
    """
    check_container(path)
    try:
        with safe_open(path, framework="pt") as f:
            yield f
    except SafetensorError as error:
        raise FileError(f"{path.name}: damaged safetensors file ({error}). Copy or download it again") from None


def read_tensor(f: Any, name: str, ndim: int, path: Path) -> Tensor:
    """A tensor of an open file as float32, its type, size and numbers checked before it is used."""
    view = f.get_slice(name)
    shape = view.get_shape()
    if view.get_dtype() not in _DTYPES or len(shape) != ndim or math.prod(shape) > 1 << 30 or 0 in shape:
        raise FileError(
            f"{path.name}: {name} has type {view.get_dtype()} and shape {shape}, which an erasure never has"
        )
    tensor: Tensor = f.get_tensor(name).float()
    if not torch.isfinite(tensor).all():
        raise FileError(f"{path.name}: {name} contains values that are not numbers (NaN or infinite)")
    return tensor


def read_header(path: str | os.PathLike[str]) -> Header:
    """Only the header of an erasure file; cheap.

    Raises:
        FileError: as :func:`load`.
    """
    path = Path(path)
    with opened(path) as f:
        return parse_header(_erasure_key(f.metadata(), path))[0]


def _erasure_key(metadata: Mapping[str, str] | None, path: Path) -> str:
    if not metadata or "erasure" not in metadata:
        raise FileError(f"{path.name}: a safetensors file, but not an erasure. If it is a LoRA, use the Load LoRA node")
    return metadata["erasure"]


def load(path: str | os.PathLike[str]) -> Erasure:
    """Read an erasure from a file in any of the three layouts, as float32.

    Raises:
        FileError: missing, cut off, oversized, pickled, foreign, or with tensors that contradict the header.
    """
    path = Path(path)
    with opened(path) as f:
        header, sites, layout = parse_header(_erasure_key(f.metadata(), path))
        present = set(f.keys())
        deltas = {site: _read_delta(f, present, site, header.family, layout, path) for site in sites}
    if present:
        raise FileError(
            f"{path.name}: it holds {len(present)} tensors that its header does not name, first {min(present)!r:.80}"
        )
    return Erasure(header, deltas)


def _read_delta(f: Any, present: set[str], site: str, family: Family, layout: Layout, path: Path) -> Delta:
    def take(name: str, ndim: int) -> Tensor:
        if name not in present:
            raise FileError(f"{path.name}: {name} is missing; the file is incomplete")
        present.discard(name)
        return read_tensor(f, name, ndim, path)

    diff = names.to_comfy(site) + ".diff"
    if layout is Layout.FULL or diff in present:
        return Delta(take(diff, 2))
    try:
        base = names.to_kohya(site, family) if layout is Layout.LORA else names.to_peft(site, family)
    except ValueError as error:
        raise FileError(f"{path.name}: {error}") from None
    up_name, down_name = (
        (".lora_up.weight", ".lora_down.weight") if layout is Layout.LORA else (".lora_B.weight", ".lora_A.weight")
    )
    up, down = take(base + up_name, 2), take(base + down_name, 2)
    if up.shape[1] != down.shape[0]:
        raise FileError(
            f"{path.name}: the two factors of {site} do not fit ({tuple(up.shape)} and {tuple(down.shape)})"
        )
    if layout is Layout.LORA:
        alpha = float(take(base + ".alpha", 0))
        up = up * (alpha / up.shape[1])
    if not float(up.norm()) * float(down.norm()) < torch.finfo(torch.float32).max:
        raise FileError(f"{path.name}: the change of {site} is too large for any weight")
    return Delta(up, down)
