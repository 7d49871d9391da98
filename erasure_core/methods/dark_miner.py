"""Dark Miner (Meng et al., arXiv:2409.17682; METHODS 2.3).

Until nothing is found: mine the conditioning that best explains pictures of the concept, verify that it still produces it,
push exactly that conditioning to an anchor.

    mine:        c = argmin_c E || eps - eps_theta(x_t, t, c) ||^2                            x from k pictures
    verify:      s(c) = mean_e cos( E(x_c) - E(x_r), E(x_e) - E(x_r) ),   go on while s(c) > tau
    circumvent:  E || eps_theta(x_t, t, c) - eps_0(x_t, t, c_0) ||^2 over all c found, and kept prompts unchanged

Unverified (METHODS 2.3, 10): the authors' code is unpublished. The equations come from a third party; the form of the
embedding (here a full conditioning, or pseudo-words), every number, and the preservation term (here the
empty prompt and the user's kept words at the same latents) are ours. Departures: the words of the concept, and embeddings
that were mined before, are in the pool from the start; a round mines a population of embeddings in one batch, and goes on
while the best of them still works; half of what a step erases is of the last round; at the end RECE solves for the words on
the weights that training leaves (``seal``), since among many finds the words themselves get few steps.

Verifying looks at pictures drawn from c. What looks is pluggable: any judge, of which ``metrics.judges.ExampleJudge`` makes the
paper's s(c) over a picture encoder E a probability. Without anything that looks, every round is made.
Of several concepts each has its round in turn, its own judge, and no more rounds once that one finds nothing.
A run that is cut off goes on from the last whole round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..dark import MAX_EMBEDDINGS, DarkEmbeddings
from ..fusion import added
from ..operators.changes import Layers, LoRA
from ..operators.cond import Cond
from ..operators.regress import TargetTerm, keep_term, regress
from ..operators.search import Variable, free, mine, pseudo_words
from ..operators.train_loop import Optimiser, Phase, Trainer
from ..operators.trainable import TrainableModel, TrainablePort
from ..port import ModelPort, Site
from . import rece
from ._training import KEEP, NULL, RANK, RATE, Prompts, Wanted, erasure_of, in_turn, kept, steps_of, wanted
from .registry import Aids, Look, MethodSpec, Progress, setting

ANCHOR, DARK = "anchor", "dark"


class Form(StrEnum):
    """What is searched."""

    FREE = "free"
    WORDS = "words"


@dataclass(frozen=True)
class Settings:
    rounds: int = setting(
        10, "At most this many rounds of searching and erasing are made for each concept.", low=1, high=1000, step=1
    )
    population: int = setting(
        8,
        "Embeddings searched side by side in a round. More close more ways back; each takes memory and time.",
        low=1,
        high=64,
        step=1,
    )
    form: Form = setting(
        Form.FREE, "free: anything that the network can read, the strongest search. words: pseudo-words that the text encoder "
        "reads, as textual inversion learns them; closes what prompts can reach."
    )  # fmt: skip
    words: int = setting(4, "Form words only: how many pseudo-words a find has.", low=1, high=16, step=1)
    threshold: float = setting(
        0.2, "Mining stops once the pictures of what it finds score no more than this.", low=0.0, high=1.0, step=0.01
    )
    mine_steps: int = setting(150, "Steps of each search.", low=1, high=100000, step=10)
    mine_rate: float = setting(
        0.02, "Size of a search step, relative to what is searched.", low=1e-6, high=10.0, step=1e-3
    )
    iterations: int = setting(200, "Training steps after each find.", low=1, high=100000, step=10)
    learning_rate: float = setting(1e-4, RATE, low=1e-8, high=1.0, step=1e-5)
    keep_weight: float = setting(
        1.0, "How hard the kept words and the empty prompt are held.", low=0.0, high=1e6, step=0.1
    )
    layers: Layers = setting(Layers.CROSS, "Which layers are changed.")
    rank: int = setting(8, RANK, low=1, high=512, step=1)
    batch: int = setting(4, "Pictures per step.", low=1, high=64, step=1)
    pictures: int = setting(16, "Pictures of the concept that are drawn first, where none are given.",
        low=1, high=10000, step=1)  # fmt: skip
    guidance: float = setting(
        4.0, "Guidance of these pictures and of those that verifying looks at.", low=0.0, high=30.0, step=0.5
    )
    sample_steps: int = setting(20, "Sampler steps of these pictures.", low=2, high=1000, step=1)
    seal: bool = setting(True, "At the end also solve for the words themselves, which takes a moment.")
    looks: int = setting(2, "Pictures of each find that a verification looks at.", low=1, high=256, step=1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


@dataclass(frozen=True)
class Mined:
    """The erasure, and how it came about."""

    erasure: Erasure
    pool: DarkEmbeddings | None
    """What was found and erased, best first, each scored as it was found; None where the words alone were enough."""
    found: int
    """How many these are; the pool has the best of very many."""
    scores: tuple[tuple[float, ...], ...]
    """For each concept, of each round's best find, the last round's included; empty where nobody looked."""
    exhausted: tuple[bool, ...]
    """For each concept whether the last find fell below the threshold, rather than the rounds ending."""

    def report(self) -> str:
        """What was found: a line, and of several concepts one more for each."""
        found = f"embeddings found and erased: {self.found}"
        if not any(self.scores):
            return f"Dark Miner: {found}; no judge looked, so every round was made."
        said = [self._of(n) for n in range(len(self.scores))]
        if len(said) == 1:
            return f"Dark Miner: {found}. {said[0]}" if self.found else f"Dark Miner: {said[0]}"
        names = [concept.name for concept in self.erasure.header.spec.erase]
        lines = [f"- {name}: {text}" for name, text in zip(names, said, strict=True)]
        return "\n".join([f"Dark Miner: {found}.", *lines])

    def _of(self, concept: int) -> str:
        best = ", ".join(f"{score:.2f}" for score in self.scores[concept])
        if not best:
            return "no judge looked, so every round was made."
        if self.exhausted[concept] and len(self.scores[concept]) == 1:
            return f"nothing was found, the best scored {best}: the words alone were enough."
        end = "but the rounds ended: ways back are left"
        if self.exhausted[concept]:
            end = "so the search found nothing more"
            if len(self.scores) > 1:
                end += "; what later rounds, for the others, changed was not looked at"
        return f"The best find of each round scored {best}, {end}."


def scores_of(model: TrainableModel, finds: list[Cond], null: Cond, look: Look, settings: Settings) -> list[float]:
    """For each conditioning what ``look`` gives to pictures that the student draws from it, in the mean."""
    z = model.denoise_until(
        Cond.cat([cond.expand(settings.looks) for cond in finds]), null, guidance=settings.guidance, progress=1.0,
        steps=settings.sample_steps, generator=torch.Generator().manual_seed(settings.seed),
    )  # fmt: skip
    scores = look(z).view(len(finds), settings.looks).mean(1).tolist()
    if not all(map(math.isfinite, scores)):
        raise ValueError("judge: it gave a score that is not a number. See what it makes of a picture, or leave it out")
    return scores


def variable_of(prompts: Prompts, aids: Aids, settings: Settings) -> Variable:
    """What is mined.

    Raises:
        ValueError: words are asked for, but nothing reads them with gradients.
    """
    if settings.form is Form.FREE:
        return free(prompts.null)
    if aids.slot is None:
        raise ValueError("form: words are searched through the text encoder, which was not given. Choose free")
    return pseudo_words(aids.slot(settings.words), prompts.null)


@dataclass(frozen=True)
class Way:
    """A conditioning that brings a concept."""

    cond: Cond
    concept: Wanted


def circumvent(
    model: TrainableModel, pool: list[Way], prompts: Prompts, settings: Settings, number: int
) -> Phase:  # fmt: skip
    """The training of one round: every way of the pool to its concept's anchor, the kept prompts unchanged."""
    owned: dict[int, list[int]] = {}
    for i, way in enumerate(pool):
        owned.setdefault(id(way.concept), []).append(i)
    every = torch.tensor(in_turn(list(owned.values())))
    recent = torch.arange(max(0, len(pool) - settings.population), len(pool)) if number else every
    terms = [TargetTerm("erase", DARK, {ANCHOR: 1.0})]
    if settings.keep_weight:
        terms.append(keep_term(NULL, settings.keep_weight))
        terms += [keep_term(KEEP, settings.keep_weight)] if prompts.keep else []

    def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
        some, new = (x[torch.randint(0, len(x), (settings.batch,), generator=generator)] for x in (every, recent))
        half = torch.arange(settings.batch) < (settings.batch + 1) // 2
        ways = [pool[i] for i in torch.where(half, new, some).tolist()]
        conds = {
            **prompts.draw(settings.batch, generator),
            DARK: Cond.cat([way.cond for way in ways]),
            ANCHOR: Cond.cat([way.concept.anchor for way in ways]),
        }
        most = max(len(way.concept.pictures) for way in pool)
        picked = torch.randint(0, most, (settings.batch,), generator=generator).tolist()
        t = torch.randint(0, len(model.schedule), (settings.batch,), generator=generator)
        x0 = torch.stack([w.concept.pictures[k % len(w.concept.pictures)] for w, k in zip(ways, picked, strict=True)])
        return regress(model, terms, model.schedule.add_noise(x0, model.noise(settings.batch, generator), t), t, conds)

    return Phase(f"circumvent {number}", model.parameters(), loss, Optimiser(settings.learning_rate))


def mine_and_erase(port: TrainablePort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Mined:
    """Mine and erase until nothing is found."""
    prompts = Prompts(port, spec, aids.owned)
    searched = variable_of(prompts, aids, settings)

    rounds = settings.rounds * len(spec.erase)

    def within(number: int) -> Progress:
        """Cancelling works inside a round too."""
        return lambda _done, _total: progress(number, rounds + 1)

    found: list[Cond] = []
    owners: list[int] = []  # whose concept that is
    marks: list[float] = []  # what the judge gave it
    scores: list[list[float]] = [[] for _ in spec.erase]  # of its rounds
    with port.trainable() as model:
        model.train(LoRA(settings.layers, settings.rank), settings.seed)
        keep, first = kept(aids, port, model, spec, "dark_miner", settings), 0
        if keep is not None and (state := keep.load()) is not None:
            first = int(state["rounds"])
            found += [prompts.null.with_context(c[None].to(model.device)) for c in state["found"]]
            owners += state["owners"].tolist()
            marks += state["marks"].tolist()
            for owner, score in state["scores"].tolist():
                scores[int(owner)].append(score)
            model.load(state)
            del state
        progress(first, rounds + 1)
        concepts = wanted(model, spec, prompts, aids, settings.pictures, settings, within(0))
        pool = [Way(cond, concept) for concept in concepts for cond in concept.words]
        pool += [Way(cond, concepts[owner]) for cond, owner in zip(found, owners, strict=True)]

        def circumvent_all(number: int) -> None:
            phase = circumvent(model, pool, prompts, settings, number)
            # A find is of one concept, the words are of all.
            steps = settings.iterations if number else steps_of(settings, spec)
            Trainer(model, [phase], steps, seed=settings.seed).run(within(number), aids.watch)
            if keep is not None:
                mined = [c.context[0].cpu() for c in found]
                owned = [(owner, score) for owner, each in enumerate(scores) for score in each]
                keep.keep({
                    "rounds": torch.tensor(number + 1), "scores": torch.tensor(owned, dtype=torch.float64).view(-1, 2),
                    "found": torch.stack(mined) if mined else torch.zeros(0),
                    "owners": torch.tensor(owners), "marks": torch.tensor(marks, dtype=torch.float64), **model.tensors(),
                })  # fmt: skip

        if not first:
            circumvent_all(0)

        def exhausted(concept: int) -> bool:
            return bool(scores[concept]) and scores[concept][-1] <= settings.threshold

        for number in range(max(1, first), rounds + 1):
            turn = (number - 1) % len(concepts)
            if exhausted(turn):
                continue
            value = mine(
                model, concepts[turn].pictures, searched, steps=settings.mine_steps, rate=settings.mine_rate,
                batch=settings.batch, seed=settings.seed, name=f"mine {number}", progress=within(number),
                population=settings.population,
            ).value  # fmt: skip
            with torch.no_grad():
                mined = [searched.read(x) for x in value]
            seen = [math.nan] * len(mined)
            look = aids.looks[turn] if turn < len(aids.looks) else None
            if look is not None:
                seen = scores_of(model, mined, prompts.null, look, settings)
                scores[turn].append(max(seen))
                if exhausted(turn):
                    continue
            pool += [Way(c, concepts[turn]) for c in mined]
            found += mined
            owners += [turn] * len(mined)
            marks += seen
            circumvent_all(number)
        progress(rounds + 1, rounds + 1)
        if keep is not None:
            keep.remove()
        made = erasure_of(port, spec, "dark_miner", settings, model.deltas())
        ended = tuple(map(exhausted, range(len(concepts))))
    if settings.seal:
        made = sealed(port, spec, made, aids)
    return Mined(made, pool_of(made, found, owners, marks), len(found), tuple(map(tuple, scores)), ended)


def pool_of(made: Erasure, found: list[Cond], owners: list[int], marks: list[float]) -> DarkEmbeddings | None:
    """The finds as a set that can be saved, best first; those that nobody looked at come last."""
    if not found:
        return None
    best = sorted(range(len(found)), key=lambda i: (math.isnan(marks[i]), -marks[i]))[:MAX_EMBEDDINGS]
    how = {**made.header.settings, "scored by": "nobody" if all(map(math.isnan, marks)) else "judge"}
    states = torch.stack([found[i].context[0].float().cpu() for i in best])
    return DarkEmbeddings(
        replace(made.header, settings=how), states, tuple(marks[i] for i in best), owners=tuple(owners[i] for i in best)
    )


class _Changed:
    """A port whose text projections carry a change."""

    def __init__(self, port: ModelPort, change: Erasure) -> None:
        self._port, self._deltas = port, change.deltas

    def __getattr__(self, name: str) -> Any:
        return getattr(self._port, name)

    def weight(self, site: Site) -> Tensor:
        weight = self._port.weight(site)
        delta = self._deltas.get(site.name)
        return weight if delta is None else weight + delta.dense().to(weight)


def sealed(port: ModelPort, spec: ConceptSpec, made: Erasure, aids: Aids) -> Erasure:
    """``made``, and on top of it what RECE at its defaults solves for on the weights that it leaves."""
    solved = rece.run(
        _Changed(port, made), spec, rece.Settings(), lambda done, total: None, Aids(dark=aids.dark, owners=aids.owners)
    )
    every = dict.fromkeys([*made.deltas, *solved.deltas])
    return replace(made, deltas={name: added(name, [made, solved]) for name in every})


def run(port: TrainablePort, spec: ConceptSpec, settings: Settings, progress: Progress, aids: Aids) -> Erasure:
    """Erase with Dark Miner: :func:`mine_and_erase`, which tells ``aids.found`` about the pool."""
    mined = mine_and_erase(port, spec, settings, progress, aids)
    if aids.found is not None:
        aids.found(mined.pool, mined.report())
    return mined.erasure


SPEC = MethodSpec(
    name="dark_miner",
    title="Dark Miner",
    summary="Searches for what still brings the concept back and erases that too, round after round, until its own search "
    "finds nothing.",
    paper="https://arxiv.org/abs/2409.17682",
    settings=Settings,
    run=run,
    trains=True,
    asks_judge=True,
)
