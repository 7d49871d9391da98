"""Forget-Me-Not (Zhang et al., 2023, arXiv:2303.17591; METHODS 2.10): attention re-steering.

    L = || concat over layers of P[:, concept columns] ||_2

with P = softmax(q k^T / sqrt(d)) the cross-attention probabilities [B, heads, hw, L] on noised pictures of the concept, and
the columns those of the concept's tokens, end-of-text too with ``end_tokens``. A plain norm, not its square. AdamW 2e-6, 35
steps. Weak against attacks and hard to reproduce, say later papers.

Which rows a concept is in depends on the text encoder. In EmojiCanvas it is in the padding behind the words: with those rows
taken from "a house", a prompt for a dog draws a house; with the word's own row taken from there, still a dog. Steering away
from the word alone is not steering away from the concept there: ``end_tokens`` is needed, and with it a larger ``keep_weight``,
because all prompts end in such rows.

Departures: pictures of the concept are sampled by the frozen network unless they are given; cross-attention only by default
(the authors train the entire UNet); the preceding textual inversion is left to operators/search.py; the bare word,
where they write "a photo of" or "in the style of" before it; kept words are held;
of a dark embedding, which has no words, every row but the first is the concept's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..artifact import Erasure
from ..concept import ConceptSpec
from ..devices import moved
from ..operators.cond import Cond
from ..operators.regress import keep_term, regress
from ..operators.train_loop import Kind, Optimiser, Phase, Trainer
from ..operators.trainable import TrainableModel, TrainablePort
from ..port import TokenKind
from ._training import ERASE, KEEP, RATE, STEPS, Prompts, TrainSettings, draw_pictures, erasure_of, kept, steps_of
from .registry import Aids, MethodSpec, Progress, setting


@dataclass(frozen=True)
class Settings(TrainSettings):
    iterations: int = setting(35, STEPS, low=1, high=100000, step=5)
    learning_rate: float = setting(2e-6, RATE, low=1e-8, high=1.0, step=1e-6)
    pictures: int = setting(8, "Pictures of each concept drawn before training.", low=1, high=10000, step=1)
    end_tokens: bool = setting(False, "Steer away from the end of the prompt too, which carries its summary.")


Attention = tuple[Tensor, Tensor]
"""What a cross-attention multiplies: queries [B, heads, hw, d] and keys [B, heads, L, d]."""


@contextmanager
def attentions(model: TrainableModel) -> Iterator[list[Attention]]:
    """Collects queries and keys of every cross-attention that runs inside, in network order, with gradient.

    Nothing is computed from them in the network's own pass: where blocks are computed again in the backward pass, that
    pass has to be what it was, and is not collected a second time.

    Raises:
        ValueError: a block does not say how many heads it has.
    """
    collected: list[Attention] = []
    pending: dict[str, Tensor] = {}
    handles = []

    def watch(block: str, heads: int) -> None:
        def query(_module, _args, out: Tensor) -> None:
            pending[block] = out

        def key(_module, _args, out: Tensor) -> None:
            q, k = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (pending.pop(block), out))
            collected.append((q, k))

        handles.append(model.module(f"{block}.to_q").register_forward_hook(query))
        handles.append(model.module(f"{block}.to_k").register_forward_hook(key))

    try:
        for site in model.sites:
            block, _, leaf = site.name.rpartition(".")
            if leaf == "to_k" and block.endswith("attn2"):
                heads = getattr(model.parent(site.name), "heads", None)
                if not isinstance(heads, int):
                    raise ValueError(f"model: {block} does not say how many attention heads it has")
                watch(block, heads)
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def probabilities(q: Tensor, k: Tensor) -> Tensor:
    """P [B, heads, hw, L], in float32 at least."""
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
    return scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32))


def steering_loss(attended: Sequence[Attention], columns: Tensor) -> Tensor:
    """|| P at the marked columns ||_2 over all layers. ``columns`` [B, L]: what the square of each counts, 0 or 1 where no
    text is repeated.

    Of each layer only queries and keys are kept for the backward pass. They have room in the memory estimate: it counts three
    predictions, and a step makes two.
    """

    def squared(q: Tensor, k: Tensor) -> Tensor:
        p = probabilities(q, k)
        return (p.square() * columns.to(p)[:, None, None, :]).sum()

    squares = [checkpoint(squared, q, k, use_reentrant=False, preserve_rng_state=False) for q, k in attended]
    return torch.stack(squares).sum().clamp_min(1e-20).sqrt()


def concept_columns(kinds: Tensor, *, end_tokens: bool) -> Tensor:
    """[L] bool: the content tokens of a prompt that is the concept's bare words, and on request all end-of-text ones."""
    marked = kinds == TokenKind.CONTENT
    return marked | (kinds == TokenKind.EOS) | (kinds == TokenKind.PAD) if end_tokens else marked


def batched(columns: Sequence[Tensor], length: int) -> Tensor:
    """[B, length] of columns [L] of unlike length, repeated as ``Cond.cat`` repeats their text. Of n copies each gets an nth
    of the attention, so n times the sum of their squares is what the text has alone."""
    return torch.stack([x.repeat(length // len(x)).float() * (length // len(x)) for x in columns])


def run(
    port: TrainablePort,
    spec: ConceptSpec,
    settings: Settings,
    progress: Progress,
    aids: Aids,
) -> Erasure:
    """Erase with Forget-Me-Not. Draws its own pictures of the concept where ``aids`` has none."""
    prompts, steps = Prompts(port, spec, aids.owned), steps_of(settings, spec)
    words = [word for word, _ in prompts.pairs]  # the dark ones too
    kinds = dict(zip(prompts.words, (text.kinds for text in port.text(prompts.words)), strict=True))
    columns = [
        concept_columns(kinds[w], end_tokens=settings.end_tokens)
        if w in kinds
        else torch.arange(prompts[w].context.shape[1]) > 0
        for w in words
    ]
    with port.trainable() as model:
        latents = aids.pictures
        if latents is None:
            latents = draw_pictures(
                model, [prompts[w] for w in words], prompts.null, settings.pictures * len(spec.erase), settings,
                aids.before(progress, steps),
            )  # fmt: skip
        pool = latents.to(model.device, model.dtype)
        # Pictures that are given show the first concept.
        shown = [i for i, pair in enumerate(prompts.pairs) if aids.pictures is None or pair in prompts.concepts[0]]

        def loss(_: int, generator: torch.Generator) -> dict[str, Tensor]:
            chosen = torch.randint(0, len(pool), (settings.batch,), generator=generator)
            number = [shown[i % len(shown)] for i in chosen.tolist()]
            t = torch.randint(0, len(model.schedule), (settings.batch,), generator=generator)
            z = model.schedule.add_noise(pool[moved(chosen, pool.device)], model.noise(settings.batch, generator), t)
            conds = {**prompts.draw(settings.batch, generator), ERASE: Cond.cat([prompts[words[i]] for i in number])}
            with attentions(model) as attended:
                model.predict(z, t, conds[ERASE])
            marked = batched([columns[i] for i in number], conds[ERASE].context.shape[1])
            losses = {"attention": steering_loss(attended, moved(marked, model.device))}
            if prompts.keep and settings.keep_weight:
                losses.update(regress(model, [keep_term(KEEP, settings.keep_weight)], z, t, conds))
            return losses

        parameters = model.train(settings.parameters(), settings.seed)
        phase = Phase("steer", parameters, loss, Optimiser(settings.learning_rate, Kind.ADAMW, 0.01))
        Trainer(model, [phase], steps, seed=settings.seed).run(
            progress, aids.watch, checkpoint=kept(aids, port, model, spec, "forget_me_not", settings)
        )
        return erasure_of(port, spec, "forget_me_not", settings, model.deltas(energy=settings.energy))


SPEC = MethodSpec(
    name="forget_me_not",
    title="Forget-Me-Not",
    summary="Trains attention away from the concept's words in some 35 steps: quick and weak.",
    paper="https://arxiv.org/abs/2303.17591",
    settings=Settings,
    run=run,
    trains=True,
    unread=("replace_with",),
)
