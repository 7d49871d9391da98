"""Several erasures as one, by re-solving instead of summing.

Summed, two erasures disturb each other where their words are related. Instead each weight is fitted to do what each
erasure does on *its* words and what the base does on kept ones (closed-form fusion, MACE, arXiv:2403.06135, stage 3):

    min_D  sum_i ||D E_i - D_i E_i||^2 + ||D P||^2 + ridge ||D||_F^2
    D = sum_i D_i E_i E_i^T B^-1,   B = sum_i E_i E_i^T + P P^T + ridge I

with E_i the text rows of erasure i's concepts, D_i its change, P the kept rows and all of the empty prompt. Low-rank in,
low-rank out.

The rows are those of the words (:attr:`Rows.SUMMARY`, where MACE has all 77), and the ridge pulls to no change: what an erasure
does to other text states, as RECE's derived ones or dark embeddings, is not in E_i and is all but lost (:func:`beyond_words`).

That is for weights that read text. What the others read (pictures) isn't known here, so their changes are summed; how many
they are is in the merged header's settings as ``summed`` and in the summary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import reduce
from itertools import permutations

import torch
from torch import Tensor

from .artifact import Delta, Erasure
from .concept import TEMPLATES, ConceptError, ConceptSpec, Rows, edit_rows
from .operators.linear_edit import mean_square
from .port import ModelPort
from .version import __version__

_SEARCHED = ("rece", "dark_miner", "adversarial")
_TEMPLATES, _RIDGE = TEMPLATES["few"], 1e-3


def merge(port: ModelPort, erasures: Sequence[Erasure]) -> Erasure:
    """One erasure that does what all of ``erasures`` do, each on its own words.

    Raises:
        WrongModelError: one of them was made for another model.
        ConceptError: what one erases is what another replaces with, or they are too many concepts.
    """
    if not erasures:
        raise ValueError("merge: connect at least one erasure")
    if len(erasures) == 1:
        return erasures[0]
    text = {site.name for site in port.sites()}
    every = list(getattr(port, "linears", port.sites)())
    for erasure in erasures:
        erasure.check_fits(every)
    spec = _together([e.header.spec for e in erasures])
    erased = [replace(e.header.spec, keep=(), everyday=False) for e in erasures]
    rows = [edit_rows(port, s, rule=Rows.SUMMARY, templates=_TEMPLATES).source for s in erased]
    keep = edit_rows(port, spec, rule=Rows.SUMMARY, templates=_TEMPLATES).held
    moments = [e.T @ e for e in rows]
    gram = sum(moments, keep.T @ keep)
    gram.diagonal().add_(_RIDGE * mean_square(torch.cat(rows)))
    factor = torch.linalg.cholesky(gram)
    projections = [torch.cholesky_solve(m, factor).T for m in moments]  # E_i E_i^T B^-1, [D, D]
    names = list(dict.fromkeys(name for e in erasures for name in e.deltas))
    summed = sum(name not in text for name in names)
    header = replace(
        erasures[0].header,
        method=" + ".join(dict.fromkeys(e.header.method for e in erasures)),
        settings={"merged": len(erasures), **({"summed": summed} if summed else {})},
        spec=spec,
        version=__version__,
        strength=1.0,
        unread=(),
    )
    return Erasure(header, {n: _fuse(n, erasures, projections) if n in text else added(n, erasures) for n in names})


def beyond_words(erasure: Erasure) -> bool:
    """Whether an erasure was made to hold against more than its words, which merging does not keep."""
    return erasure.header.method in _SEARCHED


def _together(specs: Sequence[ConceptSpec]) -> ConceptSpec:
    """All requests as one; where that can't be, an error that names the erasures, for no box holds what is wrong."""
    for i, j in permutations(range(len(specs)), 2):
        for concept in specs[i].erase:
            if specs[j].erases(concept.to):
                raise ConceptError(
                    f"merge: erasure {i + 1} replaces {concept.name!r} with {concept.to!r}, which erasure {j + 1} erases. Make "
                    "one of them again with something that stays, or leave them apart: one Apply Erasure for each"
                )
    try:
        return reduce(lambda a, b: a.union(b), specs)
    except ConceptError as error:  # there are too many: nothing else is left that could be wrong
        raise ConceptError(f"merge: {str(error).removeprefix('concept: ')}. Merge fewer of them") from None


def added(name: str, erasures: Sequence[Erasure]) -> Delta:
    """The sum of what they change at one site, as factors where they have some."""
    parts = [e.deltas[name] for e in erasures if name in e.deltas]
    downs = [d.down for d in parts if d.down is not None]
    if len(downs) < len(parts):
        return Delta(torch.stack([d.dense() for d in parts]).sum(0))
    return Delta(torch.cat([d.up for d in parts], dim=1), torch.cat(downs))


def _fuse(name: str, erasures: Sequence[Erasure], projections: Sequence[Tensor]) -> Delta:
    parts = [(e.deltas[name], p) for e, p in zip(erasures, projections, strict=True) if name in e.deltas]
    if any(d.down is None for d, _ in parts):
        return Delta(torch.stack([d.dense() @ p.to(d.up) for d, p in parts]).sum(0))
    downs = [d.down @ p.to(d.up) for d, p in parts if d.down is not None]
    return Delta(torch.cat([d.up for d, _ in parts], dim=1), torch.cat(downs))
