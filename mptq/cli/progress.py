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
"""Steps that still import: torch's and ModelOpt's lazy parts."""


class LiveProgress:
    """Shows the step a run is at; with `verbose`, also a line for every tensor."""

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
        """Move the bar, or print a line about every tenth of the way."""
        self._step = doing
        self._bar.update(self._task, completed=done, total=total, description=doing)
        tenth = max(1, total // 10)
        if not console.err.is_terminal and done and (done % tenth == 0 or done == total):
            console.err.print(f"{done}/{total} {doing}", markup=False)

    def doing(self, what: str) -> None:
        """Say on the bar what the step is at."""
        self._bar.update(self._task, description=f"{self._step}: {what}")

    def bytes(self, count: int) -> None:
        """Add to the bytes read, and show how many a second they are."""
        self._read += count
        rate = self._read / max(time.monotonic() - self._started, 1e-3)
        self._bar.update(self._task, rate=f"{size(rate)}/s")

    def tensor(self, row: dict[str, Any]) -> None:
        """Print the tensor's row when asked for."""
        if self.verbose:
            console.err.print(tensor_line(row), markup=False)


class Freezing:
    """Passes everything on to `progress`, and freezes what the first steps leave: the collections after each step skip it.

    It is the command's to say that nothing of the process goes away before its end; a host of the library may think otherwise.
    """

    def __init__(self, progress: run_log.Progress) -> None:
        self.doing, self.bytes, self.tensor = progress.doing, progress.bytes, progress.tensor
        self._stage, self._steps = progress.stage, 0

    def stage(self, done: int, total: int, doing: str) -> None:
        """Freeze at the start and after each of the first steps."""
        if self._steps <= _IMPORTING:
            if self._steps:
                gc.collect()  # the step's own layer is no part of what stays
            gc.freeze()
        self._steps += 1
        self._stage(done, total, doing)
