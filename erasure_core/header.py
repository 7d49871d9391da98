"""The header of every file of the pack: JSON in the safetensors metadata, written here and read back distrustfully."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from enum import StrEnum
from typing import Any

from .artifact import Header
from .checked import MAX_JSON_CHARACTERS, OR_NEWER, Checked, FileError
from .concept import Concept, ConceptError, ConceptSpec
from .port import Family

MAX_SITES = 5000
_ROOM = MAX_JSON_CHARACTERS - (300 << 10)
"""Characters for words and settings; the rest is for the names of sites."""
_FORMAT = 1
_SITE = re.compile(r"^(input_blocks|output_blocks|middle_block)(\.[A-Za-z0-9_]+){1,12}$")
_HEADER = Checked("header")


class Layout(StrEnum):
    """How the tensors of a file are named; see formats.py."""

    LORA = "lora"
    DIFFUSERS = "diffusers"
    FULL = "full"


def spec_json(spec: ConceptSpec) -> dict[str, Any]:
    """``erase``, ``keep`` and ``everyday`` as plain values."""
    return {
        "erase": [{"words": list(c.words), "to": c.to} for c in spec.erase],
        "keep": list(spec.keep),
        "everyday": spec.everyday,
    }


def read_spec(read: Checked, raw: dict[str, Any]) -> ConceptSpec:
    """What :func:`spec_json` wrote, every word checked.

    Raises:
        FileError: the first thing that is wrong with it.
    """
    erase = [read.fields(c, "erase") for c in read.entries(raw.get("erase"), "erase", 1000)]
    try:
        return ConceptSpec(
            tuple(
                Concept(
                    tuple(read.text(w, "word") for w in read.entries(c.get("words"), "words", 10_000)) or ("",),
                    read.text(c.get("to", ""), "to"),
                )
                for c in erase
            ),
            tuple(read.text(k, "keep") for k in read.entries(raw.get("keep", []), "keep", 100_000)),
            read.flag(raw.get("everyday", False), "everyday"),
        )
    except ConceptError as error:
        raise read.wrong(str(error)) from None


def check_request(method: str, settings: Mapping[str, Any], spec: ConceptSpec) -> None:
    """Refuse before a training what no file could hold at its end.

    Raises:
        FileError: too many words, or too long ones.
    """
    _HEADER.plain(dict(settings), f"settings of {method}")
    read_spec(_HEADER, spec_json(spec))
    length = len(json.dumps([dict(settings), spec_json(spec)]))
    if length > _ROOM:
        raise FileError(
            f"erase and keep: {length} characters with the settings of {method}, at most {_ROOM} fit into a file. "
            "Name fewer words"
        )


def header_json(header: Header, sites: list[str], layout: Layout) -> str:
    return json.dumps(
        {
            "format": _FORMAT,
            "layout": layout.value,
            "method": header.method,
            "settings": dict(header.settings),
            **spec_json(header.spec),
            "family": {
                "name": header.family.name,
                "context_dim": header.family.context_dim,
                "num_res_blocks": header.family.num_res_blocks,
                "levels": header.family.levels,
            },
            "base": header.base,
            "version": header.version,
            "strength": header.strength,
            "unread": list(header.unread),
            "sites": sites,
        },
        ensure_ascii=True,
    )


def parse_header(text: str) -> tuple[Header, list[str], Layout]:
    """Read the JSON of the metadata key ``erasure``; every field is checked.

    Raises:
        FileError: the first thing that is wrong with it.
    """
    read = _HEADER
    raw = read.parse(text)
    number = read.whole(raw.get("format"), "format", 0, 1 << 30)
    if number != _FORMAT:
        raise FileError(f"header: format {number} is not {_FORMAT}. Update Concept Erasure to read newer files")
    settings = read.plain(raw.get("settings", {}), "settings")
    strength = read.number(raw.get("strength", 1.0), "strength", -1e6, 1e6)
    family = read.fields(raw.get("family"), "family")
    spec = read_spec(read, raw)
    sites = [read.text(s, "site", 200) for s in read.entries(raw.get("sites"), "sites", MAX_SITES)]
    for site in sites:
        if not _SITE.match(site):
            raise FileError(f"header: {site[:60]!r} is not the name of a UNet weight{OR_NEWER}")
    if len(set(sites)) != len(sites):
        raise FileError("header: sites are listed twice")
    layout_name = read.text(raw.get("layout", "lora"), "layout", 20)
    if layout_name not in list(Layout):
        raise FileError(f"header: layout {layout_name!r} is unknown{OR_NEWER}")
    header = Header(
        read.text(raw.get("method"), "method"),
        settings,
        spec,
        Family(
            read.text(family.get("name"), "family name", 60),
            read.whole(family.get("context_dim"), "context_dim", 1, 65536),
            read.whole(family.get("num_res_blocks"), "num_res_blocks", 1, 64),
            read.whole(family.get("levels"), "levels", 1, 64),
        ),
        read.text(raw.get("base", ""), "base", 128),
        read.text(raw.get("version", ""), "version", 40),
        strength,
        tuple(read.text(x, "unread", 20) for x in read.entries(raw.get("unread", []), "unread", 10)),
    )
    return header, sites, Layout(layout_name)
