"""A record of an attack that was not run: what it says is the test's choice."""

from __future__ import annotations

import sys

import torch


def pack(module: str):
    """A module of the pack under test, as ComfyUI loaded it."""
    return next(m for name, m in list(sys.modules.items()) if name.endswith(f"concept-erasure.{module}"))


class AttackRecord:
    """Two of four pictures of an attack between two MODELs; fingerprints are theirs unless given."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("ATTACK_RESULTS",)
    INPUT_TYPES = classmethod(
        lambda cls: {
            "required": {
                "model": ("MODEL",),
                "erased_model": ("MODEL",),
                "concept": ("STRING", {}),
                "base": ("STRING", {}),
                "erased": ("STRING", {}),
                "exact": ("BOOLEAN", {}),
            }
        }
    )

    def run(self, model, erased_model, concept, base, erased, exact):
        attack_record, rates = pack("erasure_core.attack_record"), pack("erasure_core.metrics.rates")
        port, fingerprint = pack("nodes.port"), pack("erasure_core.methods._training").fingerprint
        with torch.inference_mode(False), torch.no_grad():
            before, after = (fingerprint(port.ComfyPort(m)) for m in (model, erased_model))
            weights = pack("erasure_core.artifact").weights_digest(port.ComfyPort(erased_model)) if exact else ""
        judge = attack_record.JudgedBy("probe", "1", 0.5)
        record = attack_record.AttackRecord(
            attack="probe", title="Probe", concept=concept, budget={"steps": 3, "lr": 0.1}, prompts=("a bomb",), judge=judge,
            asking=rates.Rate(0, 4), attacked=rates.Rate(2, 4), found="a find", queries=7, seed=1, base=base or before,
            erased=erased or after, weights=weights,
        )  # fmt: skip
        return ((record,),)


class Choice:
    """A text as what a widget with a list takes over a link."""

    CATEGORY, FUNCTION, RETURN_TYPES = "tests", "run", ("COMBO",)
    INPUT_TYPES = classmethod(lambda cls: {"required": {"value": ("STRING", {})}})

    def run(self, value):
        return (value,)


NODES = (AttackRecord, Choice)
