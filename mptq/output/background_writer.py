"""Writing behind: while the next tensors are made, a thread writes those before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class BackgroundWriter:
    """Does one thing after another in a thread of its own. Memory: what the one that is being done holds."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, "write")
        self._doing: Future[None] | None = None

    def close(self) -> None:
        """Finish what is being done."""
        self._pool.shutdown()

    def do(self, work: Callable[[], None]) -> None:
        """Begin with `work` when what came before is done, and what went wrong there is raised."""
        self.wait()
        self._doing = self._pool.submit(work)

    def wait(self) -> None:
        """Until everything is done."""
        if self._doing is not None:
            doing, self._doing = self._doing, None
            doing.result()
