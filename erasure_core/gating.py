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

import torch
from torch import Tensor

from .artifact import Erasure
from .concept import ConceptSpec, meanings
from .fusion import added
from .methods.spm import gate
from .operators.cond import Cond
from .operators.gates import GATES
from .operators.trainable import TrainableModel, TrainablePort
from .port import ModelPort, Site, TextStates
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
    _check(port, erasures)
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


class GatedPort:
    """A port under gated erasures, as attacks ask it: each prompt is read with the gates that it opens itself.

    What is no prompt, text states that an attack found or the empty prompt that they are put into, is read with those that
    ``prompts`` open, the widest of each: as if one of them had been typed into the gate. So is what :meth:`weight` gives.
    Where nothing is typed, the empty prompt has gates of its own: :meth:`as_typed`.

    Args:
        prompts: those that are attacked.
        carried: strengths at which the port's own weights have the erasures already, as *Gate Erasures* leaves them for one
            prompt.

    Raises:
        ValueError: there are no erasures.
        WrongModelError: one of them was made for another model.
    """

    def __init__(
        self, port: TrainablePort, erasures: Sequence[Erasure], prompts: Sequence[str], carried: Sequence[float] = ()
    ) -> None:
        _check(port, erasures)
        self._port, self._erasures, self._carried = port, erasures, list(carried) or [0.0] * len(erasures)
        self.family, self.prediction = port.family, port.prediction
        opened = [self._beyond(prompt) for prompt in prompts]
        self.asked = [max(each) for each in zip(*opened, strict=True)]
        """Of each erasure, how far ``prompts`` open its gate beyond what is carried."""

    def _beyond(self, prompt: str) -> list[float]:
        opened = gate_strengths(self._port, self._erasures, prompt)
        return [m - had for m, had in zip(opened, self._carried, strict=True)]

    def sites(self) -> Sequence[Site]:
        return self._port.sites()

    def linears(self) -> Sequence[Site]:
        return self._port.linears()

    def text(self, prompts: Sequence[str]) -> list[TextStates]:
        return self._port.text(prompts)

    def predict(self, z: Tensor, t: Tensor, context: Tensor) -> Tensor:
        with self.trainable() as model, torch.no_grad():
            return model.predict(z, t, Cond(context))

    def weight(self, site: Site) -> Tensor:
        weight = self._port.weight(site)
        for m, erasure in zip(self.asked, self._erasures, strict=True):
            if (delta := erasure.deltas.get(site.name)) is not None and delta.rank:
                weight = weight + m * delta.dense().to(weight)
        return weight

    def conditions(self, prompts: Sequence[str]) -> list[Cond]:
        made = zip(prompts, self._port.conditions(prompts), strict=True)
        return [self.as_typed(cond, prompt) if prompt else _opened(cond, self.asked) for prompt, cond in made]

    def as_typed(self, cond: Cond, prompt: str) -> Cond:
        """``cond`` with the gates that ``prompt`` opens; the empty prompt too, which is typed where nothing is."""
        return _opened(cond, self._beyond(prompt))

    def trainable(self) -> TrainableModel:
        model = self._port.trainable()
        try:
            model.gate([erasure.deltas for erasure in self._erasures], self.asked)
        except BaseException:
            model.close()
            raise
        return model


def _opened(cond: Cond, strengths: Sequence[float]) -> Cond:
    return Cond(cond.context, {**cond.extra, GATES: torch.tensor([list(strengths)]).to(cond.context)})


def _check(port: ModelPort, erasures: Sequence[Erasure]) -> None:
    if not erasures:
        raise ValueError("gate: connect at least one erasure")
    every = list(getattr(port, "linears", port.sites)())
    for erasure in erasures:
        erasure.check_fits(every)


def _erased(spec: ConceptSpec) -> ConceptSpec:
    """Without replacements: what one erasure replaces with may be what another erases, which their gates take apart."""
    return replace(spec, erase=tuple(replace(concept, to="") for concept in spec.erase))
