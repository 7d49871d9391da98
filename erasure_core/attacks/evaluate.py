"""How every attack is counted: pictures of what it found, with noises that it never saw, before a judge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..artifact import Delta
from ..metrics.rates import Rate, rate
from ..metrics.scores import AttackSuccess, attack_success
from ..operators.changes import FullWeights, Layers, LoRA, LowRank
from ..operators.cond import Cond
from ..operators.trainable import TrainableModel
from .drawing import Progress, draw, noises, part
from .target import AttackTarget, Found, Look, Way


@dataclass(frozen=True, eq=False)
class Result:
    """The judge's answers to what an attack found."""

    found: Found
    probabilities: tuple[Tensor, ...]
    """For each way the probability [k] of its pictures; k is 1 where the way fixes the noise."""
    latents: Tensor
    """All pictures as clean latents, way by way."""
    threshold: float

    @property
    def rate(self) -> Rate:
        """Share of pictures that show the concept, as the judge sees them."""
        return self.at(self.threshold)

    def at(self, threshold: float) -> Rate:
        """The same at another threshold, for curves."""
        flat = torch.cat(self.probabilities) if self.probabilities else torch.empty(0)
        return rate(flat >= threshold)

    @property
    def by_way(self) -> tuple[Rate, ...]:
        return tuple(rate(p >= self.threshold) for p in self.probabilities)

    @property
    def succeeded(self) -> Tensor:
        """[ways] bool: at least one picture shows the concept. This is what the papers count: prompts, not pictures."""
        return torch.tensor([bool((p >= self.threshold).any()) for p in self.probabilities], dtype=torch.bool)

    @property
    def by_prompt(self) -> dict[str, bool]:
        """Of each attacked prompt whether a way that stands in its place succeeded."""
        found: dict[str, bool] = {}
        for way, done in zip(self.found.ways, self.succeeded.tolist(), strict=True):
            for prompt in way.attacks:
                found[prompt] = found.get(prompt, False) or done
        return found

    @property
    def pictures(self) -> int:
        """Of an attacked prompt, of several the most."""
        counts: Counter[str] = Counter()
        for way, p in zip(self.found.ways, self.probabilities, strict=True):
            counts.update(dict.fromkeys(way.attacks, len(p)))
        return max(counts.values(), default=0)

    @property
    def best(self) -> Way | None:
        """The way whose pictures show the concept most clearly."""
        if not self.probabilities:
            return None
        return self.found.ways[int(torch.stack([p.mean() for p in self.probabilities]).argmax())]


def success(asked: Result, attacked: Result) -> AttackSuccess | None:
    """The papers' count, by prompt, before the attack and with it.

    None for an attack that takes no prompt's place, or whose find stands in the place of several at once: its pictures are one
    observation, not one for each prompt.
    """
    after = attacked.by_prompt
    if not after or any(len(way.attacks) > 1 for way in attacked.found.ways):
        return None
    before, pictures = asked.by_prompt, (asked.pictures, attacked.pictures)
    return attack_success(torch.tensor([before[p] for p in after]), torch.tensor(list(after.values())), pictures)


@torch.no_grad()
def evaluate(
    target: AttackTarget,
    found: Found,
    look: Look,
    *,
    pictures: int = 4,
    seed: int = 0,
    progress: Progress | None = None,
) -> Result:
    """Draw ``pictures`` for each way with the erased model and ask the judge.

    The noises come from this function's own seed space: no attack trains on them. Picture k of every way has the same
    noise, so that attacks, and asking, can be compared picture by picture.
    """
    null, without, ways = target.erased.conditions([""])[0], target.without(), found.ways
    prompts = list(dict.fromkeys(way.prompt for way in ways))
    read = dict(zip(prompts, target.erased.conditions(prompts), strict=True)) if prompts else {}
    if "" in read:  # typed as it is
        read[""] = target.as_typed(null, "")
    conds = [read[way.prompt] if way.states is None else _states(target, null, way) for way in ways]
    counts = [pictures if way.noise is None else 1 for way in ways]
    made: list[list[Tensor]] = [[] for _ in ways]
    probabilities: dict[int, Tensor] = {}
    with target.erased.trainable() as model:
        apply_change(model, found.change)
        common = noises(model, seed, "evaluate", range(pictures))
        for rows in _side_by_side(ways, conds, counts, target.at_once(model)):
            if progress:
                progress(len(probabilities), len(ways))
            noise = [common[k] if (own := ways[n].noise) is None else own.to(common) for n, k in rows]
            numbers = [n for n, _ in rows]
            z = _draw(
                model, [ways[n] for n in numbers], [conds[n] for n in numbers], without, torch.stack(noise), target
            )
            for n, one in zip(numbers, z, strict=True):
                made[n].append(one)
            for n in dict.fromkeys(numbers):  # a way is judged as soon as all of it is there
                if len(made[n]) == counts[n]:
                    probabilities[n] = look(torch.stack(made[n])).float().cpu()
        if progress:
            progress(len(ways), len(ways))
        latents = [one for latents in made for one in latents]
        drawn = torch.stack(latents) if latents else torch.empty(0, *model.latent_shape)
    return Result(found, tuple(probabilities[n] for n in range(len(ways))), drawn, target.threshold)


def _states(target: AttackTarget, null: Cond, way: Way) -> Cond:
    """What is read of a way that is no prompt; where gates are, with those of the prompt that it stands for."""
    assert way.states is not None
    cond = null.with_context(way.states[None])
    return target.as_typed(cond, way.attacks[0]) if len(way.attacks) == 1 else cond


_FINALISTS, _FINAL_LOOKS = 6, 8


@torch.no_grad()
def shortlist(
    target: AttackTarget,
    found: Found,
    look: Look,
    *,
    looks: int = 12,
    seed: int = 1,
    each: bool = False,
    progress: Progress | None = None,
) -> Found:
    """The find whose pictures show the concept most clearly, as an attacker would choose it: at noises that neither the
    search nor :func:`evaluate` at its own seed has seen. The best six of more are looked at again, with eight pictures each:
    among a hundred finds the best of two pictures is mostly luck.

    Finds that fix their noise have one picture each, so choosing among them would be choosing the figure: all stay.

    Args:
        looks: pictures over all finds, two each at least.
        seed: another than that of the evaluation.
        each: one find for each prompt that was attacked, so that prompts can be counted; the best of all otherwise.
    """
    rivals: dict[tuple[str, ...], list[Way]] = {}
    for way in found.ways:
        rivals.setdefault(way.attacks if each else (), []).append(way)
    if len(rivals) == len(found.ways) or any(way.noise is not None for way in found.ways):
        return found
    pictures = max(2, looks // len(found.ways))
    crowded = any(len(group) > _FINALISTS for group in rivals.values())
    rounds = [(pictures, _FINALISTS), (max(pictures, _FINAL_LOOKS), 1)] if crowded else [(pictures, 1)]
    for n, (each_way, stay) in enumerate(rounds):
        step = part(progress, n, len(rounds)) if progress else None
        result = evaluate(target, found, look, pictures=each_way, seed=seed, progress=step)
        clear = {way: float(p.mean()) for way, p in zip(found.ways, result.probabilities, strict=True)}
        groups = [[way for way in group if way in clear] for group in rivals.values()]
        best = (way for group in groups for way in sorted(group, key=clear.__getitem__, reverse=True)[:stay])
        found = replace(found, ways=tuple(best))
    return found


def _side_by_side(
    ways: Sequence[Way], conds: Sequence[Cond], counts: Sequence[int], size: int
) -> Iterator[list[tuple[int, int]]]:
    """(number of a way, number of its picture), batch by batch: pictures that can be sampled together, also of several
    ways. One or two of a way, as of a fixed noise or in a shortlist, would leave most of a batch empty."""
    alike: dict[tuple[object, ...], list[tuple[int, int]]] = {}
    for n, (way, cond) in enumerate(zip(ways, conds, strict=True)):
        how = (way.guidance, way.strength, way.picture is None, way.mask is None, cond.context.shape[1])
        alike.setdefault(how, []).extend((n, k) for k in range(counts[n]))
    for rows in alike.values():
        yield from (rows[i : i + size] for i in range(0, len(rows), size))


def _draw(
    model: TrainableModel, ways: Sequence[Way], conds: Sequence[Cond], null: Cond, noise: Tensor, target: AttackTarget
) -> Tensor:
    """A picture for each of ``ways``, which are sampled alike."""
    starts = [way.picture.to(noise) for way in ways if way.picture is not None]
    masks = [way.mask.to(noise) for way in ways if way.mask is not None]
    return draw(
        model, Cond.cat([cond.to(noise) for cond in conds]), null, noise, target.sampler, memory=target.memory,
        picture=torch.stack(starts) if starts else None, strength=ways[0].strength,
        mask=torch.stack(masks) if masks else None, guidance=ways[0].guidance,
    )  # fmt: skip


@torch.no_grad()
def apply_change(model: TrainableModel, change: Mapping[str, Delta]) -> None:
    """Let the model's student weights have ``change`` on top.

    Factors stay factors: dense, a LoRA over all layers would take as much memory as the network.
    """
    if not change:
        return
    sites = [site for site in model.sites if Layers.ALL.covers(site.name)]
    if any(delta.down is None for delta in change.values()):
        for site, p in zip(sites, model.train(FullWeights(Layers.ALL)), strict=True):
            if site.name in change:
                p.copy_(change[site.name].dense())
        return
    model.train(LoRA(Layers.ALL, max(1, *(delta.rank for delta in change.values()))))
    for site in sites:
        delta, own = change.get(site.name), model.change(site.name)
        if delta is not None and delta.down is not None:
            assert isinstance(own, LowRank)
            own.down[: delta.rank] = delta.down  # what is behind it meets zeros in up
            own.up[:, : delta.rank] = delta.up
