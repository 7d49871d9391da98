"""The most memory that a piece of work takes on top of what was in use before."""

from __future__ import annotations

import threading
from types import TracebackType


class PeakMemory(threading.Thread):
    """``with PeakMemory() as peak: ...``, then ``peak.bytes``: the process's resident size, looked at every 5 ms."""

    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True)
        self._process, self._done = psutil.Process(), threading.Event()
        self._before = self._largest = self._process.memory_info().rss

    @property
    def bytes(self) -> int:
        return self._largest - self._before

    def run(self) -> None:
        while not self._done.wait(0.005):
            self._largest = max(self._largest, self._process.memory_info().rss)

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self.join()
