"""Mining on its own: what does a model, erased or not, still know of a concept? (Dark Miner, METHODS 2.3; Concept
Inversion, 3.2.)

Pictures of the concept are given, or drawn by the model before the erasure; several searches from fresh starts look for
what the model under test must read to explain them; each find is drawn and looked at, and the best comes first.

Departure: with the model before the erasure at hand, a search aims at what that one predicts for the concept's words, which
is the expectation of the noise that the papers aim at. On EmojiCanvas without its dog, 60 such steps brought it back in 16
of 16 pictures; 150 steps towards the noise in 3 to 14 of 16, by seed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .concept import ConceptSpec
from .dark import DarkEmbeddings
from .methods import Progress
from .methods._training import draw_pictures, erasure_of
from .methods.registry import Look, setting
from .operators.cond import Cond
from .operators.search import Teacher, TokenSlot, Variable, denoising_loss, free, pseudo_words
from .operators.search import mine as search_one
from .operators.train_loop import generator_for
from .operators.trainable import TrainableModel, TrainablePort

_DRAWS = 4
"""So many times as many pictures as asked for are drawn at most, until enough of them show the concept. Where a whole round
shows none, no more are drawn."""


@dataclass(frozen=True)
class Settings:
    count: int = setting(3, "How many embeddings are searched for, each from a fresh start.", low=1, high=1000, step=1)
    steps: int = setting(
        100, "Steps of each search. More find more, and take longer; without the model before the erasure it takes several "
        "times as many.", low=1, high=100000, step=10,
    )  # fmt: skip
    learning_rate: float = setting(
        0.02, "Size of a search step, relative to what is searched. Raise it if pictures stay empty, lower it if they "
        "look broken.", low=1e-6, high=10.0, step=1e-3,
    )  # fmt: skip
    batch: int = setting(8, "Pictures that each step looks at.", low=1, high=64, step=1)
    pictures: int = setting(
        16, "Pictures of the concept that are drawn first, where none are given.", low=1, high=10000, step=1
    )
    looks: int = setting(4, "Pictures that are drawn with each find.", low=1, high=256, step=1)
    guidance: float = setting(4.0, "Guidance of all these pictures.", low=0.0, high=30.0, step=0.5)
    sample_steps: int = setting(20, "Sampler steps of all these pictures.", low=2, high=1000, step=1)
    seed: int = setting(0, "The same seed gives the same result.", low=0, high=2**53, step=1)


@dataclass(frozen=True)
class PseudoWords:
    """Where words are searched instead of a free conditioning: their places in a prompt, and the widths of the text towers
    that read them, by name (``clip_l``, ``clip_g``, ``clip_h``), in the order in which their vectors lie end to end."""

    slot: TokenSlot
    towers: Mapping[str, int]

    def split(self, vectors: Tensor) -> dict[str, Tensor]:
        """[..., D] -> [..., D_tower] of each tower."""
        return dict(zip(self.towers, vectors.split(list(self.towers.values()), dim=-1), strict=True))


@dataclass(frozen=True)
class Finds:
    """What was mined, best first, with the pictures that show it."""

    dark: DarkEmbeddings
    pictures: Tensor
    """Clean, scaled latents [n, looks, C, h, w], drawn with each find."""
    examples: Tensor
    """Clean, scaled latents [k, C, h, w] of the concept that the searches explained."""


Searching = Callable[[TrainableModel, Cond, int, float], object]
"""searching(model, conditioning found so far, step, loss): for people who watch."""


def mine(
    port: TrainablePort,
    spec: ConceptSpec,
    settings: Settings | None = None,
    progress: Progress | None = None,
    *,
    base: TrainablePort | None = None,
    pictures: Tensor | None = None,
    look: Look | None = None,
    threshold: float = 0.5,
    words: PseudoWords | None = None,
    searching: Searching | None = None,
) -> Finds:
    """Search a model for embeddings that make it draw ``spec.erase[0]``. The model is not changed.

    Args:
        port: the model under test.
        spec: its first concept is mined.
        progress: called as progress(done, total) at every step; may raise to cancel.
        base: the model before the erasure. It draws the pictures of the concept where none are given (otherwise the model
            under test does), and searches aim at its predictions.
        pictures: clean, scaled latents [k, C, h, w] of the concept.
        look: a judge behind a decoder. It sorts out drawn pictures that don't show the concept, and its mean verdict is a
            find's score. Without it the score is how much better than the empty prompt a find explains the pictures.
        threshold: ``look`` has recognised the concept from here on.
        words: search pseudo-words that any prompt can contain, instead of free conditionings.

    Raises:
        ValueError: pictures of another size, hardly any that the judge recognises, or a search that diverged.
    """
    chosen, tick = settings or Settings(), progress or (lambda done, total: None)
    total = (chosen.count + 1) * chosen.steps
    asking, null = (base or port).conditions(list(spec.erase[0].words)), port.conditions([""])[0]
    variable = free(null) if words is None else pseudo_words(words.slot, null)
    with torch.no_grad(), ExitStack() as held:
        knowing = model = held.enter_context((base or port).trainable())
        examples = pictures
        if examples is None:
            accept = None if look is None else lambda z: look(z) >= threshold
            examples = _draw(knowing, asking, null, chosen, accept, "model" if base is None else "base_model",
                lambda done, of: tick(done * chosen.steps // max(1, of), total))  # fmt: skip
        if base is not None:  # behind the pictures, so that both together need no room for drawing them
            model = held.enter_context(port.trainable())
        if examples.shape[1:] != torch.Size(model.latent_shape):
            raise ValueError(
                f"pictures: latents of shape {tuple(examples.shape[1:])}, this model draws {tuple(model.latent_shape)}. "
                "Scale the images to the model's size"
            )
        teacher = None if base is None else _teacher(knowing, asking, model)
        values, states, drawn, scores = [], [], [], []
        for number in range(chosen.count):
            value = _search(model, examples, variable, teacher, chosen, number, tick, searching)
            if not torch.isfinite(value).all():
                raise ValueError("learning_rate: the search ended in values that are not numbers. Lower it")
            cond = variable.read(value)
            tick((number + 2) * chosen.steps - 1, total)
            latents = _pictures_of(model, cond, null, chosen)
            scores.append(float(look(latents).mean()) if look else _explained(model, examples, cond, null, chosen))
            values.append(value.float().cpu())
            states.append(cond.context[0].float().cpu())
            drawn.append(latents.float().cpu())
    tick(total, total)
    best = torch.tensor(scores).argsort(descending=True, stable=True).tolist()
    header = erasure_of(port, spec, "mine", chosen, {}).header
    how = {
        "form": "words" if words else "free conditioning",
        "aim": "noise" if base is None else "the base model's predictions",
        "scored by": "judge" if look else "explained share",
    }
    dark = DarkEmbeddings(
        replace(header, settings={**header.settings, **how}),
        torch.stack([states[i] for i in best]),
        tuple(scores[i] for i in best),
        {} if words is None else words.split(torch.stack([values[i] for i in best])),
    )
    return Finds(dark, torch.stack([drawn[i] for i in best]), examples)


def _draw(
    model: TrainableModel, asking: Sequence[Cond], null: Cond, settings: Settings,
    accept: Callable[[Tensor], Tensor] | None, who: str, progress: Progress,
) -> Tensor:  # fmt: skip
    """Pictures of the concept; with ``accept`` only those that show it.

    Raises:
        ValueError: hardly any do.
    """
    if accept is None:
        return draw_pictures(model, asking, null, settings.pictures, settings, progress)
    kept: list[Tensor] = []
    for attempt in range(_DRAWS):
        again = replace(settings, seed=settings.seed + attempt)
        drawn = draw_pictures(model, asking, null, settings.pictures, again, _part(progress, attempt))
        good = drawn[accept(drawn).to(drawn.device)]
        kept += good
        if len(kept) >= settings.pictures or not len(good):
            break
    if len(kept) < min(4, settings.pictures):
        other = (
            "Connect the model before the erasure as base_model, or images" if who == "model" else "Give images of it"
        )
        raise ValueError(
            f"{who}: of {(attempt + 1) * settings.pictures} pictures that it drew, the judge recognised the concept in "
            f"{len(kept)}. {other}"
        )
    return torch.stack(kept[: settings.pictures])


def _teacher(knowing: TrainableModel, asking: Sequence[Cond], model: TrainableModel) -> Teacher:
    """What the model before the erasure predicts for the concept's words, one of them at random for each latent."""

    def teach(z: Tensor, t: Tensor, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(0, len(asking), (len(z),), generator=generator).tolist()
        prediction = knowing.reference(z, t, Cond.cat([asking[i] for i in chosen]))
        return model.schedule.convert(prediction, z, t, knowing.space, model.space)

    return teach


def _part(progress: Progress, attempt: int) -> Progress:
    """The progress of one of ``_DRAWS`` equal parts."""
    return lambda done, of: progress(attempt * of + done, _DRAWS * of)


def _search(
    model: TrainableModel,
    examples: Tensor,
    variable: Variable,
    teacher: Teacher | None,
    settings: Settings,
    number: int,
    progress: Progress,
    searching: Searching | None,
) -> Tensor:
    def step(done: int, of: int) -> None:
        progress((number + 1) * of + done, (settings.count + 1) * of)

    def seen(value: Tensor, done: int, loss: float) -> None:
        if searching is not None:
            searching(model, variable.read(value), done, loss)

    return search_one(
        model, examples, variable, steps=settings.steps, rate=settings.learning_rate, batch=settings.batch, seed=settings.seed,
        name=f"mine {number}", progress=step, seen=seen if searching is not None else None, teacher=teacher,
    ).value  # fmt: skip


def _pictures_of(model: TrainableModel, cond: Cond, null: Cond, settings: Settings) -> Tensor:
    """[looks, C, h, w] drawn with a conditioning; the same noise for every find."""
    return model.denoise_until(
        cond.expand(settings.looks), null, guidance=settings.guidance, progress=1.0, steps=settings.sample_steps,
        generator=generator_for(settings.seed, "look", 0),
    )  # fmt: skip


def _explained(model: TrainableModel, examples: Tensor, cond: Cond, null: Cond, settings: Settings) -> float:
    """1 - L(cond) / L(""), both at the same times and noises, which no search has seen."""
    losses = torch.zeros(2, dtype=torch.float64)
    for i in range(4):
        for k, read in enumerate((cond, null)):
            generator = generator_for(settings.seed, "explained", i)
            losses[k] += float(denoising_loss(model, examples, read, generator, batch=settings.batch))
    return float(1 - losses[0] / losses[1])
