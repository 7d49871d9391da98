"""A real ComfyUI process for the tests and the demo: find one, start it, talk to it, stop it.

    with ComfyServer() as server:
        run = server.run({"1": {"class_type": "EmptyImage", "inputs": {...}}, ...})
        png = server.images(run)[0]

The server is always a process of its own: this repository has a `nodes/` package, which would hide ComfyUI's `nodes.py`
if both were on one `sys.path`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType

import requests
from comfy_client import ComfyClient, ComfyError, ServerFailed
from comfy_tree import locate

REPO = Path(__file__).resolve().parent.parent
PACK = "comfyui-concept-erasure"
MODEL_FOLDERS = ("checkpoints", "loras", "embeddings", "erasure")
NOT_IN_PACK = shutil.ignore_patterns(".git", ".nox", ".cache", ".venv", ".*_cache", "__pycache__", "output")


class ComfyServer(ComfyClient):
    """A ComfyUI process on loopback with a base directory of its own and this pack as its only custom node.

    `base` keeps models and outputs in a folder of yours; without it they go to a temporary one that is removed at exit.
    """

    def __init__(
        self,
        base: Path | None = None,
        *,
        cpu: bool = True,
        args: Iterable[str] = (),
        env: dict[str, str] | None = None,
        start_timeout: float = 240,
    ) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        super().__init__(f"http://127.0.0.1:{self.port}")
        self.tree = locate()
        self._own_base = base is None
        self.base = Path(base or tempfile.mkdtemp(prefix="comfyui-base-")).resolve()
        self.models, self.input, self.output = (self.base / n for n in ("models", "input", "output"))
        self.log = self.base / "server.log"
        self.args = [*(["--cpu"] if cpu else []), *args]
        self.env, self.start_timeout = env or {}, start_timeout
        self.process: subprocess.Popen[bytes] | None = None

    def client(self) -> ComfyClient:
        """Another user of the same server."""
        return ComfyClient(self.url)

    def log_tail(self, lines: int = 60) -> str:
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def check_alive(self) -> None:
        if self.process is None or self.process.poll() is not None:
            code = self.process.returncode if self.process else None
            raise ServerFailed(f"ComfyUI is not running (exit code {code})\n{self.log_tail()}")

    def start(self) -> None:
        for folder in (*(f"models/{m}" for m in MODEL_FOLDERS), "input", "output", "temp", "user", "custom_nodes"):
            (self.base / folder).mkdir(parents=True, exist_ok=True)
        self._install_pack()
        command = [sys.executable, "main.py", "--listen", "127.0.0.1", "--port", str(self.port)]
        command += ["--base-directory", str(self.base), "--database-url", "sqlite:///:memory:"]
        command += ["--disable-auto-launch", "--disable-api-nodes"]
        # A tree of the user's own may name further custom node folders in its extra_model_paths.yaml.
        command += ["--disable-all-custom-nodes", "--whitelist-custom-nodes", PACK, *self.args]
        env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")} | self.env
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, cwd=self.tree, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + self.start_timeout
        while True:
            self.check_alive()
            try:
                self.get("/system_stats", timeout=5)
                return
            except requests.RequestException:
                if time.monotonic() > deadline:
                    message = f"ComfyUI did not answer within {self.start_timeout:.0f} s\n{self.log_tail()}"
                    raise ServerFailed(message) from None
            time.sleep(0.25)

    def _install_pack(self) -> None:
        pack = self.base / "custom_nodes" / PACK
        if pack.resolve() == REPO:
            return
        ours = pack / ".copied-for-tests"
        if pack.is_symlink():
            pack.unlink()
        elif ours.exists():
            shutil.rmtree(pack)
        elif pack.exists():
            raise ComfyError(f"{pack} is somebody's own copy of this pack; use another base directory")
        try:
            pack.symlink_to(REPO, target_is_directory=True)
        except OSError:  # Windows without developer mode
            shutil.copytree(REPO, pack, ignore=NOT_IN_PACK)
            ours.touch()

    def stop(self) -> None:
        """End the process group and, if it was ours, remove the base directory."""
        if self.process is not None and self.process.poll() is None:
            for how in (signal.SIGTERM, signal.SIGKILL) if os.name == "posix" else (signal.SIGTERM,):
                self._signal(how)
                try:
                    self.process.wait(timeout=10)
                    break
                except subprocess.TimeoutExpired:
                    continue
        if self._own_base:
            shutil.rmtree(self.base, ignore_errors=True)

    def _signal(self, how: signal.Signals) -> None:
        assert self.process is not None
        if os.name == "posix":
            os.killpg(self.process.pid, how)
        else:
            self.process.send_signal(how)

    def __enter__(self) -> ComfyServer:
        try:
            self.start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
