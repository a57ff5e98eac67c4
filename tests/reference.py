"""FP8 quantization in a few lines that share nothing with mptq: what the outputs must equal bit for bit."""

import torch


def block(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, scales) of a float32 matrix in 128x128 blocks: one block at a time."""
    rows, columns = weight.shape
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // 128), -(-columns // 128))
    for i in range(0, rows, 128):
        for j in range(0, columns, 128):
            tile = weight[i : i + 128, j : j + 128]
            scale = tile.abs().max() / 448
            scale = scale if scale > 0 else torch.tensor(1.0)
            scales[i // 128, j // 128] = scale
            data[i : i + 128, j : j + 128] = (tile / scale).to(torch.float8_e4m3fn)
    return data.view(torch.uint8), scales


def row(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, scales [rows, 1]) of a float32 matrix with one scale a row: one row at a time."""
    pairs = [tensor(line[None]) for line in weight]
    return torch.cat([data for data, _ in pairs]), torch.stack([scale for _, scale in pairs])[:, None]


def tensor(weight: torch.Tensor, amax: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes, scale) of a float32 matrix with one scale, of `amax` (a fused group's) or its own."""
    amax = weight.abs().max() if amax is None else amax
    scale = amax / 448 if amax / 448 > 0 else torch.tensor(1.0)
    return (weight / scale).to(torch.float8_e4m3fn).view(torch.uint8), scale
