"""How a recipe's weights are spelled in a Hugging Face checkpoint, so that engines load them. No torch.

Forms: vLLM, SGLang, TensorRT-LLM and transformers all read both of these; docs/formats.md has the details.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Dialect:
    """Name of the scale tensor beside `weight`, its shape for a weight [out, in], and the quantization config."""

    scale_name: str
    scale_shape: Callable[[int, int], tuple[int, ...]]
    config: Callable[[Sequence[str]], dict[str, Any]]


def _deepseek(excluded: Sequence[str]) -> dict[str, Any]:
    return {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": list(excluded),
    }


def _compressed_tensors(excluded: Sequence[str]) -> dict[str, Any]:
    eight_bits = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": list(excluded),
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": eight_bits | {"strategy": "channel", "dynamic": False},
                "input_activations": eight_bits | {"strategy": "token", "dynamic": True},
                "output_activations": None,
            }
        },
    }


DIALECTS = {
    "deepseek-fp8": Dialect("weight_scale_inv", lambda rows, columns: (-(-rows // 128), -(-columns // 128)), _deepseek),
    # Engines read one scale a row everywhere, and one a tensor not everywhere: a scalar is repeated for every row.
    "compressed-tensors": Dialect("weight_scale", lambda rows, _columns: (rows, 1), _compressed_tensors),
}
