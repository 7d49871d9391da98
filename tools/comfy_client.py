"""ComfyUI's HTTP and websocket interface, and what can go wrong with it, as types."""

from __future__ import annotations

import json
import struct
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import requests
import websocket

Json = dict[str, Any]
# Kinds of binary websocket messages (ComfyUI's protocol.py)
BARE_PREVIEW = 1
PREVIEW_WITH_HEADER = 4


class ComfyError(RuntimeError):
    """Anything that ComfyUI refused or could not do."""


class ServerFailed(ComfyError):
    """The process did not start, or died."""


class PromptRejected(ComfyError):
    """The graph did not validate; `node_errors` is ComfyUI's own report."""

    def __init__(self, answer: Json) -> None:
        self.node_errors: Json = answer.get("node_errors") or {}
        error = answer.get("error") or {}
        lines = [str(error.get("message", "invalid prompt")) if isinstance(error, dict) else str(error)]
        for node, report in self.node_errors.items():
            lines += [f"node {node} ({report['class_type']}): {e['message']}: {e['details']}" for e in report["errors"]]
        super().__init__("\n".join(lines))


class ExecutionFailed(ComfyError):
    """A node raised."""

    def __init__(self, data: Json) -> None:
        self.node_id, self.node_type = data.get("node_id"), data.get("node_type")
        self.exception_type, self.message = data.get("exception_type"), str(data.get("exception_message", "")).strip()
        trace = "".join(data.get("traceback") or [])
        super().__init__(f"node {self.node_id} ({self.node_type}): {self.exception_type}: {self.message}\n{trace}")


class ExecutionInterrupted(ComfyError):
    """Somebody called `interrupt`."""


@dataclass
class Run:
    """What one finished prompt left behind."""

    prompt_id: str
    outputs: dict[str, Json] = field(default_factory=dict)
    """Node id -> interface output, cached nodes included."""
    events: list[Json] = field(default_factory=list)
    previews: list[bytes] = field(default_factory=list)
    """Encoded pictures that came while it ran."""
    cached: list[str] = field(default_factory=list)
    executed: list[str] = field(default_factory=list)

    @property
    def progress(self) -> list[tuple[str, float, float]]:
        """(node, value, max) of every tick."""
        ticks = [e["data"] for e in self.events if e["type"] == "progress"]
        return [(str(t["node"]), t["value"], t["max"]) for t in ticks]


class ComfyClient:
    """One user of a running server."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._http = requests.Session()
        self._http.trust_env = False  # a proxy has no business on loopback

    def get(self, path: str, timeout: float = 60, **params: str) -> requests.Response:
        answer = self._http.get(self.url + path, params=params, timeout=timeout)
        answer.raise_for_status()
        return answer

    def post(self, path: str, body: Any = None, timeout: float = 60) -> requests.Response:
        answer = self._http.post(self.url + path, json={} if body is None else body, timeout=timeout)
        answer.raise_for_status()
        return answer

    def object_info(self, node: str = "") -> Json:
        """Schemas of all nodes, or of one."""
        info: Json = self.get(f"/object_info/{node}" if node else "/object_info").json()
        return info

    def submit(self, prompt: Json, client_id: str = "") -> str:
        """Queue a graph in API format without waiting and return its id."""
        body = {"prompt": prompt, "client_id": client_id or uuid.uuid4().hex}
        answer = self._http.post(f"{self.url}/prompt", json=body, timeout=60)
        if answer.status_code != requests.codes.bad_request:
            answer.raise_for_status()
        report: Json = answer.json()
        # ComfyUI accepts a graph of which one branch is broken and runs the rest; here that is an error too.
        if not answer.ok or report.get("node_errors"):
            raise PromptRejected(report)
        return str(report["prompt_id"])

    def run(self, prompt: Json, timeout: float = 600, on_event: Callable[[Json], None] | None = None) -> Run:
        """Queue a graph, wait for its end, and return what it showed; see the exceptions above for how it can fail.

        `on_event` sees every JSON message of this run as it comes (for example to interrupt at the third tick).
        """
        # A fresh id each time: the server drops the socket of a re-used one when it notices that the older is gone.
        client_id = uuid.uuid4().hex
        where = f"{self.url.replace('http', 'ws', 1)}/ws?clientId={client_id}"
        link = websocket.create_connection(where, timeout=30, http_no_proxy=["*"])
        try:
            features = {"type": "feature_flags", "data": {"supports_preview_metadata": True}}
            link.send(json.dumps(features))
            run = Run(self.submit(prompt, client_id))
            for event in self._events(link, run, timeout):
                run.events.append(event)
                if on_event:
                    on_event(event)
                kind, data = event["type"], event["data"]
                if kind == "execution_cached":
                    run.cached += data["nodes"]
                elif kind == "executing" and data.get("node"):
                    run.executed.append(str(data["node"]))
                elif kind == "execution_error":
                    raise ExecutionFailed(data)
                elif kind == "execution_interrupted":
                    raise ExecutionInterrupted(f"interrupted in node {data.get('node_id')} ({data.get('node_type')})")
                elif kind == "execution_success":
                    break
        finally:
            link.close()
        run.outputs = self._finished(run.prompt_id)["outputs"]
        return run

    def _events(self, link: websocket.WebSocket, run: Run, timeout: float) -> Iterator[Json]:
        deadline = time.monotonic() + timeout
        link.settimeout(2)
        while time.monotonic() < deadline:
            try:
                opcode, frame = link.recv_data()
            except websocket.WebSocketTimeoutException:
                self.check_alive()
                continue
            except (websocket.WebSocketException, OSError) as error:
                self.check_alive()
                raise ServerFailed(f"lost the websocket: {error}") from error
            if opcode == websocket.ABNF.OPCODE_BINARY:
                run.previews += _preview(frame)
            elif opcode == websocket.ABNF.OPCODE_TEXT:
                event: Json = json.loads(frame)
                if (event.get("data") or {}).get("prompt_id") == run.prompt_id:
                    yield event
            elif opcode == websocket.ABNF.OPCODE_CLOSE:
                self.check_alive()
                raise ServerFailed("the server closed the websocket")
        self.interrupt(run.prompt_id)
        raise TimeoutError(f"prompt {run.prompt_id} did not end within {timeout:.0f} s and was interrupted")

    def _finished(self, prompt_id: str) -> Json:
        # The history is written a moment after the last message.
        for _ in range(200):
            entry: Json | None = self.history(prompt_id).get(prompt_id)
            if entry:
                return entry
            time.sleep(0.05)
        raise ComfyError(f"prompt {prompt_id} ended without an entry in the history")

    def check_alive(self) -> None:
        """Raise if the server is known to be gone."""

    def history(self, prompt_id: str = "") -> Json:
        entries: Json = self.get(f"/history/{prompt_id}" if prompt_id else "/history").json()
        return entries

    def interrupt(self, prompt_id: str = "") -> None:
        """Stop what runs now, or one prompt, be it running or waiting."""
        if prompt_id:
            self.post("/queue", {"delete": [prompt_id]})
        self.post("/interrupt", {"prompt_id": prompt_id} if prompt_id else {})

    def free(self) -> None:
        """Unload all models and forget cached results (done by the worker, shortly after)."""
        self.post("/free", {"unload_models": True, "free_memory": True})

    def view(self, filename: str, subfolder: str = "", type: str = "output") -> bytes:
        return self.get("/view", filename=filename, subfolder=subfolder, type=type).content

    def images(self, run: Run, node: str | None = None) -> list[bytes]:
        """The encoded pictures which a run (or one of its nodes) saved or previewed."""
        nodes: Iterable[Json] = run.outputs.values() if node is None else [run.outputs[node]]
        return [self.view(i["filename"], i["subfolder"], i["type"]) for o in nodes for i in o.get("images", [])]

    def upload(self, picture: Path | bytes, name: str = "") -> str:
        """Put a picture into the input folder; returns the name for Load Image."""
        content = picture.read_bytes() if isinstance(picture, Path) else picture
        name = name or (picture.name if isinstance(picture, Path) else f"{uuid.uuid4().hex}.png")
        form = {"overwrite": "true"}
        answer = self._http.post(f"{self.url}/upload/image", files={"image": (name, content)}, data=form, timeout=60)
        answer.raise_for_status()
        report: Json = answer.json()
        return "/".join(part for part in (report.get("subfolder"), report["name"]) if part)


def _preview(frame: bytes) -> list[bytes]:
    """The picture in a binary message, if it is one; newer kinds carry text."""
    kind, length = struct.unpack_from(">II", frame)
    if kind == BARE_PREVIEW:
        return [frame[8:]]
    return [frame[8 + length :]] if kind == PREVIEW_WITH_HEADER else []
