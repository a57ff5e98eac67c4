"""Real quantization of one linear through NVIDIA ModelOpt: `mtq.quantize`, then `mtq.compress`. The only importer of it.

Each linear is converted alone and in place, so that only one of them is in float32 at a time. ModelOpt computes amax and
scale in the dtype of the weight, hence the float32 weight.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch

from mptq.arch.layer import CoreAttention, Linear

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import remove_per_module_state
    from modelopt.torch.quantization.nn import QuantModule, QuantModuleRegistry, TensorQuantizer
    from modelopt.torch.quantization.nn.modules.quant_linear import _QuantLinear
    from modelopt.torch.quantization.plugins.megatron import quant_module_get_extra_state
    from modelopt.torch.utils.serialization import safe_save

from mptq.quantize import mx
from mptq.quantize.fp8 import E4M3_MAX, require_finite
from mptq.recipe import Scheme
from mptq.types import Fp8Weight

# ModelOpt matches subclasses only while they keep the forward of their base.
QuantModuleRegistry.register({Linear: "mptq.Linear"})(_QuantLinear)


@QuantModuleRegistry.register({CoreAttention: "mptq.CoreAttention"})
class _QuantCoreAttention(QuantModule):  # type: ignore[misc]
    """Core attention with the quantizers of ModelOpt's class for Transformer Engine's, so that their states are alike."""

    def _setup(self) -> None:
        self.q_bmm_quantizer, self.k_bmm_quantizer, self.v_bmm_quantizer = (TensorQuantizer() for _ in range(3))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        query, key, value = self.q_bmm_quantizer(query), self.k_bmm_quantizer(key), self.v_bmm_quantizer(value)
        out: torch.Tensor = super().forward(query, key, value, *args, **kwargs)
        return out

    def get_extra_state(self) -> None:
        """Nothing: torch asks the class for this, and ModelOpt gives each object its own."""

    def set_extra_state(self, state: Any) -> None:
        """As `get_extra_state`."""

    def modelopt_post_restore(self, prefix: str = "") -> None:
        """Nothing to reshape: one scale a tensor, whatever the parallel layout."""


_E4M3: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
_WEIGHTS: dict[str, dict[str, Any]] = {
    "block": _E4M3 | {"block_sizes": {-1: 128, -2: 128}},
    "row": _E4M3 | {"axis": 0},
    "tensor": _E4M3,
    "mx": {"num_bits": (4, 3), "block_sizes": {-1: 32, "type": "dynamic", "scale_bits": (8, 0)}},
}


def _rules(scheme: Scheme | None, module: str = "*") -> list[dict[str, Any]]:
    """ModelOpt's rules for the linears whose names match `module`."""
    if scheme is None:
        return [{"quantizer_name": f"{module}{kind}_quantizer", "enable": False} for kind in ("weight", "input")]
    rules: list[dict[str, Any]] = [{"quantizer_name": f"{module}weight_quantizer", "cfg": _WEIGHTS[scheme.scale]}]
    if scheme.static:
        rules.append({"quantizer_name": f"{module}input_quantizer", "cfg": _E4M3})
    return rules


def quant_config(
    scheme: Scheme | None, kv_cache: bool = False, others: Mapping[str, Scheme | None] = MappingProxyType({})
) -> dict[str, Any]:
    """A ModelOpt quantization config: `scheme` for every linear but `others` (by module name), the output layer left alone."""
    rules = [{"quantizer_name": "*", "enable": False}, *_rules(scheme)]
    for module, other in others.items():
        rules += _rules(None, f"*{module}.") + (_rules(other, f"*{module}.") if other else [])
    if kv_cache:
        rules.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": _E4M3})
    rules.append({"quantizer_name": "*output_layer*", "enable": False})
    return {"quant_cfg": rules, "algorithm": "max" if scheme is None or scheme.scale != "mx" else None}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """ModelOpt prints to stdout, which belongs to results, and warns that compression is experimental."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _convert(linear: Any, config: dict[str, Any], name: str) -> torch.nn.ModuleDict:
    """Quantize and compress `linear` in place; return the holder, which has ModelOpt's record of the conversion."""
    holder = torch.nn.ModuleDict({"linear": linear})
    with _quiet():
        mtq.quantize(holder, config)
        amax = getattr(linear.weight_quantizer, "_amax", None)
        if amax is None:  # not quantized, or in blocks that have exponents instead
            mtq.compress(holder)
            return holder
        source = linear.weight.detach()
        assert source.dtype == torch.float32, f"{name} must be cast to float32 first, not {source.dtype}"
        # An all-zero block (or one so small that its scale is) has no scale of its own: 448 / 448 = 1 instead of 0 / 0.
        empty = amax / E4M3_MAX == 0
        amax.masked_fill_(empty, E4M3_MAX)
        mtq.compress(holder)
    if empty.numel() == 1 and empty.all():
        # ModelOpt computes the amax of a single block again, whatever it has been given.
        linear.weight_quantizer._scale.fill_(1.0)
        linear.weight.data.copy_(source)
    return holder


def compress_linear(
    linear: Any, weight: torch.Tensor, scheme: Scheme, name: str, input_amax: torch.Tensor | None = None
) -> Fp8Weight:
    """Give `linear` the float32 `weight` [out, in], quantize it for good and freeze it; return what it now holds.

    `linear` is a torch.nn.Linear, which ModelOpt turns into a class of its own; it computes in the dtype it was built with,
    dequantizing as ModelOpt does. `input_amax` is the calibrated magnitude of its input, for a scheme that is static. Raises
    CheckpointError naming `name` for a weight that is not finite. Peak memory: four times the float32 weight, in ModelOpt.
    """
    dtype = linear.weight.dtype
    require_finite(weight, name)
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    _convert(linear, quant_config(scheme), name)
    # What the linear dequantizes to is its own business: the scales stay float32.
    linear.weight.metadata["dtype"] = dtype
    if input_amax is not None:
        linear.input_quantizer.amax = input_amax
    if scheme.scale == "mx":
        found = mx.quantize(weight)  # ModelOpt's exponent is a rounded logarithm, and its scale of zeros is 2 ** -127
        linear.weight.data.copy_(found.data)
        linear.weight_quantizer._scale.copy_(found.scale)
    _freeze(linear)
    # ModelOpt gives a weight of a single row a scale without dimensions.
    return Fp8Weight(linear.weight.data, linear.weight_quantizer._scale.reshape(scheme.grid(*weight.shape)))


def keep_linear(linear: Any, weight: torch.Tensor) -> None:
    """Give `linear` the `weight` [out, in] as it is, and ModelOpt's class with every quantizer off, and freeze it."""
    linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    _convert(linear, quant_config(None), "")
    _freeze(linear)


def _freeze(linear: Any) -> None:
    for parameter in linear.parameters():
        parameter.requires_grad_(False)


def quantize_weight(weight: torch.Tensor, scheme: Scheme, name: str) -> Fp8Weight:
    """Quantize a float32 weight [out, in] that is no linear of the layer, such as one projection of a fused one."""
    with torch.device("meta"):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    return compress_linear(linear, weight, scheme, name)


def megatron_state(linear: Any) -> tuple[dict[str, torch.Tensor], bytes]:
    """What a compressed linear adds to a Megatron checkpoint: quantizer tensors by name, and its `_extra_state`.

    Shapes and the encoding are those of modelopt/torch/quantization/plugins/megatron.py and opt/plugins/megatron.py:
    amax of blocks without its unit axes, of rows as [rows, 1], a single one as [1], and the state as torch.save of a list of
    one byte tensor.
    """
    tensors = {}
    quantizer = linear.weight_quantizer
    if (amax := getattr(quantizer, "_amax", None)) is not None:
        if amax.dim() == 4:
            amax = amax.squeeze(1).squeeze(-1)
        else:
            amax = amax.reshape(-1) if amax.numel() == 1 else amax.reshape(linear.weight.shape[0], -1)
        tensors["weight_quantizer._amax"] = amax
    if (scale := getattr(quantizer, "_scale", None)) is not None:
        tensors["weight_quantizer._scale"] = scale
    if (amax := getattr(linear.input_quantizer, "_amax", None)) is not None:
        tensors["input_quantizer._amax"] = amax.reshape(1)
    # megatron-core stores the objects of a key as a list.
    return tensors, _saved([_as_bytes(quant_module_get_extra_state(linear))])


def attention_state(attention: Any, k_amax: torch.Tensor, v_amax: torch.Tensor) -> tuple[dict[str, torch.Tensor], bytes]:
    """What a core attention with an FP8 cache adds to a Megatron checkpoint: float32 [] magnitudes, and its `_extra_state`.

    `attention` is mptq's CoreAttention, which ModelOpt turns into a class with quantizers, as it does Transformer Engine's.
    """
    holder = torch.nn.ModuleDict({"attention": attention})
    with _quiet():
        mtq.quantize(holder, quant_config(None, kv_cache=True))
    attention.k_bmm_quantizer.amax, attention.v_bmm_quantizer.amax = k_amax, v_amax
    tensors = {f"{kind}_bmm_quantizer._amax": getattr(attention, f"{kind}_bmm_quantizer")._amax for kind in "kv"}
    return tensors, _saved([_as_bytes(quant_module_get_extra_state(attention))])


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


def modelopt_state(scheme: Scheme, kv_cache: bool = False, others: Mapping[str, Scheme | None] = MappingProxyType({})) -> bytes:
    """The whole model's `modelopt_state`, as `restore_sharded_modelopt_state` reads it from common.pt.

    `others` are the modules that do not have `scheme`. It holds the modes and their configs; what belongs to a module is in
    that module's `_extra_state`.
    """
    columns = 32 if scheme.scale == "mx" else 2
    with torch.device("cpu"):
        linear = torch.nn.Linear(columns, 2, bias=False)
    state = mto.modelopt_state(_convert(linear, quant_config(scheme, kv_cache, others), "modelopt_state"))
    remove_per_module_state(state)
    return _saved(state)
