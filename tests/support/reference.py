"""FP8 quantization in a few lines that share no code with mptq: outputs must equal it bit for bit."""

import bisect
from fractions import Fraction

import torch


def scale_of(amax: torch.Tensor) -> torch.Tensor:
    """amax / 448, but at least 2 ** -39, and 1 for 0."""
    if amax == 0:
        return torch.tensor(1.0)
    return max(amax / 448, torch.tensor(2.0**-39))


def block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, scales) of a float32 matrix in 128x128 blocks, computed one block at a time."""
    rows, columns = weight.shape
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            tile = weight[i : i + 128, j : j + 128]
            scale = scale_of(tile.abs().max())
            scales[i // 128, j // 128] = scale
            data[i : i + 128, j : j + 128] = (tile / scale).to(torch.float8_e4m3fn)
    return data.view(torch.uint8), scales


def row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, scales [rows, 1]) of a float32 matrix with one scale per row, computed one row at a time."""
    pairs = [tensor(line[None]) for line in weight]
    return torch.cat([data for data, _ in pairs]), torch.stack([scale for _, scale in pairs])[:, None]


def tensor(weight: torch.Tensor, amax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, scale) of a float32 matrix with one scale, from `amax` (of a fused group) or its own."""
    amax = weight.abs().max() if amax is None else amax
    scale = scale_of(amax)
    return (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale


def mx(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, E8M0 scales) of a float32 matrix in MXFP8, with exact fractions, one block of 32 and one element at a time."""
    rows, columns = weight.shape
    data = torch.empty(rows, columns, dtype=torch.uint8)
    scales = torch.empty(rows, columns // 32, dtype=torch.uint8)
    values = weight.tolist()
    for i in range(rows):
        for j in range(0, columns, 32):
            block = [Fraction(value) for value in values[i][j : j + 32]]
            amax = max(map(abs, block))
            exponent = -39
            while amax > 448 * Fraction(2) ** exponent:
                exponent += 1
            exponent = exponent if amax else 0
            scales[i, j // 32] = exponent + 127
            for k, value in enumerate(block):
                data[i, j + k] = nearest(value / Fraction(2) ** exponent) | (0x80 if str(values[i][j + k])[0] == "-" else 0)
    return data, scales


def nearest(value: Fraction) -> int:
    """The code of the E4M3 magnitude nearest to |value|; ties go to the even code (OCP 8-bit formats, table 1)."""
    place = bisect.bisect_left(MAGNITUDES, abs(value))
    if place == len(MAGNITUDES) or (place and abs(value) < MAGNITUDES[place]):
        below = place - 1
        above = min(place, len(MAGNITUDES) - 1)
        gap = abs(value) - MAGNITUDES[below], MAGNITUDES[above] - abs(value)
        place = below if gap[0] < gap[1] or (gap[0] == gap[1] and below % 2 == 0) else above
    return place


MAGNITUDES = [
    Fraction(code & 7, 8) * Fraction(2) ** -6 if code < 8 else (1 + Fraction(code & 7, 8)) * Fraction(2) ** ((code >> 3) - 7)
    for code in range(0x7F)
]
"""The value of every E4M3 code without sign, from its bits: 4 for the exponent (bias 7), 3 for the mantissa."""
