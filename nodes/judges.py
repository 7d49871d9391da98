"""Judges for other models than the demo: CLIP with words, CLIP vision with example pictures; and asking a judge."""

from __future__ import annotations

import comfy.model_management as mm
import torch
from comfy_api.latest import io, ui
from torch import Tensor

from ..erasure_core.metrics.judged import JudgedBy
from ..erasure_core.metrics.judges import CONTRASTS, ExampleJudge, ZeroShotJudge, agreement
from ..erasure_core.metrics.rates import Rate
from .modes import host_mode, ordinary_tensors
from .types import CATEGORY, Judge

_AT_ONCE = 16
_AGREE = 0.5
"""Towers of different models come to about 1/8."""


class _Towers:
    """CLIP_VISION and CLIP as functions of pictures and texts, ordinary float32 tensors on the CPU."""

    def __init__(self, vision, clip=None) -> None:
        self._vision, self._clip = vision, clip

    def pictures(self, pictures: Tensor) -> Tensor:
        out = []
        for part in pictures.movedim(1, -1).split(_AT_ONCE):
            mm.throw_exception_if_processing_interrupted()
            with host_mode():
                features = self._vision.encode_image(part)["image_embeds"]
            if not torch.is_tensor(features) or features.ndim != 2:
                raise ValueError(
                    "clip_vision: this image encoder gives no single feature for a picture. Use a CLIP one, for example "
                    "CLIP-ViT-H-14"
                )
            out.append(features.clone().float().cpu())
        return torch.cat(out)

    def texts(self, texts) -> Tensor:
        model = self._clip.cond_stage_model
        with host_mode():
            self._clip.load_model()
        out = []
        try:
            # Of CLIP-L alone, ComfyUI hands out the unprojected feature unless asked; a picture has nothing to do with that.
            model.reset_clip_options()
            model.set_clip_options({"projected_pooled": True})
            for text in texts:
                mm.throw_exception_if_processing_interrupted()
                with host_mode():
                    _, pooled, *_ = model.encode_token_weights(self._clip.tokenize(text))
                if pooled is None:
                    raise ValueError(
                        "clip: this text encoder gives no feature for a whole text, so it can't judge pictures"
                    )
                out.append(pooled.clone().float().cpu())
        finally:
            model.reset_clip_options()
        return torch.cat(out)


class JudgeCLIP(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureJudgeCLIP",
            display_name="CLIP Judge",
            category=f"{CATEGORY}/judges",
            description="Says how likely a picture shows something, by words alone: CLIP compares it with texts. Needs the "
            "picture and the text half of one CLIP model; SD 1.x checkpoints lack a part of the latter, SD 2.x and SDXL have "
            "it. Where you have no such pair, use Example Judge.",
            inputs=[
                io.ClipVision.Input(
                    "clip_vision",
                    tooltip="CLIP ViT-H for the CLIP of SD 2.x, ViT-bigG for that of SDXL, ViT-L for CLIP-L.",
                ),
                io.Clip.Input(
                    "clip",
                    tooltip="The text half of the same CLIP model. It need not be the CLIP of the model that you erase on.",
                ),
                io.String.Input(
                    "contrasts",
                    multiline=True,
                    default="\n".join(CONTRASTS),
                    tooltip="What a picture may show instead, one a line. The closer to the concept, the stricter the judge: "
                    "add what you replace it with.",
                ),
                threshold_widget(),
            ],
            outputs=[Judge.Output(display_name="judge", tooltip="For every node that has a judge input.")],
        )

    @classmethod
    def execute(cls, clip_vision, clip, contrasts, threshold) -> io.NodeOutput:
        towers = _Towers(clip_vision, clip)
        with ordinary_tensors():
            seen, read = towers.pictures(torch.zeros(1, 3, 64, 64)).shape[1], towers.texts(["a picture"]).shape[1]
            if seen != read:
                raise ValueError(
                    f"clip_vision: its features have {seen} numbers, those of this clip {read}, so they are halves of "
                    "different models. CLIP-L has 768, ViT-H (SD 2.x) 1024, ViT-bigG (SDXL) 1280. Or use Example Judge"
                )
            if not agreement(towers.pictures, towers.texts) >= _AGREE:
                raise ValueError(
                    "clip: shown eight plain colours, this text encoder and this clip_vision don't agree which is which, so "
                    "they don't belong together. The CLIP of SD 1.x checkpoints has no text projection and never does: load a "
                    "whole CLIP-L text encoder, or use Example Judge"
                )
            judge = ZeroShotJudge(
                towers.pictures,
                towers.texts,
                [line.strip() for line in contrasts.splitlines() if line.strip()],
                threshold=threshold,
            )
        return io.NodeOutput(judge)


class JudgeExamples(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureJudgeExamples",
            display_name="Example Judge",
            category=f"{CATEGORY}/judges",
            description="Says how likely a picture shows something, by examples: pictures with it and pictures without it. "
            "Works with any CLIP vision model, also where no words fit. A dozen of each is plenty.",
            inputs=[
                io.ClipVision.Input("clip_vision", tooltip="What looks at the pictures, for example CLIP-ViT-H-14."),
                io.String.Input(
                    "concept",
                    default="cigarette",
                    tooltip="What the examples show; other words for it behind commas. The judge knows these words only.",
                ),
                io.Image.Input(
                    "examples", tooltip="Pictures that show it, two at least. Several models' work, if you can."
                ),
                io.Image.Input(
                    "others", tooltip="Pictures that are like them in all else but don't show it, two at least."
                ),
                threshold_widget(),
            ],
            outputs=[Judge.Output(display_name="judge", tooltip="For every node that has a judge input.")],
        )

    @classmethod
    def execute(cls, clip_vision, concept, examples, others, threshold) -> io.NodeOutput:
        with ordinary_tensors():
            judge = ExampleJudge(
                _Towers(clip_vision).pictures,
                concept.split(","),
                _channels_first(examples),
                _channels_first(others),
                threshold=threshold,
            )
        return io.NodeOutput(judge)


class JudgePictures(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureJudgePictures",
            display_name="Judge Pictures",
            category=f"{CATEGORY}/judges",
            description="Asks a judge about pictures. Try a new judge on pictures that you know before you trust its figures.",
            is_output_node=True,
            inputs=[
                Judge.Input("judge", tooltip="From Load EmojiCanvas Demo, CLIP Judge, Example Judge or ONNX Judge."),
                io.Image.Input("images", tooltip="Pictures of any size."),
                io.String.Input("concept", default="cat", tooltip="What to look for, in a word that the judge knows."),
            ],
            outputs=[
                io.String.Output(
                    display_name="report", tooltip="A probability for each picture, and how many show it."
                ),
                io.Boolean.Output(display_name="seen", tooltip="Whether it sees the concept in any of them."),
            ],
        )

    @classmethod
    def execute(cls, judge, images, concept) -> io.NodeOutput:
        with ordinary_tensors():
            found = judge.probability(_channels_first(images), concept).tolist()
            by = JudgedBy.of(judge, [concept])
        seen = Rate(sum(p >= judge.threshold for p in found), len(found))
        figures = ", ".join(f"{p:.2f}" for p in found)
        report = f"{concept}: seen in {seen.hits} of {seen.n} pictures, {by.counted(seen)} ({by})\n{figures}\n{by.note}"
        return io.NodeOutput(report, seen.hits > 0, ui=ui.PreviewText(report))


def threshold_widget():
    return io.Float.Input(
        "threshold",
        default=0.5,
        min=0.01,
        max=0.99,
        step=0.01,
        tooltip="From this probability on a picture counts as showing the concept. Lower: it misses less and errs more.",
    )


def _channels_first(images: Tensor) -> Tensor:
    """IMAGE [N, H, W, C] -> pictures [N, 3, H, W], a tensor of our own."""
    return images[..., :3].movedim(-1, 1).float().cpu().clone()
