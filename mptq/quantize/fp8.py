"""FP8 arithmetic in plain torch and float32: dequantization, and checks of scales and values.

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
"""Smallest scale of anything that is not all zeros: 1.8e-12.

Kernels divide by scales, their products and their ratios, and one (the SM90 mixture of experts of SGLang's DeepGEMM)
treats a block with a scale below 1e-12 as pruned and zeroes it. With this floor, reciprocals, products and ratios of
two scales are normal float32 numbers. The floor is exact in bfloat16 and E8M0, and so is the smallest value it
represents, 2 ** -48. It only affects blocks whose amax is below 448 * 2 ** -39 (8.1e-10): the error of their values is
at most 2 ** -49 (1.8e-15) or 2 ** -4 of the value, whichever is larger. Nonzero float16 values (2 ** -24 and above) are
never affected.
"""
LARGEST_CODE = 0x7E
"""The bits of 448, without the sign."""


def floored(amax: torch.Tensor) -> torch.Tensor:
    """Returns the float32 amax that scales are computed from: at least 448 * SCALE_FLOOR, or 448 (scale 1) for 0."""
    return torch.where(amax == 0, E4M3_MAX, amax.clamp(min=E4M3_MAX * SCALE_FLOOR))


def fitted(amax: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Returns the float32 amax that a scheme scales for: `floored`, or 448 times the smallest power of two that fits it.

    With such scales nothing saturates, and Blackwell's loaders, which round the scales of blocks up to powers of two and
    quantize the weights again (vLLM's `requant_weight_ue8m0_inplace`), find what they want.
    """
    found = floored(amax)
    return powers_of_two(mx.scale(found)) * E4M3_MAX if scheme.powers else found


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """The scale of each magnitude: amax / 448, rounded once.

    The divisor is a tensor because CUDA replaces division by a Python number with a product with its rounded reciprocal.
    """
    return amax / torch.full_like(amax, E4M3_MAX)


def strips(weight: Fp8Weight, scheme: Scheme) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Yields row ranges of the weight, with their dequantized float32 values and their scales, which broadcast to them.

    The scale of the weight is [], [rows, 1], a ceil-divided grid of blocks, or E8M0 bytes [rows, columns / 32].
    """
    rows, columns = weight.data.shape
    for start in range(0, rows, STRIP_ROWS):
        part = slice(start, min(start + STRIP_ROWS, rows))
        scale = spread(weight.scale, scheme, part, columns)
        yield part, weight.data[part].float().mul_(scale), scale


def spread(scale: torch.Tensor, scheme: Scheme, rows: slice, columns: int) -> torch.Tensor:
    """Returns the float32 scales of `rows`, which broadcast over them: [], or [1 or number of rows, 1 or columns]."""
    if scheme.shared:  # some formats repeat it for every row
        return scale[rows] if scale.dim() else scale
    height, width = scheme.cell
    cells = scale[rows.start // height : -(-rows.stop // height)]
    cells = powers_of_two(cells) if scheme.exponents else cells
    if width:
        cells = cells.repeat_interleave(width, dim=1)[:, :columns]
    return cells if len(cells) == 1 else cells.repeat_interleave(height, dim=0)[: rows.stop - rows.start]


def element_scales(weight: Fp8Weight, scheme: Scheme) -> torch.Tensor:
    """Returns the float32 scale of each element [out, in]."""
    rows, columns = weight.data.shape
    return spread(weight.scale, scheme, slice(0, rows), columns).expand(rows, columns).contiguous()


def powers_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Decodes E8M0 bytes to float32, 2 ** (byte - 127) (OCP Microscaling Formats specification 1.0, section 5.4.1)."""
    return torch.exp2(scale.float() - 127)


def dequantize(weight: Fp8Weight, scheme: Scheme, out: torch.Tensor | None = None) -> torch.Tensor:
    """Returns `data * scale` [out, in], computed in float32 and, with `out`, rounded once to its dtype."""
    if out is None:
        out = torch.empty(weight.data.shape, dtype=torch.float32, device=weight.data.device)
    for rows, values, _ in strips(weight, scheme):
        out[rows] = values
    return out


def encoded(values: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> Fp8Weight:
    """Returns the weight with that `scale` whose `dequantize`d numbers, rounded to a 16-bit dtype, are `values`."""
    made = Fp8Weight(torch.empty(values.shape, dtype=torch.float8_e4m3fn, device=values.device), scale)
    for start in range(0, len(values), STRIP_ROWS):
        part = slice(start, min(start + STRIP_ROWS, len(values)))
        made.data[part] = (values[part].float() / spread(scale, scheme, part, values.shape[1])).to(torch.float8_e4m3fn)
    return made


def reference_scale(weight: torch.Tensor, scheme: Scheme, multiple: torch.Tensor | float = 1.0) -> torch.Tensor:
    """Returns the scale that `weight` [out, in] must have: float32 `floored` amax / 448 per block, row or tensor.

    `multiple`, float32 [], is how much larger the amax is for which a search chose to scale. For MX, the E8M0 byte of the
    smallest power of two that is at least amax / 448 (see mx.scale).
    """
    weight = weight.float()
    if scheme.exponents:
        return mx.scales(weight)
    height, width = (size or whole for size, whole in zip(scheme.cell, weight.shape, strict=True))
    right, below = -weight.shape[1] % width, -weight.shape[0] % height
    cells = torch.nn.functional.pad(weight, (0, right, 0, below)).unflatten(1, (-1, width)).unflatten(0, (-1, height))
    amax = torch.linalg.vector_norm(cells, math.inf, dim=(1, 3)).reshape(scheme.grid(*weight.shape))
    return scale_of(fitted(amax * multiple, scheme))


def first_out_of_bound(source: torch.Tensor, weight: Fp8Weight, scheme: Scheme) -> tuple[int, int] | None:
    """Returns row and column of the first element whose error exceeds E4M3 rounding of `source`, or None.

    The bound is half a unit in the last place: 2^-4 of a normal value, and 2^-10 of the scale below the smallest normal
    number, 2^-6. The slack of 2^-20 covers the float32 division and product. Larger values than 448 times the scale, which
    a search for the scale may leave, must have that value.
    """
    for rows, values, scale in strips(weight, scheme):
        limit = E4M3_MAX * scale
        original = source[rows].float().clamp(-limit, limit)
        allowed = torch.maximum(original.abs() * 2.0**-4, scale * 2.0**-10) * (1 + 2.0**-20)
        bad = ~((values - original).abs() <= allowed)  # true for NaN too
        if bad.any():
            row, column = torch.nonzero(bad)[0].tolist()
            return rows.start + row, column
    return None
