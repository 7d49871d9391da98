"""Erasures that act as much as a prompt resembles what they erase: SPM's facilitated transport (METHODS 1.7, 2.8).

    W + sum_i m_i U_i D_i,    m_i = max over the concept's words and the prompt's chunks of spm.gate(chunk, word)

One scalar on each product: the authors scale both factors, which gives m^2, and join the factors of several adapters, which
adds cross-terms. What a file needs for this, the concept's words, is in its header already; the model's own text encoder
reads them. Words stand for the paper's tokens, which a port doesn't show.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import reduce

from .artifact import Erasure
from .concept import ConceptSpec, meanings
from .fusion import added
from .methods.spm import gate
from .port import ModelPort
from .version import __version__

_WORD = re.compile(r"\w+")


def gate_strengths(port: ModelPort, erasures: Sequence[Erasure], prompt: str) -> list[float]:
    """m of each erasure for a prompt, from 0 to 1: 1 where a word that it erases stands in the prompt as it is."""
    erased = [[word for concept in e.header.spec.erase for word in concept.words] for e in erasures]
    texts = list(dict.fromkeys([prompt, *(word for words in erased for word in words)]))
    means = dict(zip(texts, meanings(port, texts), strict=True))
    found = {text: _WORD.findall(text.casefold()) for text in texts}
    return [
        max(gate(chunk, means[word][-1], found[prompt], found[word]) for word in words for chunk in means[prompt])
        for words in erased
    ]


def gated(port: ModelPort, erasures: Sequence[Erasure], prompt: str) -> Erasure:
    """What ``erasures`` do together to this prompt. For another prompt make another one; the model stays the same.

    Raises:
        ValueError: there are none.
        WrongModelError: one of them was made for another model.
    """
    if not erasures:
        raise ValueError("gate: connect at least one erasure")
    every = list(getattr(port, "linears", port.sites)())
    for erasure in erasures:
        erasure.check_fits(every)
    strengths = gate_strengths(port, erasures, prompt)
    scaled = [e.scaled(m) for e, m in zip(erasures, strengths, strict=True)]
    names = dict.fromkeys(name for e in scaled for name in e.deltas)
    header = replace(
        erasures[0].header,
        method=" + ".join(dict.fromkeys(e.header.method for e in erasures)),
        settings={"gated": len(erasures)},
        spec=reduce(lambda a, b: a.union(b), (_erased(e.header.spec) for e in erasures)),
        version=__version__,
        strength=1.0,
        unread=(),
    )
    return Erasure(header, {name: added(name, scaled) for name in names})


def _erased(spec: ConceptSpec) -> ConceptSpec:
    """Without replacements: what one erasure replaces with may be what another erases, which their gates take apart."""
    return replace(spec, erase=tuple(replace(concept, to="") for concept in spec.erase))
