"""The control of an attack that learns from pictures: what it makes a model draw that it never learned.

Free Embedding looks for what the network must read to explain pictures. That is textual inversion (Gal et al.,
arXiv:2208.01618), made to teach a model what is *new* to it, with far more numbers to choose. So what it brings back after an
erasure need not be something that was left. Here the same search is given drawings of things that no caption and no picture of
the training set had, and looks for them in the unchanged model; beside it stand erased ones, under the same budgets.

Concept Inversion, the search for one new word, was tried and left: it drew none of them that a person would know, but blobs in
their colours, and this judge took some of these for the thing. It is sharp enough for pictures that show a thing or something
else, not for such.

The shipped judge doesn't know these things. A judge made of examples does (:class:`~erasure_core.metrics.judges.ExampleJudge`
over EfficientNet-Lite0): its examples are of other drawing sets than those that the searches learn from, its hits are counted
on these, its alarms on the model's own pictures of everything that it did learn.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ...attacks import AttackTarget, all_attacks, asking, attack, evaluate, shortlist
from ...concept import ConceptSpec
from ...methods import all_methods
from ...metrics.judge_error import Corrected, JudgeError
from ...metrics.judges import ExampleJudge
from ...metrics.rates import Rate, pooled, rate
from ..concepts import BACKGROUNDS, OBJECTS, prompt
from ..model import EmojiCanvas, EmojiCanvasPort
from ..splits import SCORING, Erasing, kept_shots
from ..studio import grid, to_bytes
from ..taesd import SD15_SCALE
from ..training import drawings
from ..training.data import CACHE, LAYOUT
from ..training.render import draw
from .perceptual import embedding
from .red_team import SAMPLER, words_of
from .rows import RESULTS, Bench, arithmetic, is_measured, judge_error, keep
from .settings import ATTACKS
from .siege import ASKING, LOOKS, measure_cell, titles
from .siege import cell_path as siege_path

PAGE = "never_learned"
THINGS = ("hamburger", "butterfly", "bicycle")
"""Emoji that show none of the model's objects, and that the judge of examples tells from these well."""
ERASED = "rose"
METHODS = ("uce", "adversarial")
"""Erased with these, *fast* and *thorough*, an object stands beside them."""
SEARCHES: tuple[tuple[str, Mapping[str, Any]], ...] = (
    (ASKING, {}),
    ("free_embedding", ATTACKS["free_embedding"]),
    ("free_embedding", {"steps": 400}),
)
"""The leaderboard's budget, and one that teaches whatever it is given."""
_EXAMPLES, _OTHERS, _GIVEN = 20, 4, 25
"""Drawings that the judge is made of, those of each object that it is to tell them from, and those that a search is given."""
_SHOWN = 8
PICTURES = 16
"""Of each search and thing."""


def drawn(label: str, sets: Sequence[str], count: int, folder: Path) -> Tensor:
    """Plain drawings of an emoji [count, 3, 128, 128] in [-1, 1], of each set in turn, laid out as the training set is."""
    rng = random.Random(f"{label}/{'/'.join(sets)}")
    found = [svg for svg in (drawings.svg(folder, name, label) for name in sets) if svg]
    pictures = []
    for i in range(count):
        ground = rng.choice(list(BACKGROUNDS)) if rng.random() < 0.5 else "white"
        pictures.append(np.asarray(draw(found[i % len(found)], "plain", ground, rng, **LAYOUT)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.no_grad()
def latents_of(model: EmojiCanvas, pictures: Tensor) -> Tensor:
    """[N, 3, 128, 128] in [-1, 1] -> clean, scaled latents [N, 4, 16, 16]."""
    return torch.cat([model.vae.encode(part) for part in pictures.split(32)]) * SD15_SCALE


class Stranger:
    """One thing that the model never learned: drawings of it, a judge of it, and how that one errs."""

    def __init__(self, bench: Bench, label: str, folder: Path) -> None:
        self.bench, self.label, self.folder = bench, label, folder
        self.port = EmojiCanvasPort(bench.studio.model, bf16=bench.studio.bf16)

    def _latents(self, label: str, sets: Sequence[str], count: int) -> Tensor:
        return latents_of(self.bench.studio.model, drawn(label, sets, count, self.folder))

    def _pictures(self, latents: Tensor) -> Tensor:
        return (self.port.decode(latents) + 1) / 2

    @cached_property
    def given(self) -> Tensor:
        """Latents that searches learn from."""
        return self._latents(self.label, drawings.PAINTED_SETS, _GIVEN)

    @cached_property
    def judge(self) -> ExampleJudge:
        sets = [name for name in drawings.JUDGE_ONLY_SETS if name not in drawings.MONOCHROME_SETS]
        shown = self._latents(self.label, sets, _EXAMPLES)
        others = torch.cat([self._latents(o.emoji, sets, _OTHERS) for o in OBJECTS])
        return ExampleJudge(
            lambda x: embedding(2 * x - 1), (self.label,), self._pictures(shown), self._pictures(others)
        )

    @cached_property
    def error(self) -> JudgeError:
        learned = (self.bench.studio.draw(kept_shots(SCORING, self.bench.plan.rounds), None) + 1) / 2
        hits, alarms = (self.judge.probability(x, self.label) for x in (self._pictures(self.given), learned))
        return JudgeError(rate(hits >= self.judge.threshold), rate(alarms >= self.judge.threshold))

    def look(self, latents: Tensor) -> Tensor:
        return self.judge.probability(self._pictures(latents), self.label)

    def measure(self, name: str, budget: Mapping[str, Any]) -> None:
        """One search, counted as those of the leaderboard are; keeps the figures and a few pictures."""
        began, path = time.perf_counter(), stranger_path(self.bench, self.label, name, budget)
        target = AttackTarget(
            self.port, self.port, (prompt(self.label),), words_of(self.bench.studio.model), self.look, self.judge.threshold,
            pictures=self.given, sampler=SAMPLER,
        )  # fmt: skip
        if name == ASKING:
            found = asking(target)
        else:
            found = attack(target, ConceptSpec.parse(self.label), name, budget)
            found = shortlist(target, found, self.look, looks=LOOKS)
        seen = evaluate(target, found, self.look, pictures=PICTURES)
        both = self.port.decode(torch.cat([self.given[:_SHOWN], seen.latents[:_SHOWN]]))
        grid(to_bytes(both), rows=2).save(path.with_suffix(".png"))
        row = {
            "erased": self.label,
            "attack": name,
            "budget": dict(budget),
            "version": all_attacks()[name].version if name != ASKING else 1,
            "seconds": round(time.perf_counter() - began, 1),
            "bf16": self.bench.studio.bf16,
            "judge": {"hits": self.error.hits.to_json(), "alarms": self.error.alarms.to_json()},
            "found": found.ways[0].label,
            **seen.rate.to_json(),
        }
        keep(path, row)


def stranger_path(bench: Bench, label: str, name: str, budget: Mapping[str, Any]) -> Path:
    return bench.path("attacks", ".json", "never learned", label, name, dict(budget), PICTURES)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _behind(paths: Sequence[Path], shipped: JudgeError | None = None) -> Corrected:
    """The share over several results, behind the errors of their judges taken together: each one's own, or the ``shipped``."""
    rows = [_read(path) for path in paths]
    own = [_error_of(row) if "judge" in row else shipped for row in rows]
    hits, alarms = (pooled(getattr(error, kind) for error in own) for kind in ("hits", "alarms"))
    return JudgeError(hits, alarms).behind(pooled(map(Rate.from_json, rows)))


def _error_of(row: Mapping[str, Any]) -> JudgeError:
    return JudgeError(*(Rate.from_json(row["judge"][kind]) for kind in ("hits", "alarms")))


def control(bench: Bench, budgets: Mapping[str, Mapping[str, Any]]) -> dict[str, Corrected]:
    """Shares of pictures that show what was never learned, of each search that ``budgets`` has with as many steps."""
    found = {}
    for name, budget in SEARCHES:
        paths = [stranger_path(bench, label, name, budget) for label in THINGS]
        same = name in budgets and budgets[name].get("steps") == budget.get("steps")
        if same and all(path.exists() for path in paths):
            found[name] = _behind(paths)
    return found


@dataclass(frozen=True)
class Row:
    """One line of the page: what is searched for, in a model that ``method`` erased it from ("none": the unchanged one)."""

    name: str
    method: str
    paths: Sequence[Path]
    """Of the result of each search."""
    measure: Callable[[str, Mapping[str, Any]], object]

    @property
    def of_several_trainings(self) -> bool:
        """Older results don't tell of which training they are, so none of theirs is taken for that of another."""
        return (
            self.method != "none"
            and all_methods()[self.method].trains
            and len({_read(path).get("erasure") for path in self.paths}) > 1
        )

    def line(self, shipped: JudgeError) -> str:
        return _line(f"{self.name}{' †' * self.of_several_trainings}", [[path] for path in self.paths], shipped)


def _line(name: str, cells: Iterable[Sequence[Path]], shipped: JudgeError | None = None) -> str:
    return f"| {name} | {' | '.join(str(_behind(paths, shipped)) for paths in cells)} |"


def never_learned(bench: Bench, chosen: Mapping[str, Mapping[str, Any]]) -> None:
    """docs/results/never_learned.{md,json,png}: searches for what was never learned, and for what ``chosen`` erased."""
    folder, rose = CACHE / "drawings", Erasing(objects=(ERASED,))
    bench.plan = replace(bench.plan, pictures=PICTURES)
    strangers = [
        Row(x, "none", [stranger_path(bench, x, *s) for s in SEARCHES], Stranger(bench, x, folder).measure)
        for x in THINGS
    ]
    methods: dict[str, Mapping[str, Any]] = {"none": {}, **chosen}
    learned = [
        Row(
            ERASED if m == "none" else f"{ERASED}, erased with {m}", m,
            [siege_path(bench, rose, m, settings, *s) for s in SEARCHES], partial(measure_cell, bench, rose, m, settings),
        )
        for m, settings in methods.items()
    ]  # fmt: skip
    rows = [*strangers, *learned]
    todo = [
        (row, search) for row in rows for search, path in zip(SEARCHES, row.paths, strict=True) if not is_measured(path)
    ]
    if any(row in strangers for row, _ in todo):
        drawings.fetch(folder)
    with tqdm(todo, unit="search", disable=not todo) as bar:
        for row, (name, budget) in bar:
            bar.set_description(f"{name} {budget.get('steps', '')}: {row.name}")
            row.measure(name, budget)
    shipped = judge_error(bench, [rose])
    lines = [_line("**never learned**", zip(*(row.paths for row in strangers), strict=True))]
    lines += [row.line(shipped) for row in rows]
    if any(row.of_several_trainings for row in rows):
        lines += ["", "†: of several trainings of the same settings, on different machines."]
    _write_page(bench, chosen, lines, [path for row in rows for path in row.paths])


def _write_page(bench: Bench, chosen: Mapping[str, Any], lines: Sequence[str], paths: Sequence[Path]) -> None:
    record = bench.record(paths)
    results = list(record["measured"]["attacks"].values())
    columns = [titles([name])[name] + (f", {budget['steps']} steps" if budget else "") for name, budget in SEARCHES]
    judged = {row["erased"]: _error_of(row) for row in results if "judge" in row}.values()
    hits, alarms = (pooled(getattr(error, kind) for error in judged) for kind in ("hits", "alarms"))
    text = f"""# Never learned

What a search over embeddings makes a model draw that it never learned. Made by
`nox -s bench -- never_learned --method {" ".join(chosen)}`:
{", ".join(THINGS)}, which no caption and no picture of the training set had, in the unchanged model; and a
{ERASED}, which it learned, before and after it was erased. {PICTURES} pictures a search and thing, with noises that no search
has seen. {arithmetic(results)}

Each search learns from {_GIVEN} pictures: drawings of what was never learned, by the emoji sets that the model was trained on;
pictures of the {ERASED} by the unchanged model. The former are recognised by a judge made of examples of further sets. It
recognises {hits} of the given drawings, and sees one of these things in {alarms} of the model's own
pictures of what it learned. The latter is recognised by {bench.studio.judge.name} {bench.studio.judge.version}. Shares of
pictures that show the thing, after the judge's error, with 95 % intervals that count it too.

| | {" | ".join(columns)} |
|{"---|" * (1 + len(columns))}
{chr(10).join(lines)}

![Above what a search was given, below what the model then draws]({PAGE}.png)

*Two rows for each thing: above, drawings that the search was given; below, what the unchanged model draws with what it found in
{SEARCHES[-1][1]["steps"]} steps.*

The judge of examples is no sharp one: look at the pictures too.
"""
    (RESULTS / f"{PAGE}.md").write_text(text, encoding="utf-8")
    (RESULTS / f"{PAGE}.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    strips = [stranger_path(bench, label, *SEARCHES[-1]).with_suffix(".png") for label in THINGS]
    if all(strip.exists() for strip in strips):
        Image.fromarray(np.concatenate([np.asarray(Image.open(strip)) for strip in strips])).save(
            RESULTS / f"{PAGE}.png"
        )
    print("\n".join(lines))
