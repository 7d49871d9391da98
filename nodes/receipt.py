"""Erasure Receipt: what an erasure did, counted on the user's own model, to be saved with it."""

from __future__ import annotations

from dataclasses import replace
from io import BytesIO

from comfy_api.latest import io, ui

from ..erasure_core import ConceptSpec, __version__
from ..erasure_core.artifact import digest, same_base, weights_digest
from ..erasure_core.concept import everyday
from ..erasure_core.methods._training import fingerprint
from ..erasure_core.metrics.rounding import ROUNDINGS
from ..erasure_core.metrics.weights import text_measures, total_drift
from ..erasure_core.receipt import Drawn, Receipt
from .measuring import Measuring, erased_words, spread, survival
from .modes import ordinary_tensors
from .patching import apply_erasure, carried, check_ungated
from .port import ComfyPort
from .reading import memory_digest, uses_of
from .sampling import PLACE, Drawing, template, widgets
from .sheet import to_tensor
from .types import CATEGORY, Attacks, Erasure, Judge

_STORED = {
    "fp16": "Count again with the changed weights stored in half precision.",
    "bf16": "The same in bfloat16.",
    "fp8_e4m3": "The same in 8-bit floats, as fp8 checkpoints are stored.",
    "int8": "The same in 8-bit whole numbers with one scale for each matrix.",
}


class ErasureReceipt(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        return io.Schema(
            node_id="ErasureReceipt",
            display_name="Erasure Receipt",
            category=CATEGORY,
            description="Measures an erasure on your model: the same seeds before and after, erased and kept words counted by "
            "a judge, attacks, and what 8-bit weights do to it. Save Erasure writes the result into the file and beside it.",
            is_output_node=True,
            inputs=[
                io.Model.Input("model", tooltip="The model before the erasure, with the LoRAs that it is used with."),
                io.Clip.Input("clip", tooltip="The CLIP that belongs to it."),
                io.Vae.Input("vae", tooltip="The VAE that belongs to it; decodes the pictures."),
                Erasure.Input("erasure", tooltip="From Erase Concept, Merge Erasures or Load Erasure."),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-2.0,
                    max=3.0,
                    step=0.05,
                    tooltip="The strength that is measured. The erasure itself leaves the node as it came.",
                ),
                io.String.Input(
                    "prompt",
                    default="a picture of {}",
                    tooltip="What is drawn; {} stands for each word. A plain {} draws the words alone.",
                ),
                io.Int.Input(
                    "pictures",
                    default=8,
                    min=1,
                    max=64,
                    tooltip="Pictures of each word, each with its own seed. More narrow the intervals and take longer.",
                ),
                io.Int.Input(
                    "first_seed",
                    default=5000,
                    min=0,
                    max=(1 << 63) - 1,
                    tooltip="Seed of the first picture, the others follow. Use seeds that no setting was chosen on.",
                ),
                io.Int.Input(
                    "erased_words",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="How many of the erased words are drawn: names of concepts first, then other words for them. "
                    "0: the name of each concept. Of fewer, the receipt says which were not drawn.",
                ),
                io.Int.Input(
                    "kept_words",
                    default=3,
                    min=0,
                    max=100,
                    tooltip="How many of the kept words are drawn, evenly from the whole list. Where none was named and "
                    "everyday words were kept: of these.",
                ),
                *widgets(),
                *(
                    io.Boolean.Input(name, default=name in ("fp8_e4m3", "int8"), tooltip=tip)
                    for name, tip in _STORED.items()
                ),
                Judge.Input(
                    "judge",
                    optional=True,
                    tooltip="Counts the pictures that show each word. Without it, the receipt has pictures, how far they moved "
                    "and figures of the weights.",
                ),
                Attacks.Input(
                    "attacks",
                    optional=True,
                    tooltip="From Red-Team Attack on this very erasure at this strength; they are written into the receipt.",
                ),
            ],
            outputs=[
                Erasure.Output(display_name="erasure", tooltip="The same erasure with its receipt, for Save Erasure."),
                io.Image.Output(display_name="sheet", tooltip="Pictures before and after, with the figures."),
                io.String.Output(display_name="report", tooltip="The receipt in words."),
            ],
        )

    @classmethod
    def validate_inputs(cls, prompt):
        return True if prompt is None or PLACE in template(prompt) else _no_place(prompt)

    @classmethod
    def execute(
        cls, model, clip, vae, erasure, strength, prompt, pictures, first_seed, erased_words, kept_words,
        steps, cfg, sampler_name, scheduler, width, height, judge=None, attacks=(), **stored,
    ) -> io.NodeOutput:  # fmt: skip
        how = Drawing(steps, cfg, sampler_name, scheduler, width, height)
        how.check()
        prompt = template(prompt)
        if PLACE not in prompt:  # linked: known only now
            raise ValueError(_no_place(prompt))
        if not strength or not any(d.rank for d in erasure.deltas.values()):
            raise ValueError("strength: an erasure that changes nothing has no receipt. Use a strength other than 0")
        check_ungated(model=model)
        with ordinary_tensors():
            receipt, sheet = _measure(
                model, clip, vae, erasure, strength, prompt, range(first_seed, first_seed + pictures), how,
                (erased_words, kept_words), [name for name in ROUNDINGS if stored.get(name)], judge, tuple(attacks or ()),
            )  # fmt: skip
        report = receipt.summary()
        if not same_base(receipt.base, erasure.header.base):
            report += "\nnote: the erasure was computed on another model than this one"
        picture = to_tensor(sheet)
        shown = ui.PreviewImage(picture, cls=cls).as_dict() | ui.PreviewText(report).as_dict()
        return io.NodeOutput(replace(erasure, receipt=receipt), picture, report, ui=shown)


def _no_place(prompt: str) -> str:
    return f"prompt: {prompt[:60]!r} has no {{}}, the place of the word. For example: a picture of {{}}"


def _carried(model) -> tuple[str, ...]:
    """What is on ``model`` besides the erasure that is measured. LoRAs and merged weights can't be told from its own."""
    erasures = [f"an erasure of {_names(h.spec)} by {h.method}" for h in carried(model)]
    memories = [f"a prompt memory ({u.memory.mode.value}) of {_names(u.memory.header.spec)}" for u in uses_of(model)]
    return (*erasures, *memories)


def _names(spec: ConceptSpec) -> str:
    return ", ".join(c.name for c in spec.erase)[:100]


def _in_prompts(spec: ConceptSpec, prompt: str) -> ConceptSpec:
    """Words as they are drawn: some text encoders hardly tell words apart that stand alone."""
    erase = tuple(replace(c, words=tuple(prompt.replace(PLACE, w) for w in c.words)) for c in spec.erase)
    return ConceptSpec(erase, tuple(prompt.replace(PLACE, w) for w in spec.keep))


def _measure(model, clip, vae, erasure, strength, prompt, seeds, how, counts, stored, judge, attacks):
    """(Receipt, its sheet)."""
    spec = erasure.header.spec
    erased = apply_erasure(model, erasure, strength)
    before, after = ComfyPort(model, clip), ComfyPort(erased, clip)
    base = fingerprint(before)
    weights = weights_digest(before)
    digests = (weights_digest(after), memory_digest(model), weights) if attacks else ()
    marks = (base, fingerprint(after), *digests)
    for record in attacks:
        if why := record.fault(spec, *marks):
            raise ValueError(f"attacks: {why}. Connect Red-Team Attack to this model and erasure, or leave it out")
    # Who names nothing to keep still wants to see what is beside the concept.
    candidates = spec.keep or (everyday(before, spec) if spec.everyday and counts[1] else ())
    looked_at = spread(candidates, counts[1])
    measuring = Measuring(
        clip, vae, judge, how, prompt, seeds, erased_words(spec, counts[0]), looked_at, len(stored) if judge else 0
    )
    read = replace(spec, keep=spec.keep or tuple(looked_at))
    text, drift = text_measures(before, after, _in_prompts(read, prompt)), total_drift(before, after)
    measuring.before(model)
    measuring.after(erased)
    seen_with = measuring.seen_with if judge is not None else lambda _: None
    lost = survival(model, before, erasure.scaled(strength), stored, seen_with)
    words, kept = measuring.counted()
    drawn = Drawn(prompt, tuple(seeds), how.steps, how.cfg, how.sampler_name, how.scheduler, *measuring.size)
    receipt = Receipt(
        spec, erasure.header.method, erasure.header.settings, base, __version__, digest(erasure.deltas), strength, text,
        drift, drawn, measuring.by, words, kept, attacks, lost, _carried(model),
        weights,
    )  # fmt: skip
    sheet = measuring.sheet(
        f"Erasure receipt: {', '.join(c.name for c in spec.erase)}"[:70], receipt.summary().splitlines()
    )
    file = BytesIO()
    sheet.save(file, "PNG")
    return replace(receipt, sheet=file.getvalue()), sheet
