"""ModelOpt's quantizer tensors and state of quantized linears, as its restore expects them.

The quantized weights are those of quantizer.py, which match ModelOpt bit for bit
(tests/unit/quantize/test_quantizer.py). The state is what `mtq.quantize` and `mtq.compress` leave in a module, taken
from a small module that has been through both.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from functools import cache
from types import MappingProxyType
from typing import Any

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import remove_per_module_state
    from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
    from modelopt.torch.quantization.plugins.megatron import quant_module_get_extra_state
    from modelopt.torch.quantization.qtensor.base_qtensor import QTensorWrapper
    from modelopt.torch.utils.serialization import safe_save

from mptq.recipes.schemes import Scheme
from mptq.types import Fp8Weight


class _Cache(torch.nn.Module):
    """Stands in for a core attention, in which only the quantizers have state."""


@QuantModuleRegistry.register({_Cache: "mptq.Cache"})
class _QuantCache(QuantModule):  # type: ignore[misc]
    """Has the same quantizers, and so the same state, as ModelOpt's class for Transformer Engine's core attention."""

    def _setup(self) -> None:
        self.q_bmm_quantizer, self.k_bmm_quantizer, self.v_bmm_quantizer = (TensorQuantizer() for _ in range(3))


_E4M3: dict[str, Any] = {"num_bits": (4, 3), "axis": None}


def _rules(scheme: Scheme | None, module: str = "*") -> list[dict[str, Any]]:
    """Returns ModelOpt's rules for the linears whose names match `module`."""
    if scheme is None:
        return [{"quantizer_name": f"{module}{kind}_quantizer", "enable": False} for kind in ("weight", "input")]
    rules: list[dict[str, Any]] = [{"quantizer_name": f"{module}weight_quantizer", "cfg": dict(scheme.modelopt)}]
    if scheme.static:
        rules.append({"quantizer_name": f"{module}input_quantizer", "cfg": _E4M3})
    return rules


def quant_config(
    scheme: Scheme | None, kv_cache: bool = False, others: Mapping[str, Scheme | None] = MappingProxyType({})
) -> dict[str, Any]:
    """Returns a ModelOpt quant config: `scheme` for all linears but `others` (by module) and the output layer."""
    rules = [{"quantizer_name": "*", "enable": False}, *_rules(scheme)]
    for module, other in others.items():
        rules += _rules(None, f"*{module}.") + (_rules(other, f"*{module}.") if other else [])
    if kv_cache:
        rules.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _E4M3})
    rules.append({"quantizer_name": "*output_layer*", "enable": False})
    return {"quant_cfg": rules, "algorithm": "max" if scheme is None or not scheme.exponents else None}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences ModelOpt, which prints to stdout (reserved for results) and warns that compression is experimental."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _convert(module: torch.nn.Module, config: dict[str, Any]) -> torch.nn.ModuleDict:
    """Quantizes and compresses `module` in place; returns its parent, which has ModelOpt's record of the conversion."""
    holder = torch.nn.ModuleDict({"linear": module})
    with _quiet():
        mtq.quantize(holder, config)
        mtq.compress(holder)
    return holder


def _linear(rows: int = 2, columns: int = 32) -> torch.nn.Linear:
    """Returns a linear with a weight [rows, columns] of ones: a random one would advance the host's generator."""
    linear: torch.nn.Linear = torch.nn.utils.skip_init(torch.nn.Linear, columns, rows, bias=False).requires_grad_(False)
    linear.weight.fill_(1)
    return linear


@cache
def _example(scheme: Scheme | None, rows: int = 2, columns: int = 32) -> Any:
    """Returns a linear that ModelOpt has quantized and compressed, or left alone if `scheme` is None."""
    linear = _linear(rows, columns)
    _convert(linear, quant_config(scheme))
    return linear


def linear_state(
    scheme: Scheme, weight: Fp8Weight, dtype: torch.dtype, input_amax: torch.Tensor | None = None
) -> tuple[dict[str, torch.Tensor], bytes]:
    """Returns what a Megatron checkpoint stores of a linear besides `weight`: quantizer tensors, and `_extra_state`.

    `dtype` is the dtype that ModelOpt dequantizes to; `input_amax` is the calibrated amax of the input, for a static
    scheme. Shapes and encoding follow modelopt/torch/quantization/plugins/megatron.py and opt/plugins/megatron.py: the
    amax of blocks without its unit axes, of rows as [rows, 1], a single one as [1], and the state as torch.save of a
    list with one byte tensor. Memory: a linear of the weight's size in each dimension that is not a multiple of the
    block, and of one block in the others.
    """
    example = _example(scheme)
    if scheme.block:  # the state has the size of a dimension that is not a multiple of the block
        example = _example(scheme, *(size if size % scheme.block else scheme.block for size in weight.data.shape))
    metadata = example.weight.metadata | {"shape": weight.data.shape, "dtype": dtype}
    example.weight = QTensorWrapper(weight.data.to("meta"), metadata)
    quantizer, tensors = example.weight_quantizer, {"weight_quantizer._scale": weight.scale}
    quantizer._scale = weight.scale.to("meta")
    if weight.amax is not None:
        single = weight.amax.numel() == 1
        tensors["weight_quantizer._amax"] = weight.amax.reshape(1) if single else weight.amax
        if scheme.block:  # ModelOpt treats a single block as per-tensor
            quantizer._amax = (weight.amax.reshape(()) if single else weight.amax[:, None, :, None]).to("meta")
        else:
            quantizer._amax = weight.amax.to("meta")
    if input_amax is not None:
        example.input_quantizer.amax = input_amax
        tensors["input_quantizer._amax"] = input_amax.reshape(1)
    return tensors, _extra_state(example)


def kept_state() -> bytes:
    """Returns the `_extra_state` of a linear that keeps its precision: every quantizer is disabled."""
    return _extra_state(_example(None))


def attention_state(k_amax: torch.Tensor, v_amax: torch.Tensor) -> tuple[dict[str, torch.Tensor], bytes]:
    """Returns what a Megatron checkpoint has of a core attention with an FP8 cache: float32 [] amax, `_extra_state`."""
    attention: Any = _Cache()
    with _quiet():
        mtq.quantize(torch.nn.ModuleDict({"attention": attention}), quant_config(None, kv_cache=True))
    attention.k_bmm_quantizer.amax, attention.v_bmm_quantizer.amax = k_amax, v_amax
    tensors = {f"{kind}_bmm_quantizer._amax": getattr(attention, f"{kind}_bmm_quantizer")._amax for kind in "kv"}
    return tensors, _extra_state(attention)


def _extra_state(module: Any) -> bytes:
    """Encodes the state as ModelOpt does, then as megatron-core stores it, with the objects of a key in a list."""
    state = _saved(quant_module_get_extra_state(module))
    return _saved([torch.frombuffer(bytearray(state), dtype=torch.uint8)])


def _saved(state: Any) -> bytes:
    buffer = io.BytesIO()
    safe_save(_ordered(state), buffer)
    return buffer.getvalue()


def _ordered(state: Any) -> Any:
    """Sorts the dicts of the state by key: ModelOpt fills them from a set, whose order differs between processes."""
    if isinstance(state, dict):
        return {key: _ordered(state[key]) for key in sorted(state, key=str)}
    if isinstance(state, list | tuple) and not isinstance(state, torch.Size):
        return type(state)(_ordered(item) for item in state)
    return state


def modelopt_state(scheme: Scheme, kv_cache: bool = False, others: Mapping[str, Scheme | None] = MappingProxyType({})) -> bytes:
    """Returns the model's `modelopt_state`, as `restore_sharded_modelopt_state` reads it from common.pt.

    It holds the modes and their configs; the state of each module is in its `_extra_state`. `others` are the modules
    with another scheme than `scheme`.
    """
    state = mto.modelopt_state(_convert(_linear(), quant_config(scheme, kv_cache, others)))
    remove_per_module_state(state)
    return _saved(state)
