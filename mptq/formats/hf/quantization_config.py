"""How Hugging Face checkpoints name and describe quantized weights. Does not import torch.

See docs/formats.md for details and the engines that load each dialect.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from mptq.recipes.schemes import Scheme
from mptq.types import TensorSpec


@dataclass(frozen=True, slots=True)
class Contents:
    """Contents of an output: modules by scheme, unquantized modules, and whether the KV cache has scales."""

    groups: Mapping[Scheme, Sequence[str]]
    excluded: Sequence[str]
    kv_cache: bool = False


@dataclass(frozen=True, slots=True)
class Dialect:
    """Names and shapes of the scales, and the configs, of one quantization format.

    `kv` are the names of the K and V scales within a layer; `scalar` is the shape in which a scalar is stored.
    """

    scale_name: str
    kv: tuple[str, str]
    scalar: tuple[int, ...]
    config: Callable[[Contents], dict[str, Any] | None]
    files: Callable[[Contents], dict[str, Any]] = lambda _: {}

    def scale(self, module: str, scheme: Scheme, rows: int, columns: int) -> TensorSpec:
        """The scale tensor of a weight [rows, columns]."""
        shape = scheme.grid(rows, columns) or self.scalar
        if scheme.shared and not scheme.static:
            # All engines support one scale per row, but not all support one per tensor: repeat it for every row.
            shape = (rows, 1)
        return TensorSpec(f"{module}.{self.scale_name}", scheme.scale_dtype, shape)

    def input_scale(self, module: str) -> TensorSpec:
        """The static input scale of a linear."""
        return TensorSpec(f"{module}.input_scale", "float32", self.scalar)

    def kv_scales(self, layer: str) -> tuple[TensorSpec, TensorSpec]:
        """The K and V scales of a layer; `layer` is the prefix of its tensor names."""
        key, value = (TensorSpec(layer + name, "float32", self.scalar) for name in self.kv)
        return key, value


def _deepseek(contents: Contents) -> dict[str, Any]:
    (scheme,) = contents.groups
    config = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        **scheme.forms["deepseek-fp8"],
        "modules_to_not_convert": list(contents.excluded),
    }
    return config | ({"kv_cache_quant_algo": "FP8"} if contents.kv_cache else {})


_EIGHT_BITS = {"num_bits": 8, "type": "float", "symmetric": True}


def _compressed_tensors(contents: Contents) -> dict[str, Any]:
    groups = {}
    for number, (scheme, modules) in enumerate(contents.groups.items()):
        form = scheme.forms["compressed-tensors"]
        groups[f"group_{number}"] = {
            # "Linear" matches every linear, so multiple groups must list their modules.
            "targets": ["Linear"] if len(contents.groups) == 1 else list(modules),
            "weights": _EIGHT_BITS | form["weights"],
            "input_activations": _EIGHT_BITS | form["input_activations"],
            "output_activations": None,
        }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "ignore": list(contents.excluded),
        "kv_cache_scheme": _EIGHT_BITS | {"strategy": "tensor", "dynamic": False} if contents.kv_cache else None,
        "config_groups": groups,
    }


def _modelopt_form(contents: Contents) -> tuple[Scheme, str, dict[str, Any]]:
    """The scheme, ModelOpt's name for its algorithm, and its block size, if any."""
    (scheme,) = contents.groups
    sizes = dict(scheme.forms["modelopt"])
    return scheme, sizes.pop("quant_algo"), sizes


def _modelopt(contents: Contents) -> dict[str, Any]:
    scheme, algorithm, sizes = _modelopt_form(contents)
    eight_bits = {"num_bits": 8, "type": "float", "dynamic": False} | sizes
    inputs = eight_bits | {"dynamic": not scheme.static}
    config = {
        "quant_method": "modelopt",
        "quant_algo": algorithm,
        "ignore": list(contents.excluded),
        "producer": {"name": "modelopt", "version": version("nvidia-modelopt")},
        "config_groups": {"group_0": {"weights": eight_bits, "input_activations": inputs, "targets": ["Linear"]}},
    } | sizes
    return config | ({"kv_cache_scheme": {"num_bits": 8, "type": "float", "dynamic": False}} if contents.kv_cache else {})


def _modelopt_files(contents: Contents) -> dict[str, Any]:
    """TensorRT-LLM prefers this file to config.json; both have the same content."""
    _, algorithm, sizes = _modelopt_form(contents)
    quantization = {
        "quant_algo": algorithm,
        "kv_cache_quant_algo": "FP8" if contents.kv_cache else None,
        "exclude_modules": list(contents.excluded),
    } | sizes
    producer = {"name": "modelopt", "version": version("nvidia-modelopt")}
    return {"hf_quant_config.json": {"producer": producer, "quantization": quantization}}


_OF_PROJECTIONS = ("self_attn.k_proj.k_scale", "self_attn.v_proj.v_scale")
DIALECTS = {
    "deepseek-fp8": Dialect("weight_scale_inv", _OF_PROJECTIONS, (), _deepseek),
    "compressed-tensors": Dialect("weight_scale", ("self_attn.k_scale", "self_attn.v_scale"), (1,), _compressed_tensors),
    "modelopt": Dialect("weight_scale", _OF_PROJECTIONS, (), _modelopt, _modelopt_files),
    "plain": Dialect("", ("", ""), (), lambda _: None),
}
