"""Second moments of the inputs of a linear."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums of x x' over the inputs x of a linear, float32 [in, in]: over `tokens` that it is fitted to, and others.

    `withheld` is None if there is a single batch, all of which is used.
    """

    fitted: torch.Tensor
    tokens: int
    withheld: torch.Tensor | None
