"""Rounds the matrices of one linear by a method, and keeps rounding to nearest where the method is not better."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from mptq.quantize import quantizer
from mptq.quantize.fp8 import E4M3_MAX, dequantize, element_scales, powers_of_two
from mptq.quantize.rounding.gptq import Curvature, damped, dead_inputs, factored, solve
from mptq.quantize.rounding.moments import Moments
from mptq.quantize.rounding.scales import search
from mptq.recipes.schemes import Scheme
from mptq.types import Fp8Weight

DAMPING = 0.1
"""Least share of the mean diagonal that is added to a moment."""
_SCARCE = 4.0
"""The damping is at least this divided by the number of tokens per input."""
PROPAGATED = 0.5
"""Share of the errors of earlier linears that "qep" makes up for (the paper's alpha)."""


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
    """Rounds matrices whose inputs have the given `moments`, by `method` ("scales", "gptq" or "qep").

    With fewer tokens than inputs, the method is "scales": GPTQ would fit the codes to these tokens alone. Without the
    reference's inputs, it is "gptq" instead of "qep". Without withheld inputs, a linear is rounded to nearest. Memory:
    6 matrices [in, in] and 8 times the matrix to round, float32, and the outputs for the withheld inputs.
    """

    def __init__(self, moments: Moments, method: str) -> None:
        self.moments = moments
        if method == "qep" and moments.shift is None:
            method = "gptq"
        self.method = method if moments.tokens >= len(moments.fitted) else "scales"
        self._curvature: Curvature | None = None

    def _factored(self, name: str) -> Curvature:
        """Returns the damped moment, factored when it is first asked for: matrices with the same inputs share it."""
        if self._curvature is None:
            damping = max(DAMPING, _SCARCE * len(self.moments.fitted) / self.moments.tokens)
            self._curvature = factored(damped(self.moments.fitted, damping), name)
        return self._curvature

    def _target(self, weight: torch.Tensor, curvature: Curvature) -> torch.Tensor:
        """Returns what to round: the weight, with part of what makes up for the errors of the linears before it."""
        if self.method != "qep":
            return weight
        assert self.moments.shift is not None
        missed = weight @ self.moments.shift
        if self.moments.residual is not None:
            missed += self.moments.residual
        missed[:, dead_inputs(self.moments.fitted)] = 0
        return weight + curvature.solve(missed).mul_(PROPAGATED)

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
        if self.method != "scales":
            curvature = self._factored(name)
            rounded = solve(self._target(weight, curvature), curvature, element_scales(made, scheme))
        signal = _energy(self.moments.withheld.rows @ weight.T)
        if not signal:
            return Rounded(kept, _magnitudes(nearest), "nearest")
        missed = self._missed(weight)
        error, error_of_nearest = (self._error(one - weight, missed) / signal for one in (rounded, kept))
        better = error < error_of_nearest
        return Rounded(
            rounded if better else kept,
            _magnitudes(made if better else nearest),
            self.method if better else "nearest",
            math.sqrt(min(error, error_of_nearest)),
            math.sqrt(error_of_nearest),
        )

    def _missed(self, weight: torch.Tensor) -> torch.Tensor | None:
        """Returns what the linears before have left for this one to make up for: the withheld [tokens, out]."""
        held = self.moments.withheld
        if self.method != "qep" or held.shift is None:
            return None
        outputs = held.shift @ weight.T
        return outputs if held.residual is None else outputs.add_(held.residual)

    def _error(self, difference: torch.Tensor, missed: torch.Tensor | None) -> float:
        """Returns the sum of squared errors of the withheld outputs, given that of the matrix [out, in]."""
        outputs = self.moments.withheld.rows @ difference.T
        return _energy(outputs if missed is None else outputs.sub_(missed))


def _energy(outputs: torch.Tensor) -> float:
    return float(outputs.square().sum(dtype=torch.float64))


def _magnitudes(made: Fp8Weight) -> torch.Tensor:
    """Returns the amax that gives the scales of a weight."""
    return powers_of_two(made.scale) * E4M3_MAX if made.amax is None else made.amax
