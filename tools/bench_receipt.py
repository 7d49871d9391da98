"""How long a receipt takes on the demo model: `nox -s bench -- receipt`.

Starts a real ComfyUI on the CPU, erases a cat (quality fast), and makes its receipt with the demo's judge and the node's own
settings but those that the demo model needs: its size and its cfg. The second of two runs counts, for the first one also loads
the model; it has other seeds, so nothing comes from the cache.
"""

from __future__ import annotations

import os
import time
from typing import Any

from comfy_host import ComfyServer

AIM = 60.0
DEMO = {"width": 128, "height": 128, "cfg": 4.0}


def defaults(info: dict[str, Any], kind: str) -> dict[str, Any]:
    """Of a node's widgets; a list of choices starts with its first."""
    found = {}
    for name, (kinds, *options) in info[kind]["input"]["required"].items():
        said = options[0] if options else {}
        choices = kinds if isinstance(kinds, list) else said.get("options", [])
        if "default" in said or choices:
            found[name] = said.get("default", choices[0] if choices else None)
    return found


def graph(info: dict[str, Any], first_seed: int) -> dict[str, Any]:
    demo = {k: ["1", i] for i, k in enumerate(("model", "clip", "vae", "judge"))}
    erase = defaults(info, "ErasureEraseConcept") | {"concept": "cat, kitty", "keep": "dog, tiger, rabbit"}
    receipt = defaults(info, "ErasureReceipt") | DEMO | {"first_seed": first_seed}
    return {
        "1": {"class_type": "ErasureLoadDemo", "inputs": {}},
        "2": {"class_type": "ErasureEraseConcept", "inputs": erase | {k: demo[k] for k in ("model", "clip")}},
        "3": {"class_type": "ErasureReceipt", "inputs": receipt | demo | {"erasure": ["2", 1]}},
    }


def main() -> None:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    with ComfyServer() as server:
        info = server.object_info()
        for seed in (5000, 6000):
            began: list[float] = []

            def note(event: dict[str, Any], began: list[float] = began) -> None:
                if event["type"] == "executing" and event["data"].get("node") == "3":
                    began.append(time.monotonic())

            run = server.run(graph(info, seed), timeout=1800, on_event=note)
            seconds = time.monotonic() - began[0]
        print("\n".join(run.outputs["3"]["text"]))
    busy = f"; the machine was busy before (load {load:.1f}), so this is an upper bound" if load > 0.5 else ""
    print(f"{seconds:.1f} s, {'met' if seconds <= AIM else 'missed'}: at most {AIM:.0f} s{busy}")


if __name__ == "__main__":
    main()
