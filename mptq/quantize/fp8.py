"""FP8 arithmetic in plain torch, float32 throughout: what a quantized weight means, and which ones are right.

Format: E4M3 (OCP 8-bit floating point specification, "fn": no infinities, largest value 448, 3 mantissa bits).
Dequantized = data * scale, scale = amax / 448.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from mptq.quantize import mx
from mptq.recipes.schemes import STRIP_ROWS, Scheme
from mptq.types import Fp8Weight

E4M3_MAX = 448.0
SCALE_FLOOR = 2.0**-39
"""The least scale of anything that is not all zeros: 1.8e-12.

Kernels divide by scales, by their products and by their ratios, and one takes less than 1e-12 for a block that was pruned
and clears it (the SM90 mixture of experts of SGLang's DeepGEMM). With this one, reciprocals, products and ratios of two are
normal numbers of float32; it is exact in bfloat16 and E8M0, and so is the least value that it scales, 2 ** -48. It costs only
blocks whose largest magnitude is under 448 * 2 ** -39 (8.1e-10) anything: their values are off by at most 2 ** -49 (1.8e-15)
or 2 ** -4 of themselves, whichever is more. Nothing that float16 holds but zero (2 ** -24 and more) comes to it.
"""
LARGEST_CODE = 0x7E
"""The bits of 448, without the sign."""


def floored(amax: torch.Tensor) -> torch.Tensor:
    """The magnitudes that scales are made for, float32: no less than 448 * SCALE_FLOOR, and 448 (scale 1) for zeros alone."""
    return torch.where(amax == 0, E4M3_MAX, amax.clamp(min=E4M3_MAX * SCALE_FLOOR))


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The scale of each magnitude: amax / 448, rounded once.

    The divisor is a tensor because CUDA replaces division by a Python number with a product with its rounded reciprocal.
    """
    return amax / torch.full_like(amax, E4M3_MAX)


def strips(weight: Fp8Weight, scheme: Scheme) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Row ranges of the weight, each with its float32 dequantized values and the scale of every element, to broadcast.

    The scale of the weight is [], [rows, 1], a ceil-divided grid of blocks, or E8M0 bytes [rows, columns / 32].
    """
    rows, columns = weight.data.shape
    for start in range(0, rows, STRIP_ROWS):
        part = slice(start, min(start + STRIP_ROWS, rows))
        scale = _spread(weight.scale, scheme, part, columns)
        yield part, weight.data[part].float().mul_(scale), scale


def _spread(scale: torch.Tensor, scheme: Scheme, rows: slice, columns: int) -> torch.Tensor:
    """The scales of `rows`, float32, to broadcast over them: [], or those of each row or of all, by 1 or `columns`."""
    if scheme.shared:  # a format may repeat it for every row
        return scale[rows] if scale.dim() else scale
    height, width = scheme.cell
    cells = scale[rows.start // height : -(-rows.stop // height)]
    cells = powers_of_two(cells) if scheme.exponents else cells
    if width:
        cells = cells.repeat_interleave(width, dim=1)[:, :columns]
    return cells if len(cells) == 1 else cells.repeat_interleave(height, dim=0)[: rows.stop - rows.start]


def powers_of_two(scale: torch.Tensor) -> torch.Tensor:
    """The float32 values 2 ** (byte - 127) of E8M0 bytes (OCP Microscaling Formats specification 1.0, section 5.4.1)."""
    return torch.exp2(scale.float() - 127)


def dequantize(weight: Fp8Weight, scheme: Scheme, out: torch.Tensor | None = None) -> torch.Tensor:
    """`data * scale` [out, in], computed in float32, and rounded once to the dtype of `out` where one is given."""
    if out is None:
        out = torch.empty(weight.data.shape, dtype=torch.float32, device=weight.data.device)
    for rows, values, _ in strips(weight, scheme):
        out[rows] = values
    return out


def reference_scale(weight: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """The scale that `weight` [out, in] must have: float32 `floored` amax / 448 of each block or row, or of all.

    For MX the E8M0 byte of the smallest power of two that is no less.
    """
    weight = weight.float()
    if scheme.exponents:
        return mx.scales(weight)
    height, width = (size or whole for size, whole in zip(scheme.cell, weight.shape, strict=True))
    right, below = -weight.shape[1] % width, -weight.shape[0] % height
    cells = torch.nn.functional.pad(weight, (0, right, 0, below)).unflatten(1, (-1, width)).unflatten(0, (-1, height))
    amax = torch.linalg.vector_norm(cells, math.inf, dim=(1, 3)).reshape(scheme.grid(*weight.shape))
    return scale_of(floored(amax))


def first_out_of_bound(source: torch.Tensor, weight: Fp8Weight, scheme: Scheme) -> tuple[int, int] | None:
    """Row and column of the first element further from `source` than rounding to E4M3 explains, or None.

    Half a unit in the last place: 2^-4 of a normal value, 2^-10 of the scale below the smallest normal one, 2^-6. The
    slack of 2^-20 is for the float32 division and product.
    """
    for rows, values, scale in strips(weight, scheme):
        original = source[rows].float()
        allowed = torch.maximum(original.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)
        bad = ~((values - original).abs() <= allowed)  # NaN is out of bound
        if bad.any():
            row, column = torch.nonzero(bad)[0].tolist()
            return rows.start + row, column
    return None
