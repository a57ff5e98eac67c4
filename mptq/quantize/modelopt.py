"""Real quantization of one linear through NVIDIA ModelOpt: `mtq.quantize`, then `mtq.compress`. The only importer of it.

Each linear is converted alone and in place, so that only one of them is in float32 at a time. ModelOpt computes amax and
scale in the dtype of the weight, hence the float32 weight.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator
from typing import Any

import torch

from mptq.arch.layer import Linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import remove_per_module_state
    from modelopt.torch.quantization.nn import QuantModuleRegistry
    from modelopt.torch.quantization.nn.modules.quant_linear import _QuantLinear
    from modelopt.torch.quantization.plugins.megatron import quant_module_get_extra_state
    from modelopt.torch.utils.serialization import safe_save

from mptq.quantize.fp8 import E4M3_MAX, require_finite
from mptq.recipe import Recipe
from mptq.types import Fp8Weight

# ModelOpt matches subclasses only while they keep the forward of their base.
QuantModuleRegistry.register({Linear: "mptq.Linear"})(_QuantLinear)


def quant_config(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a ModelOpt quantization config: weights only, the output layer left alone."""
    weight: dict[str, Any] = {"num_bits": (4, 3), "axis": 0 if recipe.weights.scale == "row" else None}
    if recipe.block is not None:
        weight["block_sizes"] = {-1: recipe.block, -2: recipe.block}
    return {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "cfg": weight},
            {"quantizer_name": "*output_layer*", "enable": False},
        ],
        "algorithm": "max",
    }


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints to stdout, which belongs to results, and warns that compression is experimental."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _convert(linear: Any, recipe: Recipe, name: str) -> torch.nn.ModuleDict:
    """Quantize and compress `linear` in place; return the holder, which has ModelOpt's record of the conversion."""
    holder = torch.nn.ModuleDict({"linear": linear})
    source = linear.weight.detach()
    assert source.dtype == torch.float32, f"{name} must be cast to float32 first, not {source.dtype}"
    require_finite(source, name)
    with _quiet():
        mtq.quantize(holder, quant_config(recipe))
        # An all-zero block (or one so small that its scale is) has no scale of its own: 448 / 448 = 1 instead of 0 / 0.
        amax = linear.weight_quantizer._amax
        empty = amax / E4M3_MAX == 0
        amax.masked_fill_(empty, E4M3_MAX)
        mtq.compress(holder)
    if empty.numel() == 1 and empty.all():
        # ModelOpt computes the amax of a single block again, whatever it has been given.
        linear.weight_quantizer._scale.fill_(1.0)
        linear.weight.data.copy_(source)
    return holder


def compress_linear(linear: Any, weight: torch.Tensor, recipe: Recipe, name: str) -> Fp8Weight:
    """Give `linear` the float32 `weight` [out, in], quantize it for good and freeze it; return what it now holds.

    `linear` is a torch.nn.Linear, which ModelOpt turns into a class of its own; it computes in the dtype it was built with,
    dequantizing as ModelOpt does. Raises CheckpointError naming `name` for a weight that is not finite. Peak memory: four
    times the float32 weight, in ModelOpt.
    """
    dtype = linear.weight.dtype
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    _convert(linear, recipe, name)
    # What the linear dequantizes to is its own business: the scales stay float32.
    linear.weight.metadata["dtype"] = dtype
    for parameter in linear.parameters():
        parameter.requires_grad_(False)
    # ModelOpt gives a weight of a single row a scale without dimensions.
    return Fp8Weight(linear.weight.data, linear.weight_quantizer._scale.reshape(recipe.grid(*weight.shape)))


def quantize_weight(weight: torch.Tensor, recipe: Recipe, name: str) -> Fp8Weight:
    """Quantize a float32 weight [out, in] that is no linear of the layer, such as one projection of a fused one."""
    with torch.device("meta"):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    return compress_linear(linear, weight, recipe, name)


def megatron_state(linear: Any) -> tuple[dict[str, torch.Tensor], bytes]:
    """What a compressed linear adds to a Megatron checkpoint: quantizer tensors by name, and its `_extra_state`.

    Shapes and the encoding are those of modelopt/torch/quantization/plugins/megatron.py and opt/plugins/megatron.py:
    amax of blocks without its unit axes, of rows as [rows, 1], a single one as [1], and the state as torch.save of a list of
    one byte tensor.
    """
    quantizer = linear.weight_quantizer
    amax = quantizer._amax
    if amax.dim() == 4:
        amax = amax.squeeze(1).squeeze(-1)
    else:
        amax = amax.reshape(-1) if amax.numel() == 1 else amax.reshape(linear.weight.shape[0], -1)
    tensors = {"weight_quantizer._amax": amax, "weight_quantizer._scale": quantizer._scale}
    # megatron-core stores the objects of a key as a list.
    return tensors, _saved([_as_bytes(quant_module_get_extra_state(linear))])


def _as_bytes(state: dict[str, Any]) -> torch.Tensor:
    return torch.frombuffer(bytearray(_saved(state)), dtype=torch.uint8)


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    safe_save(_ordered(state), buffer)
    return buffer.getvalue()


def _ordered(state: Any) -> Any:
    """The same state, its dicts ordered by key: ModelOpt fills them from a set, in an order of the process's own."""
    if isinstance(state, dict):
        return {key: _ordered(state[key]) for key in sorted(state, key=str)}
    if isinstance(state, list | tuple) and not isinstance(state, torch.Size):
        return type(state)(_ordered(item) for item in state)
    return state


def modelopt_state(recipe: Recipe) -> bytes:
    """The whole model's `modelopt_state`, as `restore_sharded_modelopt_state` reads it from common.pt.

    It holds the modes and their configs; what belongs to a module is in that module's `_extra_state`.
    """
    with torch.device("cpu"):
        linear = torch.nn.Linear(2, 2, bias=False)
    state = mto.modelopt_state(_convert(linear, recipe, "modelopt_state"))
    remove_per_module_state(state)
    return _saved(state)
