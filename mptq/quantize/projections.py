"""Converts between Megatron's fused matrices and the quantized projections that Hugging Face stores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from mptq.quantize import quantizer
from mptq.types import Fp8Weight, WeightError

if TYPE_CHECKING:
    from mptq.model.fused import Fusion
    from mptq.model.tensors import LinearSpec
    from mptq.recipes.schemes import Scheme

Quantized = Sequence[tuple[Fp8Weight, WeightError | None]]
"""Weights and their errors; the errors are None except on the rank that quantized them."""


def member_pieces(source: torch.Tensor, linear: LinearSpec, scheme: Scheme) -> list[list[torch.Tensor]]:
    """Returns the rows of each projection of `linear`, whose fused matrix is `source`: as views, or copied."""
    if quantizer.in_place(linear.fusion, scheme, source):
        return linear.fusion.runs(source)
    return [[part] for part in linear.fusion.split(source)]


def quantized_members(
    pieces: Sequence[Sequence[torch.Tensor]], linear: LinearSpec, scheme: Scheme, name: str, amax: torch.Tensor | None = None
) -> list[tuple[Fp8Weight, WeightError]]:
    """Quantizes the projections of `linear`, whose rows are `pieces`; returns weights and errors.

    Blocks and rows are those of the projections. With one scale per tensor, all projections that engines fuse share it,
    and `amax`, float32 [], is their largest magnitude. Raises CheckpointError with `name` for a weight that is not
    finite.
    """
    assert (amax is not None) == scheme.shared, "`amax` is required for one scale per tensor, and only then"
    named = zip(pieces, linear.members, strict=True)
    return [quantizer.quantize(rows, scheme, f"{name} ({member})", amax) for rows, (member, _) in named]


def fused_members(members: Quantized, fusion: Fusion, scheme: Scheme) -> tuple[Fp8Weight, WeightError | None]:
    """Merges `members` into the fused matrix, with the same numbers and their error. No cell may span two members."""
    if fusion.plain:
        return members[0]
    weights, errors = [weight for weight, _ in members], [error for _, error in members if error is not None]
    data = fusion.merge([weight.data.view(torch.uint8) for weight in weights]).view(torch.float8_e4m3fn)
    counts = [weight.data.numel() for weight in weights]
    error = _joined(errors, counts) if len(errors) == len(counts) else None
    if scheme.shared:
        return Fp8Weight(data, weights[0].scale, weights[0].amax), error
    grid = fusion.coarsen(scheme.block) if scheme.block else fusion
    amax = [weight.amax for weight in weights if weight.amax is not None]
    return Fp8Weight(data, grid.merge([weight.scale for weight in weights]), grid.merge(amax) if amax else None), error


def _joined(errors: Sequence[WeightError], counts: Sequence[int]) -> WeightError:
    """Combines the errors of the parts of a matrix, which have `counts` elements."""
    signal = math.fsum(error.norm**2 for error in errors)
    noise = math.fsum((error.relative * error.norm) ** 2 for error in errors)
    ratio = noise / signal if signal else 0.0

    def share(shares: Sequence[float]) -> float:
        return math.sumprod(shares, counts) / sum(counts)

    return WeightError(
        relative=math.sqrt(ratio),
        sqnr_db=-10 * math.log10(ratio) if ratio else None,
        max_abs=max(error.max_abs for error in errors),
        norm=math.sqrt(signal),
        amax=max(error.amax for error in errors),
        scale_min=min(error.scale_min for error in errors),
        scale_max=max(error.scale_max for error in errors),
        zeros=share([error.zeros for error in errors]),
        saturated=share([error.saturated for error in errors]),
    )
