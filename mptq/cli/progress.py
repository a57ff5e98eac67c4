"""Progress on stderr: one live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import gc
import time
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from mptq.cli import console
from mptq.cli.tables import tensor_line
from mptq.report.formatting import size

if TYPE_CHECKING:
    from mptq.report import run_log

_IMPORTING = 2
"""Number of first steps that still trigger lazy imports of torch and ModelOpt."""


class LiveProgress:
    """Shows the current step of a run; with `verbose`, also prints one line per tensor."""

    def __init__(self, verbose: bool) -> None:
        self.verbose = verbose
        columns = (
            TextColumn("{task.description:<40}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console.err, transient=True, disable=not console.err.is_terminal)
        self._task = self._bar.add_task("starting", total=None, rate="")
        self._step = "starting"
        self._read = 0
        self._started = time.monotonic()

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()

    def stage(self, done: int, total: int, doing: str) -> None:
        """Moves the bar; without a terminal, prints a line after about every tenth of the steps."""
        self._step = doing
        self._bar.update(self._task, completed=done, total=total, description=doing)
        tenth = max(1, total // 10)
        if not console.err.is_terminal and done and (done % tenth == 0 or done == total):
            console.err.print(f"{done}/{total} {doing}", markup=False)

    def doing(self, what: str) -> None:
        """Shows on the bar what the current step is doing."""
        self._bar.update(self._task, description=f"{self._step}: {what}")

    def bytes(self, count: int) -> None:
        """Adds to the bytes read and shows the average rate."""
        self._read += count
        rate = self._read / max(time.monotonic() - self._started, 1e-3)
        self._bar.update(self._task, rate=f"{size(rate)}/s")

    def tensor(self, row: dict[str, Any]) -> None:
        """Prints a line for the tensor if `verbose`."""
        if self.verbose:
            console.err.print(tensor_line(row), markup=False)


class Freezing:
    """Forwards to `progress` and freezes the objects that the first steps leave, so that later collections skip them.

    Only the command line does this: it knows that these objects live until the process exits. A program that uses the
    library may not want it.
    """

    def __init__(self, progress: run_log.Progress) -> None:
        self.doing, self.bytes, self.tensor = progress.doing, progress.bytes, progress.tensor
        self._stage, self._steps = progress.stage, 0

    def stage(self, done: int, total: int, doing: str) -> None:
        """Freezes all objects at the start and after each of the first steps."""
        if self._steps <= _IMPORTING:
            if self._steps:
                gc.collect()  # frees the step's own layer first
            gc.freeze()
        self._steps += 1
        self._stage(done, total, doing)
