"""Make SDEdit Pair."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import comfy.model_management as mm
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..erasure_core import ConceptPairs
from ..erasure_core.metrics.judged import JudgedBy
from ..erasure_core.metrics.judges import look_through
from ..erasure_core.pairs import MAX_PAIRS, MAX_REDRAWS, MAX_SCENES, Draw, pair_noise, pair_up
from .methods import seed_widget
from .modes import host_mode, ordinary_tensors
from .patching import check_ungated
from .port import family_of
from .replica import native_side
from .sampling import encode
from .training import decoder
from .types import CATEGORY, Judge, Pairs

_SAMPLER, _SCHEDULER = "euler", "normal"
_AT_ONCE = 4
_SHOWN = 32


class _Artist:
    """Draws both members with ComfyUI's own sampling; one bar over all draws, which also stops here on cancel."""

    def __init__(
        self,
        model,
        clip,
        vae,
        *,
        scenes: Sequence[tuple[str, str]],
        size: tuple[int, int],
        strength,
        steps,
        cfg,
        seed,
        draws,
    ):
        self._model, self._vae, self._cfg, self._seed = model, vae, cfg, seed
        encoded = {text: encode(clip, text) for text in dict.fromkeys(["", *(x for scene in scenes for x in scene)])}
        self._scenes, self._null = [(encoded[unsafe], encoded[safe]) for unsafe, safe in scenes], encoded[""]
        self._format = model.get_model_object("latent_format")
        channels, dimensions = self._format.latent_channels, getattr(self._format, "latent_dimensions", 2)
        if dimensions != 2:
            raise ValueError("model: it draws films, of which no pairs can be made. Use a model that draws pictures")
        width, height = size
        self._shape = (channels, height // 8, width // 8)
        sampling = model.get_model_object("model_sampling")
        self._sigmas = comfy.samplers.calculate_sigmas(sampling, _SCHEDULER, steps)
        self._kept = min(steps, max(1, int(strength * steps + 1e-6))) if strength > 0 else 0
        self._previewer = latent_preview.get_previewer(model.load_device, self._format)
        self._done, self._total = 0, max(1, draws[0] * steps + draws[1] * self._kept)
        self._bar = comfy.utils.ProgressBar(self._total)

    def copy(self, pictures: Tensor) -> Callable[[Sequence[Draw]], Tensor]:
        """What gives real pictures, IMAGE [N, H, W, 3], as unsafe members."""
        latents = []
        for picture in pictures.split(1):
            mm.throw_exception_if_processing_interrupted()
            with host_mode():
                encoded = self._vae.encode(picture)
            latents.append(self._format.process_in(encoded.clone().float().cpu()))
        return lambda draws: torch.cat([latents[number] for number, _ in draws])

    def draw(self, draws: Sequence[Draw]) -> Tensor:
        """Unsafe members, from noise."""
        noise, (unsafe, _) = self._noise(draws), self._scene(draws)
        return self._sample(noise, torch.zeros_like(noise), self._sigmas, unsafe, self._null)

    def edit(self, latents: Tensor, draws: Sequence[Draw]) -> Tensor:
        """Safe members: the last steps of the same schedule, from the noised latents."""
        if not self._kept:
            return latents.clone()
        start, (unsafe, safe) = self._format.process_out(latents), self._scene(draws)
        return self._sample(self._noise(draws), start, self._sigmas[-(self._kept + 1) :], safe, unsafe)

    def _scene(self, draws: Sequence[Draw]):
        """Both prompts; ``pair_up`` draws one scene at a time."""
        return self._scenes[draws[0][0] % len(self._scenes)]

    def _noise(self, draws: Sequence[Draw]) -> Tensor:
        return torch.cat([pair_noise(self._seed, draw, self._shape) for draw in draws])

    def _sample(self, noise: Tensor, start: Tensor, sigmas: Tensor, positive, negative) -> Tensor:
        # Redraws come on top of what the bar expected.
        done, amount = self._done, len(noise) * (len(sigmas) - 1)
        self._total = max(self._total, done + amount)

        def callback(step: int, x0: Tensor, _x: Tensor, _steps: int) -> None:
            preview = self._previewer.decode_latent_to_preview_image("JPEG", x0) if self._previewer else None
            self._bar.update_absolute(done + (step + 1) * len(noise), self._total, preview)

        with host_mode():
            samples = comfy.sample.sample(
                self._model, noise, len(sigmas) - 1, self._cfg, _SAMPLER, _SCHEDULER, positive, negative, start,
                sigmas=sigmas, callback=callback, disable_pbar=True, seed=self._seed,
            )  # fmt: skip
        self._done += amount
        return self._format.process_in(samples.clone().float().cpu())


class MakeSDEditPair(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureMakeSDEditPair",
            display_name="Make SDEdit Pair",
            category=CATEGORY,
            description="Makes pairs of pictures that differ in one thing only: one shows what should go, the other is the "
            "same picture redrawn without it. The method DUO learns from them what words don't name.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model that the concept will be erased from."),
                io.Clip.Input("clip", tooltip="The CLIP that belongs to the model."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to the model."),
                io.String.Input(
                    "unsafe_prompt",
                    multiline=True,
                    default="",
                    placeholder="a man smoking a cigarette, photo",
                    tooltip="Draws the picture with the concept; also the negative prompt of its counterpart. Several lines "
                    "are several scenes, and pairs show them in turn.",
                ),
                io.String.Input(
                    "safe_prompt",
                    multiline=True,
                    default="",
                    placeholder="a man, photo",
                    tooltip="The same scene without the concept: a line for each of unsafe_prompt, or one for all. Several "
                    "lines for one unsafe prompt: it gives way to each of them in turn.",
                ),
                io.Float.Input(
                    "strength",
                    default=0.75,
                    min=0.0,
                    max=1.0,
                    step=0.01,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How much is drawn anew. More takes the concept away more surely, and changes more of the rest.",
                ),
                io.Int.Input(
                    "count",
                    default=8,
                    min=1,
                    max=MAX_PAIRS,
                    tooltip="Pairs to make, of all scenes together; fewer leave scenes out. DUO's authors use 32 to 64 for one "
                    "concept.",
                ),
                seed_widget("The same seed gives the same pairs."),
                io.Int.Input("steps", default=20, min=1, max=1000, tooltip="Sampler steps of a whole picture."),
                io.Float.Input(
                    "cfg",
                    default=7.5,
                    min=0.0,
                    max=30.0,
                    step=0.5,
                    tooltip="How closely the pictures follow their prompts.",
                ),
                io.Int.Input(
                    "width", default=0, min=0, max=4096, step=8, tooltip="In pixels; 0: what the model was made for."
                ),
                io.Int.Input(
                    "height", default=0, min=0, max=4096, step=8, tooltip="In pixels; 0: what the model was made for."
                ),
                io.Int.Input(
                    "max_redraws",
                    default=5,
                    min=0,
                    max=MAX_REDRAWS,
                    tooltip="With a judge: how often each picture is drawn again where it shows the wrong thing. A pair that "
                    "is still wrong then is left out.",
                ),
                io.Image.Input(
                    "images",
                    optional=True,
                    tooltip="Real pictures with the concept, in place of drawn ones; count is theirs then.",
                ),
                Judge.Input("judge", optional=True, tooltip="Looks at both pictures of each pair."),
                io.String.Input(
                    "concept",
                    multiline=True,
                    default="",
                    optional=True,
                    tooltip="What the judge looks for, in a word that it knows: one line for all scenes, or a line each where "
                    "they show several concepts. Needed where a judge is connected.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="unsafe", tooltip="The pictures with the concept."),
                io.Image.Output(display_name="safe", tooltip="Their counterparts, in the same order."),
                Pairs.Output(display_name="pairs", tooltip="For Erase Concept (method DUO) and Save Concept Pairs."),
                io.String.Output(display_name="report", tooltip="How many pairs, how many redraws, what was left out."),
            ],
        )

    @classmethod
    def validate_inputs(cls, unsafe_prompt, safe_prompt, count, strength):
        try:
            if unsafe_prompt is not None and safe_prompt is not None:  # linked: known only when the graph runs
                scenes_of(unsafe_prompt, safe_prompt)
            check_numbers(count, strength)
        except ValueError as error:
            return str(error)
        return True

    @classmethod
    def execute(
        cls, model, clip, vae, unsafe_prompt, safe_prompt, strength, count, seed, steps, cfg, width, height, max_redraws,
        images=None, judge=None, concept="",
    ) -> io.NodeOutput:  # fmt: skip
        scenes = scenes_of(unsafe_prompt, safe_prompt)
        check_numbers(count, strength)
        words = [] if judge is None else words_of(concept, len(scenes))
        count = count if images is None else len(images)
        check_numbers(count, strength)
        check_ungated(model=model)
        side = native_side(model, family_of(model).name)
        size = (width // 8 * 8 or side, height // 8 * 8 or side)
        decode = decoder(model, vae)
        look = None
        if judge is not None:
            look = [look_through(judge, lambda z: decode(z).movedim(-1, 1), word) for word in words]
        artist = _Artist(
            model, clip, vae, scenes=scenes, size=size, strength=strength, steps=steps, cfg=cfg, seed=seed,
            draws=(count if images is None else 0, count),
        )  # fmt: skip
        bad, good, tally = pair_up(
            count, artist.draw if images is None else artist.copy(fitted(images, size)), artist.edit, look,
            threshold=0.5 if judge is None else judge.threshold, max_redraws=max_redraws, drawn=images is None,
            scenes=len(scenes), at_once=_AT_ONCE,
        )  # fmt: skip
        judged = f", judged by {JudgedBy.of(judge)}" if judge is not None else ""
        note = f"{tally.report(max_redraws)}\nstrength {strength:g}, cfg {cfg:g}, {steps} steps, seed {seed}{judged}"
        with ordinary_tensors():
            shown = tuple(n % len(scenes) for n in tally.numbers)
            pairs = ConceptPairs(bad.clone(), good.clone(), tuple(scenes), family_of(model), note, shown)
        unsafe, safe = (torch.cat([decode(part) for part in z.split(_AT_ONCE)]) for z in (bad, good))
        preview = ui.PreviewImage(torch.cat([unsafe, safe], dim=2)[:_SHOWN], cls=cls).as_dict()
        preview |= ui.PreviewText(pairs.summary()).as_dict()
        return io.NodeOutput(unsafe, safe, pairs, pairs.summary(), ui=preview)


def scenes_of(unsafe: str, safe: str) -> list[tuple[str, str]]:
    """(unsafe prompt, safe prompt) of each scene, read from two boxes with a line each, or one line for all.

    Raises:
        ValueError: nothing to show, no difference, too long, or lines that don't match up.
    """
    for what, text in (("unsafe_prompt", unsafe), ("safe_prompt", safe)):
        if len(text) > 2000:
            raise ValueError(f"{what}: {len(text)} characters, at most 2000 fit")
    bad, good = ([line.strip() for line in text.splitlines() if line.strip()] for text in (unsafe, safe))
    good = good or [""]
    if not bad:
        raise ValueError("unsafe_prompt: describe a picture that shows the concept")
    n = max(len(bad), len(good))
    if n > MAX_SCENES:
        raise ValueError(f"{'unsafe' if n == len(bad) else 'safe'}_prompt: {n} lines, at most {MAX_SCENES} scenes fit")
    bad, good = (lines * n if len(lines) == 1 else lines for lines in (bad, good))
    if len(bad) != len(good):
        raise ValueError(
            f"safe_prompt: {len(good)} lines for {len(bad)} of unsafe_prompt. Write one for each of them, or one for all"
        )
    for one, other in zip(bad, good, strict=True):
        if " ".join(one.casefold().split()) == " ".join(other.casefold().split()):
            raise ValueError(
                f"safe_prompt: {other!r} is the same as unsafe_prompt. Describe the scene without the concept"
            )
    return list(zip(bad, good, strict=True))


def words_of(concept: str, scenes: int) -> list[str]:
    """What the judge looks for in each scene.

    Raises:
        ValueError: nothing, or neither one line nor as many as there are scenes.
    """
    words = [line.strip() for line in concept.splitlines() if line.strip()]
    if not words:
        raise ValueError("concept: write what the judge should look for")
    if len(words) not in (1, scenes):
        raise ValueError(f"concept: {len(words)} lines for {scenes} scenes. Write one for all of them, or one for each")
    return words * scenes if len(words) == 1 else words


def check_numbers(count: int | None, strength: float | None) -> None:
    """Raise where a number is out of its range; None is linked and looked at later."""
    if count is not None and not 1 <= count <= MAX_PAIRS:
        raise ValueError(f"count: {count} pairs; 1 to {MAX_PAIRS} can be made at once")
    if strength is not None and not 0 <= strength <= 1:
        raise ValueError(f"strength: {strength} must lie between 0 and 1")


def fitted(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Pictures [N, H, W, 3] scaled and cut about the middle to (width, height)."""
    scaled = comfy.utils.common_upscale(images[..., :3].movedim(-1, 1).clone(), *size, "lanczos", "center")
    return scaled.movedim(1, -1).contiguous()
