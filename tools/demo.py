"""See it work: `nox -s demo`.

Starts a real ComfyUI on the CPU with this pack, runs workflows/erase_object.json in it through comfy-cli, as a person
would run a shared graph, and then leaves output/demo.png: the demo model before and after the same erasure, on the erased
prompt, on other words for it, and on what had to be kept.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from comfy_client import ComfyClient, Json
from comfy_host import REPO, ComfyServer
from PIL import Image
from sheet import Column, draw_sheet, sample, save_picture
from workflow_parts import BATCH

from workflows import ASKED, FOLDER, KEPT, NAMED, NOT_NAMED, OBJECT

WORKFLOW = FOLDER / "erase_object.json"
SHEET = REPO / "output" / "demo.png"
COLUMNS = (
    Column(ASKED, "erased", "erased"),
    Column(NAMED, "named with it", "erased"),
    Column(NOT_NAMED, "not named", "erased"),
    *(Column(prompt, "kept, named", "kept") for prompt in KEPT),
    Column("a rose in neon style", "kept, not named"),
)


def comfy_run(workflow: Path, port: int) -> None:
    """Run a graph as `comfy run` does for people."""
    # Beside this Python, which may be a virtual environment's that is not on the path.
    comfy = Path(sys.executable).with_name("comfy.exe" if os.name == "nt" else "comfy")
    command = [str(comfy), "--skip-prompt", "--no-enable-telemetry", "run", "--workflow", str(workflow)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--wait", "--timeout", "1200"]
    print("$", " ".join(["comfy", *command[1:]]), flush=True)
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    try:
        answer = json.loads(done.stdout)
    except json.JSONDecodeError:
        answer = {}
    if done.returncode or not answer.get("ok"):
        sys.exit(f"comfy run failed\n{done.stdout}\n{done.stderr}")
    data = answer["data"]
    print(f"{data['status']}: {len(data['outputs'])} pictures in {data['elapsed_seconds']:.0f} s", flush=True)


def make_sheet(
    client: ComfyClient, erase: Json, columns: tuple[Column, ...] = COLUMNS, batch: int = BATCH
) -> Image.Image:
    prompts = [column.prompt for column in columns]
    before = sample(client, prompts, batch)
    after = sample(client, prompts, batch, erase)
    subtitle = (
        f"EmojiCanvas demo model, Erase Concept: concept “{erase['concept']}”, keep “{erase['keep']}” and everyday words, "
        f"quality {erase['quality']}. "
        f"Each column shows the same {batch} seeds before and after."
    )
    return draw_sheet(f"Erasing “{erase['concept'].partition(',')[0]}”", subtitle, columns, before, after)


def main() -> None:
    begun = time.monotonic()
    with ComfyServer() as server:
        print(f"ComfyUI {server.url} is up after {time.monotonic() - begun:.0f} s", flush=True)
        comfy_run(WORKFLOW, server.port)
        print("sampling the sheet ...", flush=True)
        path = save_picture(make_sheet(server, OBJECT), SHEET)
    print(f"{path} ({time.monotonic() - begun:.0f} s)")


if __name__ == "__main__":
    main()
