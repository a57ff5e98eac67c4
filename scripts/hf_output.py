"""What an FP8 Hugging Face directory says its weights are, read with torch and safetensors alone.

It shares nothing with mptq, so that engines and mptq can be compared with it: a weight is its float8 values times its scale,
and the shape of the scale says what it belongs to.
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
"""Of the columns of a weight, which are looked at: a prime, so that they are in all blocks and at all places in a block."""
NOISE = 2**-6
"""Relative: four roundings to BF16, 2^-8 each at most. All engines round results (2e-3 in all), transformers the scales of
weights and inputs too, and their products. E4M3 is at 3e-2."""
E4M3_MAX = 448.0
SCALES = ("weight_scale", "weight_scale_inv")


def load_config(folder: Path) -> dict[str, Any]:
    """The quantization config of a directory, empty for one that is not quantized."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text()).get("quantization_config", {})
    return config


def load_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory, as they are stored."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def weight(tensors: dict[str, torch.Tensor], module: str) -> torch.Tensor:
    """Float32 [out, in]: the weight of `module`, dequantized where it is FP8."""
    stored = tensors[f"{module}.weight"]
    if stored.dtype != torch.float8_e4m3fn:
        return stored.float()
    (scale,) = [tensors[f"{module}.{name}"] for name in SCALES if f"{module}.{name}" in tensors]
    return stored.float() * spread(scale, *stored.shape)


def spread(scale: torch.Tensor, rows: int, columns: int) -> torch.Tensor:
    """Float32, to multiply a weight [rows, columns] with: of a tensor, rows, blocks of 128 or (bytes) MX blocks of 32."""
    if scale.dtype == torch.uint8:
        return torch.exp2(scale.float() - 127).repeat_interleave(32, dim=1)
    if scale.numel() == 1 or scale.shape == (rows, 1):
        return scale.float()
    assert scale.shape == (-(-rows // 128), -(-columns // 128)), f"scales {list(scale.shape)} of {rows} x {columns}"
    return scale.float().repeat_interleave(128, dim=0)[:rows].repeat_interleave(128, dim=1)[:, :columns]


def kv_scales(tensors: dict[str, torch.Tensor], layer: int) -> tuple[float, float] | None:
    """The scales of K and V of a layer, by either of their names; None for an output without them."""
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
    """How far the columns of a linear that `compute` has loaded are from those of `modules` in the file, relative to these.

    The linear is given unit vectors, BF16 [some, in], which engines quantize without an error whatever their scheme: it
    returns columns of the weight [some, out] as it understands the weight, its scales and the input's included.
    """
    expected = torch.cat([weight(tensors, module) for module in modules])
    units = torch.eye(expected.shape[1], dtype=torch.bfloat16)[::EVERY]
    input_scale = tensors.get(f"{modules[0]}.input_scale")
    # A calibrated scale shows in what it cuts off: an input beyond 448 times the scale becomes that.
    largest = 1.0 if input_scale is None else E4M3_MAX * float(input_scale)
    computed = compute(units if input_scale is None else units * (10 * largest))
    columns = expected.t()[::EVERY]
    return float(torch.linalg.vector_norm(computed.float() / largest - columns) / torch.linalg.vector_norm(columns))
