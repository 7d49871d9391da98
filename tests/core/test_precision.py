"""bfloat16 only where the CPU has instructions for it."""

from __future__ import annotations

import pytest
import torch

from erasure_core.emojicanvas.precision import _multiplies_bf16

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"avx512_f": True, "avx512_vnni": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"avx512_f": True, "avx512_bf16": True}, True),
        ({"avx512_f": True, "amx_bf16": True}, True),
        ({"avx2": True, "l2_cache_size": 1 << 20, "cpu_name": "bf16"}, False),
    ],
)
def test_instructions_that_multiply_bfloat16_are_needed(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict, fast: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    assert _multiplies_bf16() is fast


def test_a_torch_that_cannot_say_means_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert _multiplies_bf16() is False
