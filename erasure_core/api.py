"""What a script or a node calls."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch

from .artifact import Erasure
from .concept import ConceptSpec
from .header import check_request
from .methods import Aids, Progress, all_methods, settings_from
from .methods._closed_form import text_sites
from .port import ModelPort


def erase(
    port: ModelPort,
    spec: ConceptSpec,
    method: str = "uce",
    settings: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    aids: Aids | None = None,
) -> Erasure:
    """Compute the change that makes a model stop drawing ``spec.erase``. The model itself is not touched.

    The Erasure's header has the whole request, and says what of it the method made no use of (``MethodSpec.unread``).

    Args:
        port: the model.
        spec: what to erase, what it becomes, what to keep.
        method: a name from :func:`erasure_core.methods.all_methods`.
        settings: settings of the method that differ from its defaults.
        progress: called as progress(done, total); may raise to cancel.
        aids: mined embeddings, pictures, pairs, a judge, somebody who watches: what the method may use beside the words.

    Raises:
        ValueError: an unknown method or setting, a model that the method can't edit or train, pairs that it needs and
            doesn't have, embeddings of a concept that isn't there, or more words than a file holds.
    """
    known = all_methods()
    if method not in known:
        raise ValueError(f"method: {method!r} is unknown; there are {', '.join(known)}")
    chosen, given = known[method], aids or Aids()
    text_sites(port)
    if chosen.trains and not hasattr(port, "trainable"):
        raise ValueError(f"model: {chosen.title} trains, which {type(port).__name__} can't do. Use UCE, RECE or SPEED")
    if chosen.needs_pairs and given.pairs is None:
        raise ValueError(f"pairs: {chosen.title} learns from pairs of pictures. Connect Make SDEdit Pair")
    if given.owners and max(given.owners) >= len(spec.erase):
        raise ValueError(
            f"owners: {max(given.owners)} is no number of the {len(spec.erase)} concepts, which begin at 0"
        )
    made = settings_from(chosen, settings or {})
    check_request(method, asdict(made), spec)
    with torch.no_grad():
        erasure = chosen.run(port, spec.without(chosen.unread), made, progress or (lambda done, total: None), given)
    return replace(erasure, header=replace(erasure.header, spec=spec, unread=chosen.unread))
