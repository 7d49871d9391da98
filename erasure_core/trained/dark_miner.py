"""Dark Miner (Meng et al., arXiv:2409.17682; METHODS 2.3).

Until nothing is found: mine the conditioning that best explains pictures of the concept, verify that it still produces it,
push exactly that conditioning to an anchor.

    mine:        c = argmin_c E || eps - eps_theta(x_t, t, c) ||^2                            x from k pictures
    verify:      s(c) = mean_e cos( E(x_c) - E(x_r), E(x_e) - E(x_r) ),   go on while s(c) > tau
    circumvent:  E || eps_theta(x_t, t, c) - eps_0(x_t, t, c_0) ||^2 over all c found, and kept prompts unchanged

Unverified (METHODS 2.3, 10): the authors' code is unpublished. The equations come from a third party; the form of the
embedding (here a full conditioning, or pseudo-words through ``embed``), every number, and the preservation term (here the
empty prompt and the user's kept words at the same latents) are ours.

The verifier is pluggable; :func:`difference_verifier` is the paper's with any picture encoder E.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..methods.registry import Progress, setting
from ..operators.regress import TargetTerm, keep_term, regress
from ..operators.search import denoising_loss, search
from ..operators.train_loop import Optimiser, Phase, Report, Trainer
from ..operators.trainable import Cond, Layers, LoRA, TrainableModel, TrainablePort
from ._common import KEEP, NULL, Prompts, erasure_of

ANCHOR, DARK = "anchor", "dark"
Verify = Callable[[TrainableModel, Cond], float]
"""How strongly a conditioning still produces the concept on the student; compared to the threshold."""


@dataclass(frozen=True)
class Settings:
    rounds: int = setting(10, "At most this many embeddings are mined and erased.", low=1, high=1000, step=1)
    threshold: float = setting(
        0.2, "Mining stops once what it finds scores no more than this.", low=-1.0, high=1.0, step=0.01
    )
    mine_steps: int = setting(1000, "Steps of each search.", low=1, high=100000, step=10)
    mine_rate: float = setting(5e-3, "Size of a search step.", low=1e-6, high=10.0, step=1e-3)
    iterations: int = setting(200, "Training steps after each find.", low=1, high=100000, step=10)
    learning_rate: float = setting(1e-4, "Size of a training step.", low=1e-8, high=1.0, step=1e-5)
    keep_weight: float = setting(
        1.0, "How hard the kept words and the empty prompt are held.", low=0.0, high=1e6, step=0.1
    )
    layers: Layers = setting(Layers.CROSS, "Which layers are changed.")
    rank: int = setting(8, "Rank of the change.", low=1, high=512, step=1)
    batch: int = setting(4, "Pictures per step.", low=1, high=64, step=1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


@dataclass(frozen=True)
class Mined:
    """The erasure, the conditionings [1, L, D] that were found and erased, and the score of every find, the last included."""

    erasure: Erasure
    pool: tuple[Tensor, ...]
    scores: tuple[float, ...]
    exhausted: bool
    """Whether the last find fell below the threshold, rather than the rounds ending."""


def similarity(found: Tensor, examples: Tensor, reference: Tensor) -> float:
    """s(c): features of the picture made from c [d], of concept pictures [k, d], of a concept-free picture [d]."""
    return float(F.cosine_similarity((found - reference)[None], examples - reference, dim=-1).mean())


def difference_verifier(
    encode: Callable[[Tensor], Tensor],
    examples: Tensor,
    reference: Tensor,
    null: Cond,
    *,
    guidance: float,
    steps: int,
    seed: int,
) -> Verify:
    """The paper's: ``encode`` maps clean latents [N, C, h, w] to features [N, d]; ``reference`` [1, ...] is concept-free."""
    with torch.no_grad():
        example_features, reference_features = encode(examples), encode(reference)[0]

    def verify(model: TrainableModel, cond: Cond) -> float:
        z = model.denoise_until(
            cond, null, guidance=guidance, progress=1.0, steps=steps, generator=torch.Generator().manual_seed(seed)
        )
        with torch.no_grad():
            return similarity(encode(z)[0], example_features, reference_features)

    return verify


def free_conditioning(null: Cond, generator: torch.Generator) -> Tensor:
    """A start for mining, [1, L, D]: BOS as it is, elsewhere noise with the mean and the deviation of its row."""
    context = null.context.detach()
    noise = torch.randn(context.shape, generator=generator).to(context)
    start = context.mean(-1, keepdim=True) + noise * context.std(-1, keepdim=True)
    return torch.cat([context[:, :1], start[:, 1:]], dim=1)


def mine(
    model: TrainableModel,
    latents: Tensor,
    start: Tensor,
    embed: Callable[[Tensor], Cond],
    settings: Settings,
    number: int,
    progress: Progress | None = None,
) -> Cond:
    """The conditioning that best explains the pictures on the student, as the ``number``-th search."""

    def objective(value: Tensor, generator: torch.Generator) -> Tensor:
        return denoising_loss(model, latents, embed(value), generator, batch=settings.batch)

    found = search(
        start,
        objective,
        steps=settings.mine_steps,
        lr=settings.mine_rate,
        seed=settings.seed,
        name=f"mine {number}",
        progress=progress,
    )
    with torch.no_grad():
        return embed(found.value)


def circumvent(
    model: TrainableModel, latents: Tensor, pool: list[Cond], anchor: Cond, prompts: Prompts, settings: Settings, number: int
) -> Phase:  # fmt: skip
    """The training of one round: every conditioning of the pool to the anchor, the kept prompts unchanged."""
    terms = [TargetTerm("erase", DARK, {ANCHOR: 1.0})]
    if settings.keep_weight:
        terms.append(keep_term(NULL, settings.keep_weight))
        terms += [keep_term(KEEP, settings.keep_weight)] if prompts.keep else []

    def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
        chosen = torch.randint(0, len(pool), (settings.batch,), generator=generator).tolist()
        conds = {**prompts.draw(settings.batch, generator), DARK: Cond.cat([pool[i] for i in chosen]), ANCHOR: anchor}
        picked = torch.randint(0, len(latents), (settings.batch,), generator=generator)
        t = torch.randint(0, len(model.schedule), (settings.batch,), generator=generator)
        x0 = latents[picked.to(latents.device)].to(model.device, model.dtype)
        return regress(model, terms, model.schedule.add_noise(x0, model.noise(settings.batch, generator), t), t, conds)

    return Phase(f"circumvent {number}", model.parameters(), loss, Optimiser(settings.learning_rate))


def run(
    port: TrainablePort,
    spec: ConceptSpec,
    settings: Settings,
    progress: Progress,
    *,
    latents: Tensor,
    verify: Verify,
    start: Callable[[torch.Generator], Tensor] | None = None,
    embed: Callable[[Tensor], Cond] | None = None,
    report: Report | None = None,
) -> Mined:
    """Mine and erase until nothing is found. ``latents`` [k, C, h, w]: clean, scaled, showing the concept.

    Args:
        start, embed: how a search starts, and the conditioning of its variable. Default: a free conditioning.
    """
    if not len(latents):
        raise ValueError("pictures: Dark Miner needs at least one picture of the concept")
    prompts = Prompts(port, spec)
    anchor = prompts[spec.erase[0].to]
    begin = start or (lambda generator: free_conditioning(prompts.null, generator))
    read = embed or prompts.null.with_context

    def watch(number: int) -> Progress:
        """Cancelling works inside a round too."""
        return lambda _done, _total: progress(number, settings.rounds)

    pool: list[Cond] = []
    scores: list[float] = []
    with port.trainable() as model:
        model.train(LoRA(settings.layers, settings.rank), settings.seed)
        for number in range(settings.rounds):
            progress(number, settings.rounds)
            seed = torch.Generator().manual_seed(settings.seed * 1_000_003 + number)
            found = mine(model, latents, begin(seed).to(model.device), read, settings, number, watch(number))
            scores.append(verify(model, found))
            if scores[-1] <= settings.threshold:
                break
            pool.append(found)
            phase = circumvent(model, latents, pool, anchor, prompts, settings, number)
            Trainer(model, [phase], settings.iterations, seed=settings.seed).run(watch(number), report)
        progress(settings.rounds, settings.rounds)
        made = erasure_of(port, spec, "dark_miner", settings, model.deltas())
        exhausted = bool(scores) and scores[-1] <= settings.threshold
        return Mined(made, tuple(c.context.float().cpu() for c in pool), tuple(scores), exhausted)
