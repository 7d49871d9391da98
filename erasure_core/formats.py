"""Files: one safetensors file that is a LoRA everywhere and an Erasure here.

Three layouts, all with the same header in the metadata key ``erasure``:
``lora`` (``lora_unet_*.lora_up/lora_down/alpha``: ComfyUI's Load LoRA, kohya, A1111, Forge; a change without factors as in
``full``), ``diffusers`` (``unet.*.lora_A/lora_B``: ``load_lora_weights``; a change without factors gets an identity as one),
``full`` (``diffusion_model.*.diff``: dense, ComfyUI's Load LoRA).
An erasure's receipt is in the metadata key ``erasure_receipt``, with a digest of the numbers that the file reads back as.

Reading trusts nothing: sizes, names, shapes, types and numbers are checked before anything is used; there is no pickle.
"""

from __future__ import annotations

import math
import os
import struct
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from . import names
from .artifact import Delta, Erasure, Header, digest
from .checked import OR_NEWER, FileError, OtherKindError
from .concept import clean
from .header import Layout, header_json, parse_header
from .port import Family
from .receipt import Receipt
from .receipt_file import parse_receipt, receipt_json

MAX_FILE_BYTES = 8 << 30
MAX_HEADER_BYTES = 8 << 20
RECEIPT = "erasure_receipt"
_KIND = "an erasure. If it is a LoRA, use the Load LoRA node"
_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_ARCHITECTURES = {
    "sd15": "stable-diffusion-v1",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sdxl-refiner": "stable-diffusion-xl-v1-refiner",
}
"""The names that ModelSpec has for families; it has two for SD 2.x, by what the model predicts, which a header doesn't say."""
_KOHYA = {
    "sd15": {"ss_base_model_version": "sd_v1"},
    "sd20": {"ss_base_model_version": "sd_v2", "ss_v2": "True"},
    "sdxl": {"ss_base_model_version": "sdxl_base_v1-0"},
}
"""What kohya's trainer writes of families: A1111 and LoRA browsers sort by it."""
_RESERVED = {"con", "prn", "aux", "nul", "conin$", "conout$", *(d + i for d in ("com", "lpt") for i in "123456789¹²³")}


def check_file_name(name: str) -> str:
    """A plain file name without folders, returned without a trailing ``.safetensors``.

    Raises:
        FileError: it is empty, too long, hidden, reserved, or could point outside its folder.
    """
    stem = name.strip()
    while stem.endswith(".safetensors"):
        stem = stem.removesuffix(".safetensors")
    if not stem or len(stem.encode(errors="replace")) > 150:
        raise FileError(
            f"name: {name[:60]!r} must have 1 to 150 bytes: a letter of a to z is one, an accented one two, a Chinese one three"
        )
    if any(c in '/\\:*?"<>|' for c in stem) or clean(stem) != stem or stem.startswith(".") or stem.endswith((".", " ")):
        raise FileError(
            f"name: {name[:60]!r} must be a plain file name, without folders, drive letters, '..' or any of /\\:*?\"<>|"
        )
    if stem.split(".")[0].rstrip().casefold() in _RESERVED:
        raise FileError(f"name: {stem!r} is reserved by Windows. Choose another one")
    return stem


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
        FileError: nothing to save, a value does not fit ``dtype``, a header or receipt that could not be read back, a
            receipt of another erasure, or the disk refuses. No half file is left.
    """
    path = Path(path)
    receipt = receipt_of(erasure, layout, dtype)
    out = tensors(erasure, layout, dtype)
    if not out:
        raise FileError(
            "erasure: it changes nothing (rank 0), so there is nothing to save. Where it came with a prompt memory, save that"
        )
    for name, tensor in out.items():
        if not torch.isfinite(tensor).all():
            raise FileError(f"erasure: {name} has values that {dtype} cannot hold. Save in full precision")
    words = ", ".join(c.name for c in erasure.header.spec.erase)
    metadata = {
        "erasure": header_json(erasure.header, [site for site, d in erasure.deltas.items() if d.rank], layout),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": f"Concept erasure: {words}"[:200],
        "modelspec.architecture": f"{_ARCHITECTURES.get(erasure.header.family.name, erasure.header.family.name)}/lora",
        "modelspec.implementation": "ComfyUI Concept Erasure",
        "modelspec.description": erasure.summary()[:2000],
        **_KOHYA.get(erasure.header.family.name, {}),
    }
    parse_header(metadata["erasure"])  # what can't be read back is not written
    if receipt is not None:
        metadata[RECEIPT] = receipt_json(receipt)
        parse_receipt(metadata[RECEIPT])
    return write(path, out, metadata)


def receipt_of(erasure: Erasure, layout: Layout, dtype: torch.dtype = torch.float32) -> Receipt | None:
    """The receipt that a file of ``erasure`` in ``layout`` and ``dtype`` carries: its digest is that of what is read back.

    Raises:
        FileError: the receipt belongs to another erasure.
    """
    if erasure.receipt is None:
        return None
    if why := erasure.receipt.mismatch(erasure):
        raise FileError(f"receipt: it belongs to another erasure: {why}. Make a new one with Erasure Receipt")
    out = tensors(erasure, layout, dtype)
    deltas = {
        site: _read_delta(lambda name, ndim: out[name].float(), out, site, erasure.header.family, layout, "receipt")
        for site, delta in erasure.deltas.items()
        if delta.rank
    }
    rounded = erasure.receipt.rounded if dtype is torch.float32 else str(dtype).removeprefix("torch.")
    return replace(erasure.receipt, digest=digest(deltas), rounded=rounded)


def write_bytes(path: Path, contents: bytes) -> Path:
    """Write a file that lies beside an erasure, as :func:`write` does.

    Raises:
        FileError: the disk refuses. No half file is left, and an older one stays as it was.
    """
    return _replaced(path, lambda temporary: temporary.write_bytes(contents))


def write(path: Path, contents: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Path:
    """Write a safetensors file: first to a temporary file beside ``path``, then in one move.

    Raises:
        FileError: the disk refuses. No half file is left, and an older one stays as it was.
    """
    return _replaced(path, lambda temporary: save_file(dict(contents), temporary, dict(metadata)))


def _replaced(path: Path, fill: Callable[[Path], object]) -> Path:
    temporary = path.parent / f".erasure-{uuid.uuid4().hex}.tmp"
    try:
        temporary.touch(exist_ok=False)
        mode = temporary.stat().st_mode  # what the user's umask gives; safetensors itself writes for the owner only
        fill(temporary)
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        # The folder can be written to, the file in its place can't: Windows keeps what a program reads.
        held = isinstance(error, PermissionError) and temporary.exists() and path.exists()
        advice = (
            "Another node, such as Load LoRA, or another program has it open: save under another name or restart ComfyUI"
            if held
            else "Free some space or choose another folder"
        )
        raise FileError(f"{path.name}: could not be written ({error}). {advice}") from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


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
    # A copy: what safetensors gives is mapped to the file, and would change or vanish with it.
    tensor: Tensor = f.get_tensor(name).to(torch.float32, copy=True)
    if not torch.isfinite(tensor).all():
        raise FileError(f"{path.name}: {name} contains values that are not numbers (NaN or infinite)")
    return tensor


def read_header(path: str | os.PathLike[str]) -> Header:
    """Only the header of an erasure file; cheap.

    Raises:
        FileError: as :func:`load`.
    """
    path = Path(path)
    check_container(path)
    with path.open("rb") as raw:  # among thousands of LoRAs: to parse what each has takes much longer
        (length,) = struct.unpack("<Q", raw.read(8))
        if b'"erasure"' not in raw.read(length):
            raise _other_kind(path, _KIND)
    with opened(path) as f:
        return parse_header(header_text(f.metadata(), "erasure", path, _KIND))[0]


def header_text(metadata: Mapping[str, str] | None, key: str, path: Path, kind: str) -> str:
    """The JSON under the metadata key of a kind of file.

    Raises:
        OtherKindError: another kind of file; ``kind`` is what it is not, and what to do with it.
    """
    if not metadata or key not in metadata:
        raise _other_kind(path, kind)
    return metadata[key]


def _other_kind(path: Path, kind: str) -> OtherKindError:
    return OtherKindError(f"{path.name}: a safetensors file, but not {kind}")


def read_receipt(path: str | os.PathLike[str]) -> Receipt | None:
    """The receipt in a file, whether or not it belongs to the tensors there (:func:`load` looks); None: there is none.

    Raises:
        FileError: as :func:`load`, or the receipt can't be read; the message begins with ``receipt:`` then.
    """
    path = Path(path)
    with opened(path) as f:
        metadata = f.metadata() or {}
    return parse_receipt(metadata[RECEIPT]) if RECEIPT in metadata else None


def load(path: str | os.PathLike[str]) -> Erasure:
    """Read an erasure from a file in any of the three layouts, as float32.

    Its receipt comes along if it can be read and belongs to these tensors; the erasure works the same without.

    Raises:
        FileError: missing, cut off, oversized, pickled, foreign, or with tensors that contradict the header.
    """
    path = Path(path)
    with opened(path) as f:
        metadata = f.metadata()
        header, sites, layout = parse_header(header_text(metadata, "erasure", path, _KIND))
        present = set(f.keys())

        def take(name: str, ndim: int) -> Tensor:
            if name not in present:
                raise FileError(f"{path.name}: {name} is missing; the file is incomplete")
            present.discard(name)
            return read_tensor(f, name, ndim, path)

        deltas = {site: _read_delta(take, present, site, header.family, layout, path.name) for site in sites}
    if present:
        raise FileError(
            f"{path.name}: it holds {len(present)} tensors that its header does not name, first {min(present)!r:.80}"
        )
    erasure = Erasure(header, deltas)
    try:
        receipt = parse_receipt(metadata[RECEIPT]) if RECEIPT in metadata else None
    except FileError:  # read_receipt says why
        receipt = None
    return erasure if receipt is None or receipt.mismatch(erasure) else replace(erasure, receipt=receipt)


def _read_delta(
    take: Callable[[str, int], Tensor], present: Collection[str], site: str, family: Family, layout: Layout, file: str
) -> Delta:
    """One change; ``take`` gives a tensor as float32 by its name and number of dimensions."""
    diff = names.to_comfy(site) + ".diff"
    if layout is Layout.FULL or diff in present:
        return Delta(take(diff, 2))
    try:
        base = names.to_kohya(site, family) if layout is Layout.LORA else names.to_peft(site, family)
    except ValueError as error:
        raise FileError(f"{file}: {error}{OR_NEWER}") from None
    up_name, down_name = (
        (".lora_up.weight", ".lora_down.weight") if layout is Layout.LORA else (".lora_B.weight", ".lora_A.weight")
    )
    up, down = take(base + up_name, 2), take(base + down_name, 2)
    if up.shape[1] != down.shape[0]:
        raise FileError(f"{file}: the two factors of {site} do not fit ({tuple(up.shape)} and {tuple(down.shape)})")
    if layout is Layout.LORA:
        alpha = float(take(base + ".alpha", 0))
        up = up * (alpha / up.shape[1])
    if not float(up.norm()) * float(down.norm()) < torch.finfo(torch.float32).max:
        raise FileError(f"{file}: the change of {site} is too large for any weight")
    return Delta(up, down)
