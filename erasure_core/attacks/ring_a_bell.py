"""Ring-A-Bell (Tsai et al., ICLR 2024, arXiv:2310.10012; METHODS 3.1): prompts whose text states lean to the concept.

    concept vector  d = mean over pairs of E(p+) - E(p-),   [L, D]
    aim             e = E(prompt) + eta d
    found           argmin over K tokens of || E([tokens]) - e ||^2,  summed over all rows

by a genetic search over whole tokens; the erased model is never asked. Population 200, of which the best half survives,
3000 generations, crossover 0.5, mutation 0.25, eta 3, K 16.

Departures: survivors stay as they are (the authors mutate the best one too and can lose it), twins are dropped, and only
children are evaluated; the pairs are our sentences about the concept, each once (the authors repeat theirs five times, which
changes nothing), without a selection by hand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..concept import ConceptSpec
from ..operators.train_loop import generator_for
from .drawing import Progress, part
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .words import Frame, Words

SENTENCES = (
    "{}", "a {}", "a photo of {}", "a painting of {}", "a drawing of {}", "a picture with {} in it", "one big {}",
    "a small {} on a table", "the {} in the garden", "a close view of {}", "a poster that shows {}", "{} in the morning",
    "{} at night", "a sketch of {}", "somebody and {}", "an old picture of {}", "a colourful {}", "{} in black and white",
    "many of {}", "{} from above", "a photo of {} in a room", "a street with {}", "{} by the sea", "a cartoon of {}",
)  # fmt: skip
_NEUTRAL = "thing"
_BATCH = 64


@dataclass(frozen=True)
class Settings:
    tokens: int = setting(16, "Words of the prompt that is searched for.", low=1, high=75, step=1)
    strength: float = setting(3.0, "How far the aim leans to the concept (eta).", low=0.0, high=100.0, step=0.5)
    generations: int = setting(
        3000, "Rounds of the search. More find more, and take longer.", low=1, high=100000, step=100
    )
    population: int = setting(200, "Prompts in a round; half of them survive.", low=4, high=10000, step=10)
    crossover: float = setting(0.5, "Share of the survivors that mate.", low=0.0, high=1.0, step=0.05)
    mutation: float = setting(0.25, "Share of the children of which one word is changed.", low=0.0, high=1.0, step=0.05)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


def concept_vector(words: Words, name: str, other: str) -> Tensor:
    """d [L, D]: what the concept adds to the states of a sentence, on average."""
    states = [words.states(words.tokenize([s.format(x) for s in SENTENCES])) for x in (name, other)]
    return (states[0] - states[1]).mean(0)


def distances(words: Words, frame: Frame, tokens: Tensor, aim: Tensor) -> Tensor:
    """|| E(tokens) - aim ||^2 over all rows, [N] for ``tokens`` [N, K] (ids)."""
    parts = [words.states(frame.ids(x)) - aim for x in tokens.split(_BATCH)]
    return torch.cat([x.square().sum((1, 2)).cpu() for x in parts])


def children(survivors: Tensor, words: Words, settings: Settings, generator: torch.Generator) -> Tensor:
    """The next round's new prompts [n, K]: two by each couple, a copy of each other survivor, then mutations."""
    n, length = survivors.shape
    mating = torch.rand(n, generator=generator) < settings.crossover
    mates = survivors[torch.randint(0, n, (n,), generator=generator)]
    cuts = torch.randint(1, max(2, length), (n, 1), generator=generator)
    first = torch.arange(length)[None] < cuts
    one, two = torch.where(first, survivors, mates), torch.where(first, mates, survivors)
    made = torch.cat([one[mating], two[mating], survivors[~mating]])
    mutated = torch.rand(len(made), generator=generator) < settings.mutation
    place = torch.randint(0, length, (len(made), 1), generator=generator)
    new = words.vocabulary[torch.randint(0, len(words.vocabulary), (len(made), 1), generator=generator)]
    return torch.where(mutated[:, None], made.scatter(1, place, new), made)


def evolve(
    words: Words, frame: Frame, aim: Tensor, settings: Settings, name: str, progress: Progress
) -> tuple[Tensor, list[float]]:
    """The best tokens [K] and their distance after each generation, which never rises."""
    generator = generator_for(settings.seed, name, 0)
    index = torch.randint(0, len(words.vocabulary), (settings.population, frame.free), generator=generator)
    pool = torch.unique(words.vocabulary[index], dim=0)
    scores, best = distances(words, frame, pool, aim), []
    for i in range(settings.generations):
        progress(i, settings.generations)
        order = scores.argsort(stable=True)[: settings.population // 2]
        pool, scores = pool[order], scores[order]
        known = {tuple(row) for row in pool.tolist()}
        rows = [row for row in children(pool, words, settings, generator).tolist() if tuple(row) not in known]
        new = torch.tensor(list(dict.fromkeys(map(tuple, rows))), dtype=torch.long).reshape(-1, frame.free)
        if len(new):
            pool, scores = torch.cat([pool, new]), torch.cat([scores, distances(words, frame, new, aim)])
        best.append(float(scores.min()))
    progress(settings.generations, settings.generations)
    return pool[int(scores.argmin())], best


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One prompt for each prompt."""
    words, ways, losses = target.words, [], []
    assert words is not None
    concept = spec.erase[0]
    vector = concept_vector(words, concept.name, concept.to or _NEUTRAL)
    frame = Frame.prefix(words, [], min(settings.tokens, words.room))
    for number, prompt in enumerate(target.prompts):
        aim = words.states(words.tokenize([prompt]))[0] + settings.strength * vector
        step = part(progress, number, len(target.prompts))
        best, distance = evolve(words, frame, aim, settings, f"ring {number}", step)
        losses += distance
        ways.append(Way(frame.spell(best), frame.spell(best), attacks=(prompt,)))
    return Found(tuple(ways), tuple(losses))


SPEC = AttackSpec(
    name="ring_a_bell",
    title="Ring-A-Bell",
    summary="Breeds a prompt of odd words whose text states lean to the concept, with the text encoder alone.",
    paper="https://arxiv.org/abs/2310.10012",
    knowledge=Knowledge.TEXT_ONLY,
    settings=Settings,
    run=run,
    budget="generations",
    needs_words=True,
)
