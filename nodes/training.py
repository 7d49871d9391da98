"""What people see of a training while it runs: pictures, the loss curve, the time left; and what it will need."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import comfy.utils
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor

from ..erasure_core import ConceptSpec
from ..erasure_core.methods import MethodSpec
from ..erasure_core.methods.registry import Look
from ..erasure_core.operators.changes import FullWeights, Layers, LoRA
from ..erasure_core.operators.cond import Cond
from ..erasure_core.operators.trainable import TrainableModel
from .footprint import Demand
from .modes import host_mode
from .replica import Replica, make_room

_T = TypeVar("_T")
Decode = Callable[[Tensor], Tensor]
"""Clean, scaled latents [N, C, h, w] -> pictures [N, H, W, 3] in [0, 1] on the CPU."""

_STEPS, _GUIDANCE, _SEED = 8, 5.0, 1
_SHARE, _PAUSE, _FIRST = 0.1, 3.0, 2.0
"""Pictures take at most this share of the time, come no sooner than so many seconds after each other and the start."""
_WIDTH, _PICTURE, _CURVE, _LINE = 512, 256, 140, 20
_PAPER, _INK, _FAINT = (24, 24, 27), (228, 228, 231), (82, 82, 91)
_COLOURS = ((96, 165, 250), (251, 146, 60), (74, 222, 128), (232, 121, 249), (250, 204, 21))


def decoder(model, vae=None) -> Decode:
    """Through the VAE, or without one by the colours that ComfyUI's own latent previews use."""
    latent_format = model.model.latent_format

    def by_vae(latents: Tensor) -> Tensor:
        with host_mode():
            pictures = vae.decode(latent_format.process_out(latents))
        return pictures.reshape(-1, *pictures.shape[-3:])[..., :3].float().cpu().clamp(0, 1)

    def by_colour(latents: Tensor) -> Tensor:
        factors = torch.tensor(latent_format.latent_rgb_factors)
        bias = torch.tensor(latent_format.latent_rgb_factors_bias or [0.0] * 3)
        return ((latents.float().cpu().movedim(1, -1) @ factors + bias + 1) / 2).clamp(0, 1)

    return by_colour if vae is None else by_vae


def demand_of(settings: Any, method: MethodSpec, concepts: int) -> Demand:
    """What ``method`` holds with these settings. Random prompts that are held count too, embeddings that are searched side by
    side, and noised pictures with the original's predictions: four latents a view of each concept, two of what is kept."""
    layers, rank = getattr(settings, "layers", Layers.ALL), getattr(settings, "rank", 0)
    at_once = getattr(settings, "batch", 1) * (method.predictions + getattr(settings, "anchors", 0))
    return Demand(
        LoRA(layers, rank * (concepts if method.rank_each else 1)) if rank else FullWeights(layers),
        copies=int(getattr(settings, "average", None) is not None),
        pictures=max(at_once, getattr(settings, "population", 0)),
        keeps=partial(method.keeps, settings) if method.keeps else None,
        latents=getattr(settings, "views", 0) * (4 * concepts + 2),
        precise=method.precise,
    )


class Watcher:
    """Shows a training on its node: pictures that it draws itself at a fixed seed, the losses, the progress.

    ``opened``, ``progress``, ``drawing`` and ``watch`` are what a port and a method call. Raises through ``progress`` and
    ``drawing`` when the user cancels. Of the prompts the first ``turns`` take turns to be drawn.
    """

    captions = ("erased: ", "kept: ")
    """Before the first picture's prompt, and before the others'."""

    def __init__(self, prompts: Sequence[str], decode: Decode, *, turns: int = 1) -> None:
        self._prompts, self._decode, self._turns = list(prompts), decode, turns
        self._turn = -1
        self._bar = comfy.utils.ProgressBar(1)
        self._model: Replica | None = None
        self._conds: list[Cond] = []
        self._null: Cond | None = None
        self._pictures: list[Image.Image] = []
        self._fresh = False
        self._started = self._drawn = time.monotonic()
        self._begun: tuple[float, int] | None = None
        """When the steps began, and after how many: a training that is resumed doesn't begin at 0."""
        self._taken = ""
        self.spent, self._cost = 0.0, 0.0
        self.losses: dict[str, list[float]] = {}
        self.picture: Image.Image | None = None

    def encode(self, conditions: Callable[[Sequence[str]], list[Cond]]) -> None:
        """Read the prompts of the pictures."""
        *self._conds, self._null = conditions([*self._prompts, ""])

    def opened(self, model: TrainableModel) -> None:
        assert isinstance(model, Replica)
        self._model = model
        self._taken = f"training takes about {model.takes / 1e9:.1f} GB of {model.device.type} memory, by estimate"
        self._started = self._drawn = time.monotonic()
        self._begun = None
        self.spent = self._cost = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the training began."""
        return time.monotonic() - self._started

    def watch(self, _model: TrainableModel, _done: int, losses: Mapping[str, float]) -> None:
        for name, value in losses.items():
            self.losses.setdefault(name, []).append(value)
        self._fresh = True

    def drawing(self, done: int, total: int) -> None:
        """Pictures that a training begins with: its own steps come later."""
        self._begun = None
        picture = self._compose(f"drawing pictures to train on: {done} / {total}")
        self._bar.update_absolute(done, max(1, total), ("JPEG", picture, _WIDTH))

    def progress(self, done: int, total: int) -> None:
        if self._begun is None or done <= self._begun[1]:
            self._begun = time.monotonic(), done
        if self._due(done):
            self._draw()
        shown = None
        if self._fresh and (self._pictures or self.losses):
            self.picture = self._compose(self._status(done, total))
            shown, self._fresh = ("JPEG", self.picture, _WIDTH), False
        self._bar.update_absolute(done, max(1, total), shown)

    def _due(self, done: int) -> bool:
        if not done or self._model is None or self._model.closed or not self._conds:
            return False
        now, elapsed = time.monotonic(), self.elapsed
        if not self._pictures:
            return elapsed >= _FIRST
        return now - self._drawn >= _PAUSE and self.spent + self._cost <= _SHARE * elapsed

    def _draw(self) -> None:
        assert self._model is not None and self._null is not None
        began = time.monotonic()
        self._turn = (self._turn + 1) % self._turns
        latents = self._model.denoise_until(
            Cond.cat(self._in_turn(self._conds)), self._null, guidance=_GUIDANCE, progress=1.0, steps=_STEPS,
            generator=torch.Generator().manual_seed(_SEED),
        )  # fmt: skip
        pictures = (self._decode(latents) * 255).round().to(torch.uint8).numpy()
        make_room()
        self._pictures = [ImageOps.pad(Image.fromarray(p), (_PICTURE, _PICTURE), color=_PAPER) for p in pictures]
        self._drawn = time.monotonic()
        self._cost = self._drawn - began
        self.spent += self._cost
        self._fresh = True

    def _in_turn(self, of: Sequence[_T]) -> list[_T]:
        """What belongs to the prompts that are drawn last."""
        return [of[self._turn], *of[self._turns :]]

    def _compose(self, status: str) -> Image.Image:
        """Captions and pictures above, the curves and the status below."""
        top = _PICTURE + _LINE if self._pictures else 0
        canvas = Image.new("RGB", (_WIDTH, top + _CURVE + _LINE), _PAPER)
        draw = ImageDraw.Draw(canvas)
        for i, (picture, prompt) in enumerate(zip(self._pictures, self._in_turn(self._prompts), strict=False)):
            canvas.paste(picture, (i * _PICTURE, _LINE))
            _write(draw, (i * _PICTURE + 6, 3), self.captions[min(i, 1)] + prompt, _INK)
        self._curves(draw, top)
        _write(draw, (6, top + _CURVE + 3), status, _INK, most=68)
        return canvas

    def _status(self, done: int, total: int) -> str:
        assert self._begun is not None
        began, first = self._begun
        if done <= first:
            return f"{done} / {total}"
        return f"{done} / {total}, {clock((time.monotonic() - began) * (total - done) / (done - first))} left"

    def _curves(self, draw: ImageDraw.ImageDraw, top: int) -> None:
        """Magnitudes on one logarithmic axis; each curve over the whole width."""
        curves = {n: [math.log10(max(abs(v), 1e-12)) for v in x if math.isfinite(v)] for n, x in self.losses.items()}
        curves = {n: x for n, x in curves.items() if x and max(x) > -12}
        if not curves:
            return
        low, high = min(min(x) for x in curves.values()), max(max(x) for x in curves.values())
        low, high = max(low, high - 6) - 0.1, high + 0.1
        bottom, height = top + _CURVE - 6, _CURVE - _LINE - 12

        def y(value: float) -> float:
            return bottom - height * (max(value, low) - low) / (high - low)

        for power in range(math.ceil(low), math.floor(high) + 1):
            draw.line([(0, y(power)), (_WIDTH, y(power))], _FAINT)
            _write(draw, (_WIDTH - 44, int(y(power)) - 14), f"1e{power}", _FAINT)
        x = 6
        for (name, values), colour in zip(curves.items(), _COLOURS * len(curves), strict=False):
            step = _WIDTH / max(1, len(values) - 1)
            points = [(i * step, y(v)) for i, v in enumerate(values)] * (2 if len(values) == 1 else 1)
            draw.line(points, colour, 2)
            label = name.rpartition("/")[2]
            _write(draw, (x, top + 3), label, colour)
            x += 9 * len(label) + 12

    def report(self) -> str:
        """How it went, and what it took."""
        ends = ", ".join(f"{n.rpartition('/')[2]} {x[0]:.2g} -> {x[-1]:.2g}" for n, x in self.losses.items())
        trained = f"trained in {clock(self.elapsed)}" + (f"; losses: {ends}" if ends else "")
        return f"{trained}\n{self._taken}" if self._taken else trained


def clock(seconds: float) -> str:
    """1:05 or 2:00:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def making_room(look: Look) -> Look:
    """``look``, after which ComfyUI takes off again what it has loaded for it: a VAE, a judge."""

    def then_make_room(latents: Tensor) -> Tensor:
        seen = look(latents)
        make_room()
        return seen

    return then_make_room


def _write(
    draw: ImageDraw.ImageDraw, place: tuple[int, int], text: str, colour: tuple[int, int, int], most: int = 34
) -> None:
    try:
        font: Any = ImageFont.load_default(13)
    except TypeError:  # Pillow before 10.1 has one size only
        font = ImageFont.load_default()
    plain = text[:most].encode("latin-1", "replace").decode("latin-1")  # the built-in font knows no other letters
    draw.text(place, plain, fill=colour, font=font)


def watcher_of(spec: ConceptSpec, decode: Decode) -> Watcher:
    """Shows the erased concept, each of several in turn, and a kept word, where there is one."""
    return Watcher([*(c.name for c in spec.erase), *spec.keep[:1]], decode, turns=len(spec.erase))
