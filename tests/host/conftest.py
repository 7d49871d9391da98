"""One ComfyUI process for all host tests; its log is shown with a test that fails."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from browser import Browser, why_not
from comfy_client import ComfyClient
from comfy_host import PACK, ComfyServer

SERVER = pytest.StashKey[ComfyServer]()
PROBE = Path(__file__).parent / "probe_nodes"


@pytest.fixture(scope="session")
def server(request: pytest.FixtureRequest) -> Iterator[ComfyServer]:
    """The process, which is also a client: `server.run(graph)`, `server.models`, `server.log_tail()`."""
    server = ComfyServer(args=["--whitelist-custom-nodes", PACK, PROBE.name])
    shutil.copytree(PROBE, server.base / "custom_nodes" / PROBE.name)
    with server:
        request.config.stash[SERVER] = server
        yield server


@pytest.fixture
def client(server: ComfyServer) -> ComfyClient:
    """A second user of the same server, new for each test."""
    return server.client()


@pytest.fixture(scope="module")
def browser(server: ComfyServer) -> Iterator[Browser]:
    """The real page in headless Chromium, which takes half a core for as long as it is open."""
    if reason := why_not():
        pytest.skip(reason)
    with Browser(server.url) as browser:
        yield browser


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    server = item.config.stash.get(SERVER, None)
    if report.failed and server is not None:
        report.sections.append(("ComfyUI log (tail)", server.log_tail()))
    return report
