"""`mtq.quantize` and `mtq.compress` of a layer's linears, and the state that they leave, as ModelOpt's restore expects it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, Literal

import pydantic
import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    import modelopt.torch.opt as mto
    import modelopt.torch.quantization as mtq
    from modelopt.torch.opt.plugins.mcore_dist_checkpointing import remove_per_module_state
    from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg_context
    from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor, CalibrateModeRegistry
    from modelopt.torch.quantization.plugins.megatron import quant_module_get_extra_state
    from modelopt.torch.utils.distributed import ParallelState
    from modelopt.torch.utils.serialization import safe_save

from mptq.recipes.schemes import Scheme

E4M3: dict[str, Any] = {"num_bits": (4, 3), "axis": None}
"""ModelOpt's attributes of a quantizer with one static scale."""


def _rules(scheme: Scheme | None, module: str = "*") -> list[dict[str, Any]]:
    """Returns ModelOpt's rules for the linears whose names match `module`."""
    if scheme is None:
        return [{"quantizer_name": f"{module}{kind}_quantizer", "enable": False} for kind in ("weight", "input")]
    rules: list[dict[str, Any]] = [{"quantizer_name": f"{module}weight_quantizer", "cfg": dict(scheme.modelopt)}]
    if scheme.static:
        rules.append({"quantizer_name": f"{module}input_quantizer", "cfg": E4M3})
    return rules


def quant_config(
    scheme: Scheme | None, kv_cache: bool = False, others: Mapping[str, Scheme | None] = MappingProxyType({})
) -> dict[str, Any]:
    """Returns a ModelOpt quant config: `scheme` for all linears but `others` (by name) and the output layer."""
    rules = [{"quantizer_name": "*", "enable": False}, *_rules(scheme)]
    for module, other in others.items():
        rules += _rules(None, f"*{module}.") + (_rules(other, f"*{module}.") if other else [])
    if kv_cache:
        rules.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": E4M3})
    rules.append({"quantizer_name": "*output_layer*", "enable": False})
    return {"quant_cfg": rules, "algorithm": "max" if scheme is None or not scheme.exponents else None}


@contextlib.contextmanager
def silenced() -> Iterator[None]:
    """Silences ModelOpt, which prints to stdout (reserved for results) and warns that compression is experimental."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


type Loop = Callable[[torch.nn.Module], None]
"""ModelOpt's `forward_loop`: calls the module that it is given, once for each batch."""


def register_algorithm(name: str, calibrate: Callable[..., None], **settings: Any) -> None:
    """Makes `algorithm: {"method": name}` call `calibrate(module, forward_loop=..., **settings)`.

    `settings` are what an algorithm's config may have besides, as pydantic takes them: name=(type, default).
    """
    fields: dict[str, Any] = {"method": (Literal[name], name)} | settings
    config: type[QuantizeAlgorithmConfig] = pydantic.create_model(name, __base__=QuantizeAlgorithmConfig, **fields)

    @CalibrateModeRegistry.register_mode
    class _Mode(BaseCalibrateModeDescriptor):  # type: ignore[misc]
        _calib_func = staticmethod(calibrate)

        @property
        def config_class(self) -> type[QuantizeAlgorithmConfig]:
            return config


@contextlib.contextmanager
def quantizers_off(module: torch.nn.Module) -> Iterator[None]:
    """Lets a module run as if it were not quantized."""
    with set_quantizer_by_cfg_context(module, [{"quantizer_name": "*", "enable": False}]):
        yield


def single_process() -> ParallelState:
    """Returns ModelOpt's parallel state of a module that is not parallel."""
    return ParallelState(data_parallel_group=-1)


def quantize(module: torch.nn.Module, config: dict[str, Any]) -> None:
    """Quantizes the linears in `module`, in place; their quantizers are calibrated on the weights only."""
    with silenced():
        mtq.quantize(module, config)


def convert(module: torch.nn.Module, config: dict[str, Any]) -> None:
    """Quantizes and compresses the linears in `module`, in place; afterwards it has ModelOpt's record of it."""
    with silenced():
        mtq.quantize(module, config)
        mtq.compress(module)


def linear_state(linear: Any, input_amax: torch.Tensor | None = None) -> tuple[dict[str, torch.Tensor], bytes]:
    """Returns what a Megatron checkpoint stores of a compressed linear besides its weight: tensors, and `_extra_state`.

    `input_amax` float32 [] is the calibrated amax of the input, for a static scheme. Shapes and encoding follow
    modelopt/torch/quantization/plugins/megatron.py and opt/plugins/megatron.py: the amax of blocks without its unit
    axes, of rows as [rows, 1], a single one as [1], and the state as torch.save of a list with one byte tensor.
    """
    if input_amax is not None:
        linear.input_quantizer.amax = input_amax
    tensors = {}
    for kind in ("weight", "input"):
        for name, buffer in sorted(getattr(linear, f"{kind}_quantizer").named_buffers(), reverse=True):  # scales first
            tensors[f"{kind}_quantizer.{name}"] = _saved_amax(buffer) if name == "_amax" else buffer
    return tensors, _extra_state(linear)


def _saved_amax(amax: torch.Tensor) -> torch.Tensor:
    if amax.numel() == 1:
        return amax.reshape(1)
    return amax[:, 0, :, 0] if amax.dim() == 4 else amax


def attention_state(attention: Any, k_amax: torch.Tensor, v_amax: torch.Tensor) -> tuple[dict[str, torch.Tensor], bytes]:
    """Returns what a Megatron checkpoint has of a calibrated core attention, with float32 [] amax: tensors, `_extra_state`."""
    quantizers = {"k_bmm_quantizer": k_amax, "v_bmm_quantizer": v_amax}
    for name, amax in quantizers.items():
        getattr(attention, name).round_with(amax)
    for quantizer in attention.children():
        quantizer._input_dtype = None  # that of the last tensor to pass while disabled, and no part of a model's state
    state = _extra_state(attention)
    for name in quantizers:
        getattr(attention, name).disable()
    return {f"{name}._amax": amax for name, amax in quantizers.items()}, state


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


def modelopt_state(config: dict[str, Any]) -> bytes:
    """Returns the `modelopt_state` of a model with a quant config, as `restore_sharded_modelopt_state` reads it.

    It holds the modes and their configs; the state of each module is in its `_extra_state`.
    """
    holder = torch.nn.ModuleDict({"linear": torch.nn.Linear(32, 2, bias=False, device="meta")})
    convert(holder, config)
    state = mto.modelopt_state(holder)
    remove_per_module_state(state)
    return _saved(state)
