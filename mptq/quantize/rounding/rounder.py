"""Rounds the matrices of one linear by a method, and keeps rounding to nearest where the method is not better."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from mptq.quantize import quantizer
from mptq.quantize.fp8 import E4M3_MAX, dequantize, powers_of_two
from mptq.quantize.rounding.gptq import damped, solve
from mptq.quantize.rounding.moments import Moments
from mptq.quantize.rounding.scales import search, spread
from mptq.recipes.schemes import Scheme
from mptq.types import Fp8Weight

DAMPING = 0.1
"""Least share of the mean diagonal that is added to a moment."""
_SCARCE = 4.0
"""The damping is at least this divided by the number of tokens per input."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """A rounded matrix: `weight` float32 [out, in], which rounding to nearest with `amax` gives the codes of.

    `amax` has the shape of the scales. `method` is what was done.
    `error` and `nearest` are relative errors of the outputs on the withheld inputs, with this and with nearest rounding;
    None if no input was withheld, as of an expert that few tokens are routed to.
    """

    weight: torch.Tensor
    amax: torch.Tensor
    method: str
    error: float | None = None
    nearest: float | None = None


@dataclass(frozen=True, slots=True)
class Shared:
    """Magnitudes, float32 [], of matrices with one scale: the largest, and the one to scale for."""

    largest: torch.Tensor
    best: torch.Tensor


class Rounder:
    """Rounds matrices whose inputs have the second `moments`, by `method` ("scales" or "gptq").

    With fewer tokens than inputs, the method is "scales": GPTQ would fit the codes to these tokens alone. Without withheld
    inputs, a linear is rounded to nearest; if there is only one batch, its inputs serve for both. Memory: 4
    matrices [in, in] and 6 times the matrix to round, float32.
    """

    def __init__(self, moments: Moments, method: str) -> None:
        self.moments = moments
        self.method = method if moments.tokens >= len(moments.fitted) else "scales"
        self.judge = moments.fitted if moments.withheld is None else moments.withheld

    @cached_property
    def _damped(self) -> torch.Tensor:
        damping = max(DAMPING, _SCARCE * len(self.moments.fitted) / self.moments.tokens)
        return damped(self.moments.fitted, damping)

    @property
    def diagonal(self) -> torch.Tensor:
        """Mean squares of the inputs, up to a factor: float32 [in]."""
        return self.moments.fitted.diagonal().contiguous()

    def shared_amax(self, sources: Iterable[torch.Tensor], scheme: Scheme, amax: torch.Tensor) -> torch.Tensor:
        """Returns the amax, float32 [], to scale for in matrices [out, in] that share one scale, given the largest."""
        return search(sources, self.diagonal, scheme, amax) if self.moments.tokens else amax

    def round(self, source: torch.Tensor, scheme: Scheme, name: str, shared: Shared | None = None) -> Rounded:
        """Rounds `source` [out, in]; `shared` are the magnitudes of a group with one scale.

        Raises CheckpointError, with `name`, for a weight or a moment that cannot be used.
        """
        nearest, _ = quantizer.quantize(source, scheme, name, shared.largest if shared else None)
        kept = dequantize(nearest, scheme)
        if not self.moments.tokens:
            return Rounded(kept, _magnitudes(nearest), "nearest")
        weight, best = source.float(), shared.best if shared else _magnitudes(nearest)
        if not shared and not scheme.exponents:
            best = search([weight], self.diagonal, scheme, best)
        made, _ = quantizer.quantize(source, scheme, name, best)
        rounded = dequantize(made, scheme)
        if self.method == "gptq":
            scale = powers_of_two(made.scale) if scheme.exponents else made.scale
            rounded = solve(weight, self._damped, spread(scale, scheme, tuple(weight.shape)), name)
        signal = self._energy(weight)
        if not signal:
            return Rounded(kept, _magnitudes(nearest), "nearest")
        error, error_of_nearest = (self._energy(one - weight) / signal for one in (rounded, kept))
        better = error < error_of_nearest
        return Rounded(
            rounded if better else kept,
            _magnitudes(made if better else nearest),
            self.method if better else "nearest",
            math.sqrt(min(error, error_of_nearest)),
            math.sqrt(error_of_nearest),
        )

    def _energy(self, difference: torch.Tensor) -> float:
        """Returns the sum of squares of the outputs that a matrix [out, in] makes of the withheld inputs."""
        return max(0.0, float(((difference @ self.judge).double() * difference.double()).sum()))


def _magnitudes(made: Fp8Weight) -> torch.Tensor:
    """Returns the amax that gives the scales of a weight."""
    return powers_of_two(made.scale) * E4M3_MAX if made.amax is None else made.amax
