"""Writes in a background thread while the next tensors are computed."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Runs one write at a time in its own thread. Memory: the data of the write in progress."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "write")
        self._doing: Future[None] | None = None

    def close(self) -> None:
        """Finishes the write in progress and stops the thread."""
        self._pool.shutdown()

    def do(self, work: Callable[[], None]) -> None:
        """Waits for the previous write, raising its error if it failed, then starts `work`."""
        self.wait()
        self._doing = self._pool.submit(work)

    def wait(self) -> None:
        """Waits for the write in progress; raises its error if it failed."""
        if self._doing is not None:
            doing, self._doing = self._doing, None
            doing.result()
