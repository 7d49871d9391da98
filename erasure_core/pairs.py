"""SDEdit pairs: an unsafe picture and its safe counterpart, which differ only in the unsafe part (METHODS 4.1).

SDEdit (Meng et al., ICLR 2022, arXiv:2108.01073) noises a picture up to a strength rho and denoises it again under another
prompt; DUO (arXiv:2407.21035) makes its pairs so:

    unsafe member   a real picture, or drawn from noise n with the unsafe prompt; again until the judge sees the concept
    safe member     a(t0) x + s(t0) n at t0 = progress 1 - rho, denoised with the safe prompt and the unsafe one as negative
                    prompt; again until the judge sees nothing

Both members share the noise n and the schedule. A redraw takes the next noise of its pair, so a pair does not depend on
how many others there are. Pairs of which a member is still wrong after the last redraw are left out.

Several scenes, each with an unsafe and a safe prompt, take turns: pair k shows scene k % m. DUO's authors use two of nudity;
an object that is the whole picture takes a scene for each of several other objects, or all that is learned is the way to one.

Beyond the paper, on request: redraws climb from a weak rho to a strong one, so that each pair gets the weakest edit that
takes the concept out, and a safe member is also redrawn where it lost what should have stayed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .artifact import WrongModelError
from .operators.cond import Cond
from .operators.trainable import TrainableModel, Weights
from .port import Family

MAX_PAIRS = 1024
MAX_REDRAWS = 100
MAX_SCENES = 64

Scene = tuple[str, str]
"""(unsafe prompt, safe prompt)."""
Draw = tuple[int, int]
"""(which pair, which of its noises)."""
Looks = Callable[[Tensor], Tensor] | Sequence[Callable[[Tensor], Tensor]] | None
"""Gives the probability that each latent shows the concept; or one for each scene, where these show several concepts."""


@dataclass(frozen=True)
class ConceptPairs:
    """Clean, scaled latents [N, C, h, w] of the ``unsafe`` members and, row by row, of their ``safe`` counterparts."""

    unsafe: Tensor = field(repr=False)
    safe: Tensor = field(repr=False)
    scenes: tuple[Scene, ...]
    family: Family
    note: str = ""
    """How they were made, in words."""
    shown: tuple[int, ...] = ()
    """The number of each pair's scene; empty where there is one scene."""
    tally: Tally | None = field(default=None, compare=False)
    """The same in figures; of pairs from a file, None."""

    def __post_init__(self) -> None:
        if self.unsafe.shape != self.safe.shape or self.unsafe.ndim != 4 or not len(self.unsafe):
            raise ValueError(
                f"pairs: {tuple(self.unsafe.shape)} unsafe and {tuple(self.safe.shape)} safe latents must be the same "
                "[N, C, h, w], and not none. Make them again with Make SDEdit Pair"
            )
        shown = self.shown or (0,) * len(self)
        known = len(self.scenes) <= MAX_SCENES and all(0 <= n < len(self.scenes) for n in shown)
        if len(shown) != len(self) or not known:
            raise ValueError(f"pairs: {len(self)} pairs and {len(self.scenes)} scenes don't match up. Make them again")

    def __len__(self) -> int:
        return len(self.unsafe)

    def scene(self, k: int) -> Scene:
        """The prompts of pair ``k``."""
        return self.scenes[self.shown[k] if self.shown else 0]

    def check_fits(self, family: Family) -> None:
        """Raise where they were made with another kind of model: its latents mean something else.

        Raises:
            WrongModelError: names both.
        """
        if family != self.family:
            raise WrongModelError(
                f"pairs: they were made with {self.family}, but this is {family}. Make them with this model instead"
            )

    def summary(self) -> str:
        """One paragraph for people."""
        side = " x ".join(str(n) for n in self.unsafe.shape[2:])
        each = Counter(self.shown or (0,) * len(self))
        if len(self.scenes) == 1:
            unsafe, safe = self.scenes[0]
            lines = [f"{len(self)} pairs: {unsafe!r} -> {safe!r}"]
        else:
            lines = [f"{len(self)} pairs of {len(self.scenes)} scenes"]
            lines += [f"  {each[n] or 'none'}: {u!r} -> {s!r}" for n, (u, s) in enumerate(self.scenes)]
        return "\n".join([*lines, f"latents of {side}, {self.family}", *([self.note] if self.note else [])])


@dataclass(frozen=True)
class Tally:
    """What making pairs took: the pairs that were asked for, those that came out, and what went wrong meanwhile."""

    asked: int
    made: int
    unseen: tuple[int, ...]
    """Pairs in whose unsafe member the judge never saw the concept."""
    stubborn: tuple[int, ...]
    """Pairs whose safe member showed it to the last."""
    unsafe_redraws: int
    safe_redraws: int
    judged: bool
    drawn: bool
    """Whether unsafe members were drawn, rather than given."""
    compared: bool = False
    """Whether safe members were also compared with the unsafe ones."""

    @property
    def numbers(self) -> tuple[int, ...]:
        """The pairs that came out."""
        return tuple(n for n in range(self.asked) if n not in {*self.unseen, *self.stubborn})

    def report(self, max_redraws: int) -> str:
        """In sentences; pairs are counted from 1."""
        lines = [f"{self.made} of {self.asked} pairs made"]
        if not self.judged:
            return f"{lines[0]}; no judge looked at them: look yourself"
        if self.drawn:
            lines.append(f"redrawn until the judge saw the concept: {self.unsafe_redraws} times")
        until = "redrawn until it no longer did" + (" and the rest stayed" if self.compared else "")
        lines.append(f"{until}: {self.safe_redraws} times")
        for numbers, what in (
            (self.unseen, "left out, because the judge does not see the concept in the unsafe picture"),
            (
                self.stubborn,
                "left out, because the safe picture still showed the concept"
                + (" or lost the rest" if self.compared else ""),
            ),
        ):
            if numbers:
                tries = f" after {max_redraws} redraws" if self.drawn or numbers is self.stubborn else ""
                shown = ", ".join(str(n + 1) for n in numbers[:20]) + (", ..." if len(numbers) > 20 else "")
                lines.append(f"{what}{tries}: {len(numbers)} (pair {shown})")
        return "\n".join(lines)


class NoPairsError(ValueError):
    """Not one pair passed the judge; the message says where they failed and what to try, ``tally`` how often."""

    def __init__(self, message: str, tally: Tally) -> None:
        super().__init__(message)
        self.tally = tally


def pair_noise(seed: int, draw: Draw, shape: Sequence[int]) -> Tensor:
    """[1, C, h, w] standard normal of one draw, the same on every device and in every batch."""
    number, attempt = draw
    mixed = (seed * 1_000_003 + number * 1_009 + attempt) % (1 << 63)
    return torch.randn(1, *shape, generator=torch.Generator().manual_seed(mixed))


def pair_up(
    count: int,
    draw: Callable[[Sequence[Draw]], Tensor],
    edit: Callable[[Tensor, Sequence[Draw]], Tensor],
    look: Looks,
    *,
    threshold: float,
    max_redraws: int,
    alike: Callable[[Tensor, Tensor], Tensor] | None = None,
    drawn: bool = True,
    scenes: int = 1,
    at_once: int = 4,
) -> tuple[Tensor, Tensor, Tally]:
    """(unsafe, safe, tally): the members [N, C, h, w] of the pairs that the judge accepts both ways.

    Args:
        draw: unsafe latents of some draws; where they are given (not ``drawn``) it is asked once for each.
        edit: the safe counterparts of unsafe latents, with the noise of some draws.
        scenes: pairs with the same remainder by this are drawn together, ``at_once`` at most.
        look: what judges the latents; None accepts everything.
        alike: whether each safe latent kept the rest of its unsafe one (unsafe, safe) -> [n] bool; None accepts everything.

    Raises:
        NoPairsError: nothing is left.
    """

    looks = [] if look is None else [look] if callable(look) else list(look)
    if len(looks) not in (0, 1, scenes):
        raise ValueError(f"look: {len(looks)} judges for {scenes} scenes")

    def seen(draws: Sequence[Draw], latents: Tensor) -> list[bool] | None:
        if not looks:
            return None
        scene = draws[0][0] % scenes  # all of a batch show the same one
        return [p >= threshold for p in looks[scene % len(looks)](latents).tolist()]

    def shows(draws: Sequence[Draw], latents: Tensor) -> list[bool]:
        found = seen(draws, latents)
        return [True] * len(latents) if found is None else found

    def silent(draws: Sequence[Draw], latents: Tensor) -> list[bool]:
        found = seen(draws, latents)
        good = [True] * len(latents) if found is None else [not x for x in found]
        if alike is None:
            return good
        kept = alike(torch.stack([unsafe[number][0] for number, _ in draws]), latents).tolist()
        return [a and b for a, b in zip(good, kept, strict=True)]

    unsafe, unsafe_redraws = _redrawn(range(count), draw, shows, max_redraws if drawn else 0, scenes, at_once)

    def counterparts(draws: Sequence[Draw]) -> Tensor:
        # The first attempt has the noise that its unsafe member was drawn from.
        members = torch.stack([unsafe[number][0] for number, _ in draws])
        return edit(members, [(number, unsafe[number][1] + attempt) for number, attempt in draws])

    safe, safe_redraws = _redrawn(sorted(unsafe), counterparts, silent, max_redraws, scenes, at_once)
    done = sorted(safe)
    tally = Tally(
        count, len(done), tuple(n for n in range(count) if n not in unsafe), tuple(sorted(set(unsafe) - set(safe))),
        unsafe_redraws, safe_redraws, bool(looks), drawn, alike is not None,
    )  # fmt: skip
    if not done:
        happened = "; ".join(tally.report(max_redraws).splitlines())
        raise NoPairsError(
            f"judge: no pair passed. {happened}. Raise the strength or max_redraws, word the prompts more "
            "plainly, or try the judge on pictures of yours",
            tally,
        )
    return torch.stack([unsafe[n][0] for n in done]), torch.stack([safe[n][0] for n in done]), tally


def _redrawn(
    numbers: Sequence[int],
    make: Callable[[Sequence[Draw]], Tensor],
    accept: Callable[[Sequence[Draw], Tensor], list[bool]],
    max_redraws: int,
    scenes: int,
    at_once: int,
) -> tuple[dict[int, tuple[Tensor, int]], int]:
    """By number the first accepted latent and its attempt, and how many redraws were made."""
    done: dict[int, tuple[Tensor, int]] = {}
    pending, redraws = list(numbers), 0
    for attempt in range(max_redraws + 1):
        redraws += len(pending) if attempt else 0
        rejected = []
        for part in _batches(pending, scenes, at_once):
            draws = [(number, attempt) for number in part]
            latents = make(draws)
            for number, latent, good in zip(part, latents, accept(draws, latents), strict=True):
                if good:
                    done[number] = latent, attempt
                else:
                    rejected.append(number)
        pending = rejected
    return done, redraws


def _batches(numbers: Sequence[int], scenes: int, at_once: int) -> Iterator[Sequence[int]]:
    for scene in range(scenes):
        same = [n for n in numbers if n % scenes == scene]
        yield from (same[start : start + at_once] for start in range(0, len(same), at_once))


def sdedit(
    model: TrainableModel,
    latents: Tensor,
    noise: Tensor,
    cond: Cond,
    negative: Cond,
    *,
    strength: float,
    guidance: float,
    steps: int,
) -> Tensor:
    """SDEdit of clean latents [N, C, h, w]: ``strength`` of the way back to ``noise``, then denoised under ``cond``.

    Deterministic sampling with the last steps of a schedule of ``steps``; strength 0 gives the latents back, strength 1
    keeps of them only the last time's trace.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"strength must lie between 0 and 1, got {strength}")
    if strength == 0:
        return latents.clone()
    schedule = model.schedule
    first = schedule.time_at(1 - strength)
    stops = [first, *(t for t in schedule.trajectory(steps) if t is None or t < first)]
    z = schedule.add_noise(latents, noise, torch.full((len(latents),), first))
    return model.denoise(z, stops, cond, negative, guidance=guidance, weights=Weights.FROZEN)


def make_pairs(
    model: TrainableModel,
    unsafe: Cond,
    safe: Cond,
    null: Cond,
    *,
    count: int,
    scenes: Sequence[Scene],
    family: Family,
    strength: float = 0.75,
    strongest: float | None = None,
    guidance: float = 7.5,
    steps: int = 20,
    seed: int = 0,
    look: Looks = None,
    threshold: float = 0.5,
    alike: Callable[[Tensor, Tensor], Tensor] | None = None,
    max_redraws: int = 5,
    originals: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ConceptPairs:
    """Pairs by the frozen network of a trainable model, without any host.

    Args:
        unsafe, safe: conditionings of the m scenes, one row each; pair k takes row k % m.
        null: the empty prompt's.
        scenes: their prompts.
        family: what the pairs were made with.
        strength, guidance, steps: of the safe members; unsafe ones are drawn with the same guidance and steps.
        strongest: the redraws of a safe member climb from ``strength`` to this, evenly; None: they stay there.
        look, threshold: a judge behind a decoder; a latent shows the concept where it comes to the threshold.
        alike: as in :func:`pair_up`.
        originals: real pictures as clean, scaled latents [count, C, h, w], in place of drawn ones.
        progress: called as progress(draws done, draws expected) after each batch; may raise to cancel.

    Raises:
        ValueError: numbers out of range, or not as many conditionings as scenes.
        NoPairsError: nothing passed the judge.
    """
    m = len(scenes)
    if not len(unsafe) == len(safe) == m:
        raise ValueError(f"scenes: {len(unsafe)} unsafe and {len(safe)} safe conditionings for {m} scenes")
    if m > MAX_SCENES:
        raise ValueError(f"scenes: {m}, at most {MAX_SCENES} fit")
    if originals is not None:
        count = len(originals)
    if strongest is not None and not strength <= strongest <= 1:
        raise ValueError(f"strongest must lie between strength {strength} and 1, got {strongest}")
    if not 1 <= count <= MAX_PAIRS or not 0 <= max_redraws <= MAX_REDRAWS:
        raise ValueError(f"pairs: count must be 1 to {MAX_PAIRS} and max_redraws 0 to {MAX_REDRAWS}")
    stops = model.schedule.trajectory(steps)
    climb = (0.0 if strongest is None else strongest - strength) / max(1, max_redraws)
    draws, tries = 0, Counter[int]()

    def noise(keys: Sequence[Draw]) -> Tensor:
        return torch.cat([pair_noise(seed, key, model.latent_shape) for key in keys]).to(model.device, model.dtype)

    def count_draws(latents: Tensor) -> Tensor:
        nonlocal draws
        draws += len(latents)
        if progress:
            progress(draws, max(draws, count * (1 if originals is not None else 2)))
        return latents

    def draw(keys: Sequence[Draw]) -> Tensor:
        if originals is not None:
            return originals[[number for number, _ in keys]].to(model.device, model.dtype)
        scene = unsafe.row(keys[0][0] % m)  # all of a batch show the same one
        made = model.denoise(noise(keys), stops, scene, null, guidance=guidance, weights=Weights.FROZEN)
        return count_draws(made)

    def edit(latents: Tensor, keys: Sequence[Draw]) -> Tensor:
        # All of a batch are at the same redraw, and rounding must not take them beyond the last strength.
        rho = min(strength + climb * tries[keys[0][0]], max(strength, strongest or 0.0))
        tries.update(number for number, _ in keys)
        to, away = (c.row(keys[0][0] % m) for c in (safe, unsafe))
        made = sdedit(model, latents, noise(keys), to, away, strength=rho, guidance=guidance, steps=steps)
        return count_draws(made)

    bad, good, tally = pair_up(
        count, draw, edit, look, threshold=threshold, max_redraws=max_redraws, alike=alike, drawn=originals is None, scenes=m
    )  # fmt: skip
    reach = f"{strength}" if strongest is None else f"{strength} to {strongest}"
    note = f"{tally.report(max_redraws)}\nstrength {reach}, guidance {guidance}, {steps} steps, seed {seed}"
    shown = tuple(n % m for n in tally.numbers)
    return ConceptPairs(bad.float().cpu(), good.float().cpu(), tuple(scenes), family, note, shown, tally)
