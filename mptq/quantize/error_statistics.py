"""Error statistics of a quantized weight, added up strip by strip."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Sums:
    """Sums of squared errors and source values, the largest error, and numbers of zeros and of largest codes (448)."""

    noise: float = 0.0
    signal: float = 0.0
    worst: float = 0.0
    zeros: int = 0
    saturated: int = 0

    def add(self, other: Sums) -> None:
        """Adds the statistics of another strip."""
        self.noise += other.noise
        self.signal += other.signal
        self.worst = max(self.worst, other.worst)
        self.zeros += other.zeros
        self.saturated += other.saturated
