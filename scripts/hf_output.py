"""The weights and scales of an FP8 Hugging Face directory, read with torch and safetensors alone.

It shares no code with mptq, so that engines and mptq can be compared with it: a weight is its float8 values times its scale,
and the shape of the scale determines whether it belongs to a tensor, rows or blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

PROMPTS = ["The capital of France is", "Water boils at", "def fibonacci(n):"]
EVERY = 37
"""Step between the columns that are checked: a prime, so that they cover all blocks and all positions in a block."""
NOISE = 2**-6
"""Relative tolerance: four roundings to BF16, 2^-8 each at most. All engines round results (2e-3 in all); transformers
also rounds the scales of weights and inputs, and their products. The rounding to E4M3 is 3e-2."""
E4M3_MAX = 448.0
SCALES = ("weight_scale", "weight_scale_inv")


def load_config(folder: Path) -> dict[str, Any]:
    """The quantization config of a directory, empty if it is not quantized."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    return config


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, as stored."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def weight(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """Float32 [out, in]: the weight of `module`, dequantized where it is FP8."""
    stored = tensors[f"{module}.weight"]
    if stored.dtype != torch.float8_e4m3fn:
        return stored.float()
    (scale,) = [tensors[f"{module}.{name}"] for name in SCALES if f"{module}.{name}" in tensors]
    return stored.float() * spread(scale, *stored.shape)


def spread(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """A float32 factor for a weight [rows, columns], from scales per tensor, row, 128x128 block or (uint8) MX block of 32."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)
    if scale.numel() == 1 or scale.shape == (rows, 1):
        return scale.float()
    assert scale.shape == (-(-rows // 128), -(-columns // 128)), f"scales {list(scale.shape)} of {rows} x {columns}"
    return scale.float().repeat_interleave(128, dim=0)[:rows].repeat_interleave(128, dim=1)[:, :columns]


def kv_scales(tensors: dict[str, torch.Tensor], layer: int) -> tuple[float, float] | None:
    """The scales of K and V of a layer, under either of their names; None for an output without them."""
    prefix = f"model.layers.{layer}.self_attn."
    for names in (("k_proj.k_scale", "v_proj.v_scale"), ("k_scale", "v_scale")):
        if prefix + names[0] in tensors:
            key, value = (float(tensors[prefix + name]) for name in names)
            return key, value
    return None


@torch.no_grad()
def column_error(
    compute: Callable[[torch.Tensor], torch.Tensor], modules: list[str], tensors: dict[str, torch.Tensor]
) -> float:
    """Relative error of the columns of a linear as computed by `compute`, against those of `modules` in the file.

    The linear is given unit vectors, BF16 [some, in], which every scheme quantizes without an error. It returns columns of the
    weight [some, out] as loaded, with its scales and the input's applied.
    """
    expected = torch.cat([weight(tensors, module) for module in modules])
    units = torch.eye(expected.shape[1], dtype=torch.bfloat16)[::EVERY]
    input_scale = tensors.get(f"{modules[0]}.input_scale")
    # A calibrated input scale is visible where it saturates: an input beyond 448 times the scale is clamped to that.
    largest = 1.0 if input_scale is None else E4M3_MAX * float(input_scale)
    computed = compute(units if input_scale is None else units * (10 * largest))
    columns = expected.t()[::EVERY]
    return float(torch.linalg.vector_norm(computed.float() / largest - columns) / torch.linalg.vector_norm(columns))
