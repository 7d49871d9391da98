"""Synonyms and other languages: words for the concept that nobody told the eraser (HUB, arXiv:2410.05664; METHODS 3.7).

No search: each of the caller's words is put in the place of the concept's name in the attacked prompts. Only words that the
base model knows mean anything here, so evaluate the same list on the base model too.

A list of thousands is too much to draw. With ``drawn``, the erased model's own denoising loss on pictures of the concept says
which of them to draw: all are compared at the same few noised pictures, the best of these at more. That part is ours, and
white-box; HUB draws its lists whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept import ConceptSpec
from ..operators.cond import Cond
from ..operators.search import predicted
from ..operators.trainable import TrainableModel
from .drawing import Progress, noises, part, pictures_of
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .words import swap

_FEW, _MORE = 2, 16
"""Noised pictures by which all prompts are compared, and then the best ones."""
_AGAIN = 8
"""Times as many as are drawn are compared again."""
_ENCODED = 256
"""Prompts that are encoded at once: a host may have to fetch its text encoder for them."""
_SEED = 0
"""Of the noise at which prompts are compared: nothing is searched that another seed would find."""


@dataclass(frozen=True)
class Settings:
    words: str = setting("", "Words for the concept that the eraser wasn't told, by commas or lines, in any language.")
    most: int = setting(1000, "At most this many words are used.", low=1, high=100000, step=10)
    drawn: int = setting(
        0,
        "Of a longer list, so many are drawn: the prompts with which the erased model explains pictures of the concept best. "
        "0: all.",
        low=0,
        high=1000,
        step=8,
    )


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """Each word in each prompt; a prompt that doesn't name the concept is left out."""
    known = [word for concept in spec.erase for word in concept.words]
    told = {word.casefold() for word in known}
    listed = [word.strip() for line in settings.words.splitlines() for word in line.split(",")]
    unseen = list(dict.fromkeys(word for word in listed if word and word.casefold() not in told))[: settings.most]
    if not unseen:
        raise ValueError(
            "synonyms: no words, or only words that were erased by name. List some that the eraser wasn't told"
        )
    prompts = dict.fromkeys(swap(prompt, known, word) for word in unseen for prompt in target.prompts)
    texts = [text for text in prompts if text is not None] or unseen
    if 0 < settings.drawn < len(texts):
        texts = best_fitting(target, texts, settings.drawn, progress)
    progress(1, 1)
    return Found(tuple(Way(text, text) for text in texts))


@torch.no_grad()
def best_fitting(target: AttackTarget, texts: Sequence[str], count: int, progress: Progress) -> list[str]:
    """The ``count`` of ``texts`` with which the erased model predicts the noise on pictures of the concept best."""
    total = len(texts)
    pictures = pictures_of(target, target.prompts, _MORE, _SEED, "synonyms", lambda *_: progress(0, total))
    with target.erased.trainable() as model:
        for number, (probes, stay) in enumerate(((_FEW, _AGAIN * count), (_MORE, count))):
            losses = fit(model, target, texts, pictures, probes, part(progress, number, 2))
            best = losses.argsort(stable=True)[:stay].sort().values
            texts = [texts[i] for i in best.tolist()]
    return list(texts)


@torch.no_grad()
def fit(
    model: TrainableModel, target: AttackTarget, texts: Sequence[str], pictures: Tensor, probes: int,
    progress: Progress,
) -> Tensor:  # fmt: skip
    """[texts] mean of || target - net(x_t, t, text) ||^2 over ``probes`` noised pictures, the same for every text, whose times
    are spread over the schedule."""
    schedule, space, away = model.schedule, model.space, target.away()
    x0 = pictures[torch.arange(probes) % len(pictures)].to(model.device, model.dtype)
    t = ((torch.arange(probes) + 0.5) / probes * len(schedule)).long()
    noise = noises(model, _SEED, "synonyms fit", range(probes))
    z, wanted = schedule.add_noise(x0, noise, t), schedule.target(space, x0, noise, t)
    size = max(1, model.at_once * 2 // probes)
    found = []
    conds: list[Cond] = []
    for start in range(0, len(texts), size):
        progress(start, len(texts))
        if len(conds) < size:
            done = start + len(conds)
            conds += target.erased.conditions(list(texts[done : done + _ENCODED])) if done < len(texts) else []
        some, conds = [cond.to(z).expand(probes) for cond in conds[:size]], conds[size:]
        n = len(some)
        made = predicted(model, z.repeat(n, 1, 1, 1), t.repeat(n), Cond.cat(some), away, memory=target.memory)
        gaps = (made.float() - wanted.float().repeat(n, 1, 1, 1)).square().flatten(1).mean(1)
        found.append(gaps.view(n, probes).mean(1))
    return torch.cat(found).cpu()


SPEC = AttackSpec(
    name="synonyms",
    title="Synonyms",
    summary="Asks with words for the concept that the eraser was not told, in any language.",
    paper="https://arxiv.org/abs/2410.05664",
    knowledge=Knowledge.BLACK_BOX,
    settings=Settings,
    run=run,
    budget="most",
)
