"""What can be said of other devices on a machine that has none."""

from __future__ import annotations

import json

from api_graphs import Graph, shown
from comfy_host import ComfyServer


def test_models_that_we_move_stay_usable(server: ComfyServer) -> None:
    """ComfyUI's weights are inference tensors: moved outside of inference mode they can't be read any more."""
    g = Graph()
    node = g.add("ProbeMoves")
    found = json.loads(shown(server.run(g.api), node))
    assert len(found) == 18
    assert {k: v for k, v in found.items() if v} == {}
