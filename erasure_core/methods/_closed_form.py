"""What the closed-form methods share: reading the weights once and making the Erasure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Any

from torch import Tensor

from ..artifact import Erasure, Fingerprint, Header
from ..concept import ConceptSpec, Rows
from ..operators.linear_edit import ContextMap
from ..port import ModelPort, Site
from ..version import __version__
from .registry import Progress, setting


class Templates(StrEnum):
    """Names of the sentence lists in concept.TEMPLATES."""

    NONE = "none"
    FEW = "few"
    MANY = "many"


def rows_setting() -> Any:
    """Which rows stand for a prompt; the same choice in every closed-form method."""
    return setting(
        Rows.SUMMARY,
        "Which tokens of a prompt are edited. 'last' is the mildest; 'last to end' and 'all' reach every padding token and "
        "erase most firmly; 'summary' does nearly as well with few of them.",
    )


def templates_setting() -> Any:
    """Sentences around each word; the same choice in every closed-form method."""
    return setting(
        Templates.FEW, "Sentences around each word. More of them erase more reliably and take longer to encode."
    )


def energy_setting() -> Any:
    """How exactly the change is stored; the same choice in every closed-form method."""
    return setting(
        0.99,
        "Share of the change that is stored. 1 stores it exactly; a little less makes the file many times smaller while "
        "pictures stay the same to the eye.",
        low=0.5,
        high=1.0,
        step=0.01,
    )


class NoCrossAttentionError(ValueError):
    """The model has no matrices that this family of methods could edit."""


def text_sites(port: ModelPort) -> list[Site]:
    """The port's sites, or a clear refusal."""
    sites = list(port.sites())
    if not sites:
        raise NoCrossAttentionError(
            f"model: {port.family.name} has no separate text cross-attention (attn2.to_k / to_v), which this method "
            "edits. It works on SD 1.x, SD 2.x and SDXL checkpoints"
        )
    return sites


EditOf = Callable[[Site, Tensor], ContextMap]
"""The context map of one site, given its weight."""


def build(
    port: ModelPort,
    spec: ConceptSpec,
    method: str,
    settings: Mapping[str, Any],
    edit: ContextMap | EditOf,
    progress: Progress,
    sites: list[Site] | None = None,
) -> Erasure:
    """Turn context maps into the Erasure: one for all sites (its ``down`` factor is shared), or one per site.

    Maps are truncated to ``settings["energy"]``. ``sites`` are those to edit (default: all). The fingerprint covers all,
    so it is the same for every method.
    """
    every = text_sites(port)
    edited = {site.name for site in (every if sites is None else sites)}
    seen, changed = Fingerprint(), {}
    if isinstance(edit, ContextMap):
        edit = edit.truncated(settings["energy"])
    shared: Tensor | None = None
    for i, site in enumerate(every):
        progress(i, len(every))
        weight = port.weight(site)
        seen.update(site, weight)
        if site.name not in edited:
            continue
        if isinstance(edit, ContextMap):
            shared = _down(edit, weight) if shared is None else shared
            changed[site.name] = edit.delta(weight, shared)
        else:
            own = edit(site, weight).truncated(settings["energy"])
            changed[site.name] = own.delta(weight, _down(own, weight))
    progress(len(every), len(every))
    plain = {k: v.value if isinstance(v, StrEnum) else v for k, v in settings.items()}
    return Erasure(Header(method, plain, spec, port.family, seen.hexdigest(), __version__), changed)


def _down(edit: ContextMap, weight: Tensor) -> Tensor | None:
    return None if edit.right is None else edit.right.to(weight.dtype)
