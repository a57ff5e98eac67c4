"""What the elements of a quantized weight add up to, strip by strip."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Sums:
    """Squares of errors and of source values, the largest error; how many elements are zero, and how many the largest code."""

    noise: float = 0.0
    signal: float = 0.0
    worst: float = 0.0
    zeros: int = 0
    saturated: int = 0

    def add(self, other: Sums) -> None:
        """Join what another strip has."""
        self.noise += other.noise
        self.signal += other.signal
        self.worst = max(self.worst, other.worst)
        self.zeros += other.zeros
        self.saturated += other.saturated
