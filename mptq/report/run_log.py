"""Progress of a run, and the data that it records for its report."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol


class Progress(Protocol):
    """Receives progress events of a run; `row` is a row of the report's `tensors`."""

    def stage(self, done: int, total: int, doing: str) -> None:
        """`done` of `total` steps (embedding, layers, head) are finished, and `doing` is next."""

    def doing(self, what: str) -> None:
        """The current activity within a step."""

    def bytes(self, count: int) -> None:
        """`count` more bytes of the checkpoint were read."""

    def tensor(self, row: dict[str, Any]) -> None:
        """A tensor was quantized."""


class Silent:
    """Progress that ignores all events."""

    def stage(self, done: int, total: int, doing: str) -> None:
        """Does nothing."""

    def doing(self, what: str) -> None:
        """Does nothing."""

    def bytes(self, count: int) -> None:
        """Does nothing."""

    def tensor(self, row: dict[str, Any]) -> None:
        """Does nothing."""


@dataclass
class RunLog:
    """Records data for the report.

    One row per quantized tensor, activation measurements per layer, final fidelity, the share of each rank, and seconds and
    bytes per stage.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    fidelity: dict[str, Any] | None = None
    ranks: dict[int, dict[str, int]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    bytes: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    started: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.started

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        """Adds the duration of the block, in seconds, to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
