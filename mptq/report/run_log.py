"""What a run tells while it goes, and what it keeps for its report."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol


class Progress(Protocol):
    """What a caller can follow; `row` is a row of the report's `tensors`."""

    def stage(self, done: int, total: int, doing: str) -> None:
        """`done` of `total` steps (embedding, layers, head) are over, and `doing` is next."""

    def doing(self, what: str) -> None:
        """Within a step: what is being done."""

    def bytes(self, count: int) -> None:
        """So many bytes of the checkpoint are read."""

    def tensor(self, row: dict[str, Any]) -> None:
        """A tensor is quantized."""


class Silent:
    """Progress for nobody."""

    def stage(self, done: int, total: int, doing: str) -> None:
        """Say nothing."""

    def doing(self, what: str) -> None:
        """Say nothing."""

    def bytes(self, count: int) -> None:
        """Say nothing."""

    def tensor(self, row: dict[str, Any]) -> None:
        """Say nothing."""


@dataclass
class RunLog:
    """What a run leaves for the report.

    A row a tensor, what the activations say of each layer and at the end, the share of each rank, and seconds and bytes by
    stage.
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
        """Add the time of the block to `stage`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - start
