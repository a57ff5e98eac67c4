"""ModelOpt's quantizers on a layer's activations: they collect amax, and then round activations as an engine would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

from mptq.quiet import quiet_imports

with quiet_imports():
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer
    from modelopt.torch.quantization.tensor_quant import fp8_eager

from mptq.errors import CheckpointError
from mptq.quantize.fp8 import floored
from mptq.recipes.recipe import Calibration

Visit = Callable[[str, torch.Tensor], torch.Tensor]
Hooks = list[RemovableHandle]


def _key(attention: Any, visit: Visit) -> Hooks:
    """K [sequence, batch, heads, dim] after the rotary embedding."""
    return [attention.core_attention.register_forward_pre_hook(lambda _, given: (given[0], visit("key", given[1]), *given[2:]))]


def _value(attention: Any, visit: Visit) -> Hooks:
    """V [sequence, batch, heads, dim]."""
    return [
        attention.core_attention.register_forward_pre_hook(lambda _, given: (*given[:2], visit("value", given[2]), *given[3:]))
    ]


def _latent(attention: Any, visit: Visit) -> Hooks:
    """The latent [sequence, batch, rank] after its norm, and the shared key [sequence, batch, 1, dim] after RoPE.

    megatron-core passes the shared key as the end of every head's key, so it is taken from one head.
    """
    width = attention.config.qk_pos_emb_head_dim

    def rotated(_module: torch.nn.Module, given: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        query, key, *others = given
        shared = visit("latent", key[..., :1, -width:])
        return query, torch.cat((key[..., :-width], shared.expand(*key.shape[:-1], -1)), dim=-1), *others

    return [
        attention.kv_layernorm.register_forward_hook(lambda _module, _given, out: visit("latent", out)),
        attention.core_attention.register_forward_pre_hook(rotated),
    ]


CACHED: dict[str, Callable[[Any, Visit], Hooks]] = {"key": _key, "value": _value, "latent": _latent}
"""Cached tensor (`cached` of a layout) -> hooks on a layer's attention that visit it; latent parts share one scale."""


class ActivationQuantizers:
    """Quantizers for the inputs of the linears `names` of a layer, and for its `cached` tensors (see `CACHED`).

    They are attached as hooks only inside `collecting` and `quantizing`.
    """

    def __init__(self, names: Iterable[str], cached: Iterable[str], calibration: Calibration) -> None:
        self.calibration = calibration
        self.strange: list[str] = []
        kind = "max" if calibration.method == "max" else "histogram"
        settings = QuantizerAttributeConfig(num_bits=(4, 3), axis=None, calibrator=kind)
        self.quantizers = {name: TensorQuantizer(settings) for name in (*names, *cached)}

    @contextlib.contextmanager
    def collecting(self, layer: torch.nn.Module) -> Iterator[None]:
        """Collects the magnitudes of what passes through `layer`, without changing it."""
        for quantizer in self.quantizers.values():
            quantizer.disable_quant()
            quantizer.enable_calib()
        with _hooked(layer, self.quantizers, self._collect):
            yield
        for quantizer in self.quantizers.values():
            quantizer.disable_calib()

    def magnitudes(self, where: str) -> dict[str, torch.Tensor | None]:
        """Returns ModelOpt's amax, float32 [], of each tensor, or None for one that saw no tokens (an expert).

        Raises CheckpointError, with the layer `where`, for activations that are not finite.
        """
        if self.strange:
            raise CheckpointError(f"{where}.{self.strange[0]}: the calibration data produces activations that are not finite")
        percentile = self.calibration.percentile
        arguments = {} if percentile is None else {"method": "percentile", "percentile": percentile}
        found: dict[str, torch.Tensor | None] = {}
        for name, quantizer in self.quantizers.items():
            collected = getattr(quantizer._calibrator, "_calib_amax", None), getattr(quantizer._calibrator, "_calib_hist", None)
            if all(part is None for part in collected):
                found[name] = None
                continue
            found[name] = quantizer._calibrator.compute_amax(**arguments).float().reshape(())
        return found

    @contextlib.contextmanager
    def quantizing(self, layer: torch.nn.Module, amax: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Rounds the tensors named in `amax` to E4M3, with scale amax / 448, passing through `layer`, as engines do.

        Uses the function that ModelOpt's quantizers call on a CPU: on a GPU they would first compile another one.
        """
        with _hooked(layer, amax, lambda name, states: fp8_eager(states, floored(amax[name]))):
            yield

    def _collect(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Collects the magnitudes of `states`. ModelOpt's calibrators fail on NaN and infinity, which are skipped."""
        if states.numel() and not all(map(torch.isfinite, torch.aminmax(states))):
            self.strange.append(name)
            return states
        collected: torch.Tensor = self.quantizers[name](states)
        return collected


@contextlib.contextmanager
def _hooked(layer: torch.nn.Module, names: Iterable[str], visit: Visit) -> Iterator[None]:
    """Passes each of the tensors `names` to `visit`, and the result to the module."""
    hooks: Hooks = []
    for name in names:
        if name in CACHED:
            hooks += CACHED[name](layer.self_attention, visit)
        else:
            hooks.append(layer.get_submodule(name).register_forward_pre_hook(_of_input(name, visit)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _of_input(name: str, visit: Visit) -> Any:
    return lambda _module, arguments: (visit(name, arguments[0]), *arguments[1:])
