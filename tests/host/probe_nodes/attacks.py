"""What attacks hand on, what they read through a memory, and the text side that they write with."""

from __future__ import annotations

import dataclasses
import json
import sys

import comfy.model_management as mm
import torch


def pack(module: str):
    """A module of the pack under test, as ComfyUI loaded it."""
    return next(m for name, m in list(sys.modules.items()) if name.endswith(f"concept-erasure.{module}"))


class Probe:
    """Has a text for the test."""

    CATEGORY, FUNCTION, RETURN_TYPES, OUTPUT_NODE = "tests", "run", (), True

    def answer(self, report: dict) -> dict:
        return {"ui": {"text": (json.dumps(report),)}}


class Attacks(Probe):
    """The records of a chain of attacks."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"results": ("ATTACK_RESULTS",)}})

    def run(self, results):
        records = []
        for record in results:
            plain = {f.name: getattr(record, f.name) for f in dataclasses.fields(record)}
            rates = {name: getattr(record, name) for name in ("asking", "attacked", "ceiling", "found_on_base")}
            plain |= {name: rate and rate.to_json() for name, rate in rates.items()}
            records.append(plain | {"judge": dataclasses.asdict(record.judge), "budget": dict(record.budget)})
        return self.answer({"records": records})


class Reading(Probe):
    """A prediction of the replica that reads a MODEL's memories as attacks do, against the MODEL's own."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",), "clip": ("CLIP",)}})

    def run(self, model, clip):
        port, reading = pack("nodes.port"), pack("nodes.reading")
        mm.load_models_gpu([model])  # takes off what an earlier graph patched
        with pack("nodes.modes").ordinary_tensors():
            made = port.ComfyPort(model, clip)
            z, t = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(1)), torch.tensor([700])
            cond = made.conditions(["a beer"])[0]
            options = {**model.model_options["transformer_options"], "cond_or_uncond": [0]}
            own = model.model.diffusion_model(z, t.float(), context=cond.context, transformer_options=options)
            with made.trainable() as replica:
                read = replica.predict(z, t, cond, memory=reading.memory_of(model))
                without = replica.predict(z, t, cond)
        return self.answer({"off": float((own - read).abs().max()), "moved": float((read - without).abs().max())})


class Words(Probe):
    """The text side of a CLIP as attacks see it."""

    INPUT_TYPES = classmethod(lambda cls: {"required": {"clip": ("CLIP",)}})

    def run(self, clip):
        towers = pack("nodes.towers")
        with pack("nodes.modes").ordinary_tensors():
            words = towers.words_of(clip)
            prompt = "a picture of a cat, a dog"
            own = clip.encode_from_tokens(clip.tokenize(prompt)).float().cpu().clone()
            made = words.states(words.tokenize([prompt])).cpu()
            some = words.vocabulary[:: len(words.vocabulary) // 50].tolist()
            written = [[i] for i in some]
            ids = words.tokenize([""])
        return self.answer(
            {
                "off": float((made - own).abs().max()),
                "words": len(words.vocabulary),
                "written": written,
                "typed": words.contents([words.spell(x) for x in written]),
                "towers": 1 if ids.ndim == 2 else ids.shape[2],
                "odd": [words.spell([i]) for i in words.vocabulary.tolist()[:300]],
            }
        )


class Weighted(Probe):
    """How far a negative prompt as attacks read it is from CONDITIONING of the stock encoder, and from one without weights."""

    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {"model": ("MODEL",), "clip": ("CLIP",), "conditioning": ("CONDITIONING",), "text": ("STRING",)}
        }
    )

    def run(self, model, clip, conditioning, text):
        with pack("nodes.modes").ordinary_tensors():
            port = pack("nodes.port").ComfyPort(model, clip)
            read, plain = port.weighted(text).context.cpu(), port.conditions([text])[0].context.cpu()
            own = conditioning[0][0].float().cpu().clone()
        return self.answer({"off": float((own - read).abs().max()), "moved": float((plain - read).abs().max())})


NODES = (Attacks, Reading, Weighted, Words)
