"""SneakyPrompt (Yang et al., IEEE S&P 2024, arXiv:2305.12082; METHODS 3.5): other words in place of the forbidden one.

Black-box: it sees the erased model's pictures and a judge's answers to them, for 60 choices at most a prompt. The concept's
name gives way to three words of at most ten letters; the reward of a choice is what the judge says of its pictures.

*policy*: an LSTM of width 30 chooses word after word; with rewards r, its value estimates v and choices of probability p,
it descends  sum -log p (r - sg v) + (r - v)^2  by Adam at 0.1.   *greedy*: place after place, the best of its share of tries.

Departures: the paper gets past a safety filter, with a penalty where it closes and the CLIP similarity to the forbidden
prompt as reward; an erased model has no filter, so here the judge's answer is the reward and its threshold success. A judge's
probability p is next to 0 nearly everywhere, where CLIP's similarity still says which of two pictures is nearer: the reward
is 1 + log p / 6 to base 10, from 0 (one in a million) to 1. A choice has one picture, as theirs; one that shows the concept
has three more, since one alone is often luck.
Words that hide a piece of the concept's name are never chosen (their filter on words), only that name is replaced, and the
search doesn't widen to other words of the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

import torch
from torch import Tensor, nn

from ..concept import ConceptSpec
from ..operators.train_loop import generator_for
from .drawing import Eye, Progress, part
from .registry import AttackSpec, Knowledge, setting
from .target import AttackTarget, Found, Way
from .words import Frame, sentence_of

_WIDTH = 30
_DECADES = 6
"""Probabilities down to ten to the minus this are told apart."""
Reward = Callable[[Tensor], float]
"""Places [n] among the candidates -> :func:`worth` of the pictures."""


def worth(probability: float) -> float:
    """The reward, 0 to 1: equal steps for equal factors of the judge's probability."""
    return 1 + math.log10(max(probability, 10.0**-_DECADES)) / _DECADES


class Search(StrEnum):
    POLICY = "policy"
    GREEDY = "greedy"


@dataclass(frozen=True)
class Settings:
    search: Search = setting(
        Search.POLICY, "Who chooses the words: a network that learns from answers, or tries in turn."
    )
    words: int = setting(3, "Words in place of the concept's name.", low=1, high=20, step=1)
    letters: int = setting(10, "Letters that each of them may have.", low=1, high=50, step=1)
    queries: int = setting(
        60,
        "Choices of words that are tried for each prompt. Each is drawn once, and more often if that shows the concept.",
        low=1,
        high=100000,
        step=10,
    )
    learning_rate: float = setting(0.1, "How fast the policy learns.", low=1e-5, high=10.0, step=0.01)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


class Policy(nn.Module):
    """Chooses ``places`` of ``choices`` one after the other; each choice reads the one before."""

    def __init__(self, choices: int, places: int) -> None:
        super().__init__()
        self.places = places
        self.before = nn.Embedding(choices + 1, _WIDTH)  # the last row: nothing yet
        self.memory = nn.LSTMCell(_WIDTH, _WIDTH)
        self.choose = nn.ModuleList(nn.Linear(_WIDTH, choices) for _ in range(places))
        self.value = nn.ModuleList(nn.Linear(_WIDTH, 1) for _ in range(places))

    def forward(self, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """(choices [n], their log probabilities [n], value estimates [n])."""
        last = torch.tensor([self.before.num_embeddings - 1])
        state: tuple[Tensor, Tensor] | None = None
        chosen, logs, values = [], [], []
        for choose, value in zip(self.choose, self.value, strict=True):
            state = self.memory(self.before(last), state)
            log = choose(state[0]).log_softmax(-1)
            last = torch.multinomial(log.detach().exp(), 1, generator=generator)[0]
            chosen.append(last)
            logs.append(log[0, last])
            values.append(value(state[0])[0])
        return torch.cat(chosen), torch.cat(logs), torch.cat(values)


def policy_loss(reward: float, logs: Tensor, values: Tensor) -> Tensor:
    """Actor and critic, one reward at the end, undiscounted."""
    advantage = reward - values
    return (-logs * advantage.detach()).sum() + advantage.square().sum()


def by_policy(reward: Reward, choices: int, settings: Settings, name: str, done: Callable[[float], bool]) -> None:
    """Learn from the answers until they end or ``done``."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(settings.seed)  # torch.manual_seed would seed every GPU too
        policy = Policy(choices, settings.words)
    adam = torch.optim.Adam(policy.parameters(), settings.learning_rate)
    for i in range(settings.queries):
        with torch.enable_grad():
            chosen, logs, values = policy(generator_for(settings.seed, name, i))
            answer = reward(chosen)
            if done(answer):
                return
            loss = policy_loss(answer, logs, values)
            gradients = torch.autograd.grad(loss, list(policy.parameters()), allow_unused=True)
        for p, g in zip(policy.parameters(), gradients, strict=True):
            p.grad = g
        adam.step()


def by_turns(reward: Reward, choices: int, settings: Settings, name: str, done: Callable[[float], bool]) -> None:
    """Greedy: for each place the best of its share of tries, the others as found so far."""
    generator = generator_for(settings.seed, name, 0)
    best, highest = torch.randint(0, choices, (settings.words,), generator=generator), float("-inf")
    for i in range(settings.queries):
        tried = best.clone()
        if i:  # the start itself is the first query
            tried[i * settings.words // settings.queries] = torch.randint(0, choices, (), generator=generator)
        answer = reward(tried)
        if done(answer):
            return
        if answer > highest:
            best, highest = tried, answer


@dataclass
class Asked:
    """The reward of a choice for one prompt; remembers what was asked and answered."""

    target: AttackTarget
    frame: Frame
    candidates: Tensor
    eye: Eye
    queries: int
    progress: Progress
    answers: list[tuple[str, float]] = field(default_factory=list)

    @torch.no_grad()
    def __call__(self, chosen: Tensor) -> float:
        """Nothing is learned through a picture, nor through the previews that progress may draw."""
        self.progress(len(self.answers), self.queries)
        text = self.frame.spell(self.candidates[chosen[: self.frame.free]])
        self.answers.append((text, worth(self.eye.glance(self.target.erased.conditions([text])[0]).score)))
        return self.answers[-1][1]


def run(target: AttackTarget, spec: ConceptSpec, settings: Settings, progress: Progress) -> Found:
    """One prompt for each prompt: the one that the judge liked best."""
    words, ways, answers, pictures = target.words, [], [], 0
    assert words is not None
    known = [word for concept in spec.erase for word in concept.words]
    allowed = words.vocabulary[words.without(known)]
    candidates = allowed[[i for i, x in enumerate(allowed.tolist()) if len(words.spell([x])) <= settings.letters]]
    if not len(candidates):
        raise ValueError(f"sneaky_prompt: no words of at most {settings.letters} letters are left. Allow longer ones")
    search = by_policy if settings.search is Search.POLICY else by_turns
    with target.erased.trainable() as model:
        for number, prompt in enumerate(target.prompts):
            step = part(progress, number, len(target.prompts))
            frame = Frame.inside(words, sentence_of(prompt, known, "{} " + prompt), settings.words)
            eye = Eye(target, model, settings.seed, f"sneaky look {number}")
            asked = Asked(target, frame, candidates, eye, settings.queries, step)
            search(
                asked, len(candidates), settings, f"sneaky {number}", lambda answer: answer >= worth(target.threshold)
            )
            step(settings.queries, settings.queries)
            best, _ = max(asked.answers, key=lambda answer: answer[1])
            answers += [answer for _, answer in asked.answers]
            pictures += eye.asked
            ways.append(Way(best, best, attacks=(prompt,)))
    return Found(tuple(ways), tuple(answers), queries=pictures)


SPEC = AttackSpec(
    name="sneaky_prompt",
    title="SneakyPrompt",
    summary="Asks again and again with other words in place of the concept's name, and learns from a judge's answers.",
    paper="https://arxiv.org/abs/2305.12082",
    knowledge=Knowledge.BLACK_BOX,
    version=3,
    settings=Settings,
    run=run,
    budget="queries",
    needs_words=True,
    needs_look=True,
)
