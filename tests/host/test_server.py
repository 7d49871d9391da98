"""The process starts, loads this pack, runs graphs, and says what is wrong with a bad one."""

from __future__ import annotations

import io
from typing import Any

import pytest
from comfy_client import ComfyClient, ExecutionFailed, ExecutionInterrupted, PromptRejected, ServerFailed
from comfy_host import PACK, ComfyServer
from PIL import Image

Graph = dict[str, Any]


def picture(color: int = 0, size: int = 64) -> Graph:
    """A graph of stock nodes that saves one flat picture."""
    inputs = {"width": size, "height": size, "batch_size": 1, "color": color}
    save = {"images": ["1", 0], "filename_prefix": "flat"}
    return {
        "1": {"class_type": "EmptyImage", "inputs": inputs},
        "2": {"class_type": "SaveImage", "inputs": save},
    }


def test_pack_is_loaded(server: ComfyServer) -> None:
    ours = {i for i, n in server.object_info().items() if n["python_module"] == f"custom_nodes.{PACK}"}
    assert ours
    assert all(i.startswith("Erasure") for i in ours)


def test_runs_a_graph(server: ComfyServer) -> None:
    run = server.run(picture(color=0xFF8000))
    image = Image.open(io.BytesIO(server.images(run)[0]))
    assert image.size == (64, 64)
    assert image.getpixel((3, 3)) == (255, 128, 0)
    assert run.executed == ["1", "2"]


def test_second_run_is_cached_for_another_user(server: ComfyServer, client: ComfyClient) -> None:
    first = server.run(picture(color=1))
    second = client.run(picture(color=1))
    assert {"1", "2"} <= set(second.cached)
    assert second.outputs == first.outputs


def test_bad_input_is_refused_with_text(client: ComfyClient) -> None:
    graph = picture(size=0)
    with pytest.raises(PromptRejected, match="EmptyImage") as caught:
        client.run(graph)
    assert "1" in caught.value.node_errors


def test_failing_node_is_named(client: ComfyClient, server: ComfyServer) -> None:
    name = client.upload(b"not a picture", "broken.png")
    graph = picture()
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    assert (server.input / name).read_bytes() == b"not a picture"
    # Load Image is checked for existence only, so this fails when it runs.
    with pytest.raises(ExecutionFailed, match="LoadImage") as caught:
        client.run(graph)
    assert caught.value.node_id == "1"


def test_upload_comes_back(client: ComfyClient) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (1, 2, 3)).save(buffer, "PNG")
    name = client.upload(buffer.getvalue(), "small.png")
    graph = picture()
    graph["1"] = {"class_type": "LoadImage", "inputs": {"image": name}}
    image = Image.open(io.BytesIO(client.images(client.run(graph))[0]))
    assert image.getpixel((0, 0)) == (1, 2, 3)


def blurred(color: int) -> Graph:
    """A graph of many steps."""
    graph = picture(color, size=512)
    for step in range(3, 24):
        inputs = {"image": [str(step - 1 if step > 3 else 1), 0], "blur_radius": 31, "sigma": 10.0}
        graph[str(step)] = {"class_type": "ImageBlur", "inputs": inputs}
    graph["2"]["inputs"]["images"] = ["23", 0]
    return graph


def test_interrupt(client: ComfyClient) -> None:
    with pytest.raises(ExecutionInterrupted):
        client.run(blurred(color=2), on_event=lambda e: client.interrupt() if e["type"] == "executing" else None)
    assert client.run(picture(color=3)).outputs, "the server works on"


def test_failed_start_shows_the_log_and_leaves_nothing() -> None:
    broken = ComfyServer(args=["--no-such-flag"])
    with pytest.raises(ServerFailed, match="--no-such-flag"), broken:
        pass
    assert not broken.base.exists()


def test_timeout_interrupts(client: ComfyClient) -> None:
    with pytest.raises(TimeoutError):
        client.run(blurred(color=4), timeout=0)
    assert client.run(picture(color=5)).outputs, "the server works on"
