"""Reads the headers of safetensors files. Does not import torch.

Source: https://github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

from pathlib import Path

from mptq.errors import CheckpointError
from mptq.types import DTYPE_BYTES, TensorSpec

_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_headers(path: Path) -> dict[str, TensorSpec]:
    """Returns the specs of all tensors in the safetensors files of a directory, read from their headers.

    Raises CheckpointError for an invalid safetensors file or an unknown dtype.
    """
    from safetensors import SafetensorError, safe_open

    specs: dict[str, TensorSpec] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    piece = tensors.get_slice(name)
                    dtype = _SAFETENSORS_DTYPES.get(piece.get_dtype())
                    if dtype not in DTYPE_BYTES:
                        raise CheckpointError(f"{file}: {name} has the unknown dtype {piece.get_dtype()}")
                    specs[name] = TensorSpec(name, dtype, tuple(piece.get_shape()))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is not a valid safetensors file: {error}") from error
    return specs
