"""Describes how a model is quantized, from its scale tensors, and what mptq recorded about it. Does not import torch.

Scales are named `weight_scale`, `weight_scale_inv` and `input_scale` in Hugging Face models. Megatron checkpoints have
`weight_quantizer._scale` (compressed weights) or `weight_quantizer._amax` (simulated quantization, the weight in its original
dtype), and `input_quantizer._amax`. KV cache scales are `k_scale` and `v_scale`, or `k_bmm_quantizer._amax` and
`v_bmm_quantizer._amax`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mptq.report import manifest
from mptq.types import TensorSpec

_WEIGHT = (".weight_quantizer._scale", ".weight_scale_inv", ".weight_scale")
_SIMULATED = ".weight_quantizer._amax"
_INPUT = (".input_quantizer._amax", ".input_scale")
_CACHE = (".k_scale", ".v_scale", ".k_bmm_quantizer._amax", ".v_bmm_quantizer._amax")
_BLOCKS = (1, 16, 32, 64, 128, 256)
_FIGURES = ("fidelity", "relative_error", "gates", "calibration", "excluded", "warnings")


def scales(specs: Iterable[TensorSpec]) -> dict[str, Any] | None:
    """Counts weights by quantization, static input scales and KV cache scales; None if there are no scales."""
    found = {spec.name: spec for spec in specs}
    weights: dict[str, list[TensorSpec]] = {}
    for name, spec in found.items():
        owner, weight, rest = name.partition(".weight")
        if weight and not rest.startswith("_quantizer") and "_scale" not in rest:
            weights.setdefault(owner, []).append(spec)
    words = Counter(word for name, spec in found.items() if (word := _scheme(name, spec, found, weights)))
    inputs = sum(name.endswith(_INPUT) for name in found)
    caches = sum(name.endswith(_CACHE) for name in found)
    return {"weights": dict(words), "static_inputs": inputs, "cache_scales": caches} if words or inputs or caches else None


def _scheme(name: str, scale: TensorSpec, found: dict[str, TensorSpec], weights: dict[str, list[TensorSpec]]) -> str | None:
    """Describes how the weight of a scale is quantized; None if the tensor is not a weight scale."""
    end = next((end for end in (*_WEIGHT, _SIMULATED) if name.endswith(end)), None)
    if end is None:
        return None
    owner = name.removesuffix(end)
    if end == _SIMULATED and f"{owner}{_WEIGHT[0]}" in found:
        return None
    parts = weights.get(owner)
    if not parts:
        return "scales without a weight"
    # Weights from other tools can have any shape.
    rows, columns = sum(part.shape[-2] if len(part.shape) > 1 else 1 for part in parts), (1, *parts[0].shape)[-1]
    simulated = ", simulated" if end == _SIMULATED else ""
    return f"{parts[0].dtype}{simulated}, {_grid(scale, rows, columns)}"


def _grid(scale: TensorSpec, rows: int, columns: int) -> str:
    """Describes the granularity of a scale tensor."""
    if scale.numel == 1:
        return "one scale a tensor"
    shape = scale.shape if len(scale.shape) > 1 else (*scale.shape, 1)
    high, wide = _block(rows, shape[-2]), _block(columns, shape[-1])
    kind = "E8M0 scales" if scale.dtype in ("uint8", "float8_e8m0fnu") else f"{scale.dtype} scales"
    return f"one scale a row ({scale.dtype})" if (high, wide) == (1, columns) else f"blocks of {high}x{wide}, {kind}"


def _block(size: int, count: int) -> int:
    """Returns the block size with which `count` blocks cover `size`."""
    if count <= 1:
        return size
    return next((block for block in _BLOCKS if -(-size // block) == count), -(-size // count))


def output_facts(root: Path) -> dict[str, Any]:
    """Returns recipe, source, files and fidelity figures from the manifest and report of the mptq output at `root`.

    Raises OutputError for a manifest or report that this version cannot read.
    """
    from mptq import report  # needed only for outputs of mptq

    made = manifest.read_manifest(root)
    facts: dict[str, Any] = {key: made[key] for key in ("mptq", "recipe", "source", "formats", "dialect", "files")}
    document = report.read(root)
    return facts | {key: document[key] for key in _FIGURES}
