"""MMA-Diffusion, text part (Yang et al., CVPR 2024, arXiv:2311.17516; METHODS 3.6): odd words that mean the same.

    max over n tokens of cos( pool E([tokens]), pool E(prompt) ),   pool: the state at the end of text

by greedy coordinate gradients (GCG): the gradient of 1 - cos with respect to the one-hot of each place ranks the
vocabulary; 512 prompts that differ in one place, with a word among the 256 best there, are tried; the best one is the next.
20 tokens, 1000 rounds. Words that hide a piece of the concept's name are never used.

Departures: the places are spread evenly over the tries as theirs are, the words drawn by the seed; the best prompt of all
rounds counts, not the last; only words that a person can type. Their attack on the safety checker's pictures is another
matter and not here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..concept import ConceptSpec
from ..operators.train_loop import generator_for
from .drawing import Progress, part
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .words import Frame, Words

_BATCH = 64


@dataclass(frozen=True)
class Settings:
    tokens: int = setting(20, "Words of the prompt that is searched for.", low=1, high=75, step=1)
    rounds: int = setting(1000, "Rounds of the search. More find more, and take longer.", low=1, high=100000, step=100)
    candidates: int = setting(256, "Best words at each place that are drawn from.", low=1, high=10000, step=16)
    tries: int = setting(512, "Prompts that are tried in a round.", low=1, high=100000, step=16)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def pooled(words: Words, states: Tensor, content: int) -> Tensor:
    """The states [N, D] at the end of text of prompts with ``content`` tokens."""
    return states[:, int(words.bos is not None) + content]


def token_gradient(frame: Frame, tokens: Tensor, aim: Tensor, allowed: Tensor) -> Tensor:
    """d(1 - cos) / d one-hot [n, A]: at each place, for each allowed word (places in the vocabulary)."""
    words, slot = frame.words, frame.slot()
    with torch.enable_grad():
        vectors = words.encoder.embed(words.wide(tokens.to(words.table.device)[None]))[0].detach().requires_grad_()
        made = pooled(words, slot.states(vectors), len(frame.pieces))
        (slope,) = torch.autograd.grad((1 - F.cosine_similarity(made, aim[None])).sum(), vectors)
    return slope @ words.table[allowed.to(slope.device)].T


def substitutions(
    tokens: Tensor, gradient: Tensor, allowed: Tensor, settings: Settings, generator: torch.Generator, words: Words
) -> Tensor:
    """``tries`` prompts [T, n] that differ from ``tokens`` [n] in one place each, with a word that the gradient favours."""
    best = (-gradient).topk(min(settings.candidates, gradient.shape[1]), dim=1).indices.cpu()  # [n, k]
    place = torch.arange(settings.tries) * len(tokens) // settings.tries
    pick = torch.randint(0, best.shape[1], (settings.tries,), generator=generator)
    new = words.vocabulary[allowed[best[place, pick]]]
    return tokens.repeat(settings.tries, 1).scatter(1, place[:, None], new[:, None])


def imitate(
    words: Words, prompt: str, allowed: Tensor, settings: Settings, number: int, progress: Progress
) -> tuple[Tensor, list[float]]:
    """The tokens [n] whose pooled state is most like the prompt's, and 1 - cos of each round's best."""
    frame = Frame.prefix(words, [], min(settings.tokens, words.room))
    aim = pooled(words, words.states(words.tokenize([prompt])), len(words.content(prompt)))[0]
    start = torch.randint(0, len(allowed), (frame.free,), generator=generator_for(settings.seed, "mma start", number))
    tokens = best = words.vocabulary[allowed[start]]
    lowest, losses = float("inf"), []
    for i in range(settings.rounds):
        progress(i, settings.rounds)
        gradient = token_gradient(frame, tokens, aim, allowed)
        generator = generator_for(settings.seed, f"mma {number}", i)
        tried = torch.unique(substitutions(tokens, gradient, allowed, settings, generator, words), dim=0)
        parts = [pooled(words, words.states(frame.ids(x)), len(frame.pieces)) for x in tried.split(_BATCH)]
        distance = 1 - F.cosine_similarity(torch.cat(parts), aim[None])
        tokens = tried[int(distance.argmin())]
        losses.append(float(distance.min()))
        if losses[-1] < lowest:
            best, lowest = tokens, losses[-1]
    progress(settings.rounds, settings.rounds)
    return best, losses


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One prompt for each prompt."""
    words, ways, losses = target.words, [], []
    assert words is not None
    allowed = words.without([word for concept in spec.erase for word in concept.words])
    for number, prompt in enumerate(target.prompts):
        step = part(progress, number, len(target.prompts))
        best, distance = imitate(words, prompt, allowed, settings, number, step)
        losses += distance
        text = words.spell(best.tolist())
        ways.append(Way(text, text, attacks=(prompt,)))
    return Found(tuple(ways), tuple(losses))


SPEC = AttackSpec(
    name="mma_diffusion",
    title="MMA-Diffusion",
    summary="Searches for odd words whose text state is the prompt's, none of which names the concept.",
    paper="https://arxiv.org/abs/2311.17516",
    knowledge=Knowledge.TEXT_ONLY,
    settings=Settings,
    run=run,
    budget="rounds",
    needs_words=True,
)
