"""FP8 arithmetic in plain torch, float32 throughout: what a quantized weight means, and how far it is from its source.

Format: E4M3 (OCP 8-bit floating point specification, "fn": no infinities, largest value 448, 3 mantissa bits).
Dequantized = data * scale, scale = amax / 448.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mptq.errors import CheckpointError
from mptq.recipe import Recipe
from mptq.types import Fp8Weight, WeightError

E4M3_MAX = 448.0
STRIP_ROWS = 128
"""Rows handled at once, a multiple of every block: small enough for temporaries to stay in cache, however tall the matrix."""


def strips(weight: Fp8Weight, block: int | None) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Row ranges of the weight, each with its float32 dequantized values and the scale of every element, to broadcast.

    The scale of the weight is [], [rows, 1] or a ceil-divided grid of blocks.
    """
    rows, columns = weight.data.shape
    for start in range(0, rows, STRIP_ROWS):
        part = slice(start, min(start + STRIP_ROWS, rows))
        scale = weight.scale
        if block is not None:
            assert block == STRIP_ROWS
            scale = scale[start // block].repeat_interleave(block)[:columns]
        elif scale.dim():
            scale = scale[part]
        yield part, weight.data[part].float().mul_(scale), scale


def dequantize(weight: Fp8Weight, block: int | None) -> torch.Tensor:
    """`data * scale` in float32, [out, in]."""
    out = torch.empty(weight.data.shape, dtype=torch.float32, device=weight.data.device)
    for rows, values, _ in strips(weight, block):
        out[rows] = values
    return out


def weight_error(source: torch.Tensor, weight: Fp8Weight, block: int | None) -> WeightError:
    """Measure `weight` against `source` [out, in] of any float dtype. Peak memory: a few strips of 128 rows."""
    noise, signal, worst, amax = 0.0, 0.0, 0.0, 0.0
    for rows, values, _ in strips(weight, block):
        original = source[rows].float()
        amax = max(amax, _largest(original))
        signal += float(torch.linalg.vector_norm(original)) ** 2
        difference = values.sub_(original)
        worst = max(worst, _largest(difference))
        noise += float(torch.linalg.vector_norm(difference)) ** 2
    ratio = noise / signal if signal else 0.0
    return WeightError(math.sqrt(ratio), -10 * math.log10(ratio) if ratio else None, worst, math.sqrt(signal), amax)


def _largest(tensor: torch.Tensor) -> float:
    low, high = torch.aminmax(tensor)
    return max(-float(low), float(high))


def require_finite(weight: torch.Tensor, name: str) -> None:
    """Raise CheckpointError naming `name` and the first place when `weight` holds NaN or infinity. No temporaries."""
    low, high = torch.aminmax(weight)
    if not (torch.isfinite(low) and torch.isfinite(high)):
        bad = torch.nonzero(~torch.isfinite(weight))
        raise CheckpointError(
            f"{name} {list(weight.shape)} has {len(bad)} values that are NaN or infinite, the first at {bad[0].tolist()}"
        )


def reference_scale(weight: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """The float32 scale that `weight` [out, in] must have: amax / 448 of each block or row, or of all, 1 where that is 0."""
    weight = weight.float()
    block = recipe.block
    if recipe.weights.scale == "row":
        amax = torch.linalg.vector_norm(weight, math.inf, dim=1, keepdim=True)
    elif block is None:
        amax = torch.linalg.vector_norm(weight, math.inf)
    else:
        rows = []
        for strip in weight.split(block):
            columns = torch.nn.functional.pad(strip, (0, -strip.shape[1] % block)).unflatten(1, (-1, block))
            rows.append(torch.linalg.vector_norm(columns, math.inf, dim=(0, 2)))
        amax = torch.stack(rows)
    scale = amax / E4M3_MAX
    return torch.where(scale == 0, 1.0, scale)


def first_out_of_bound(source: torch.Tensor, weight: Fp8Weight, block: int | None) -> tuple[int, int] | None:
    """Row and column of the first element further from `source` than rounding to E4M3 explains, or None.

    Half a unit in the last place: 2^-4 of a normal value, 2^-10 of the scale below the smallest normal one, 2^-6. The
    slack of 2^-20 is for the float32 division and product.
    """
    for rows, values, scale in strips(weight, block):
        original = source[rows].float()
        allowed = torch.maximum(original.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)
        bad = ~((values - original).abs() <= allowed)  # NaN is out of bound
        if bad.any():
            row, column = torch.nonzero(bad)[0].tolist()
            return rows.start + row, column
    return None
