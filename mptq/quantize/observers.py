"""ModelOpt's quantizers on a layer's activations: they collect magnitudes, and then round what passes as an engine would."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    from modelopt.torch.quantization.config import QuantizerAttributeConfig
    from modelopt.torch.quantization.nn import TensorQuantizer

from mptq.errors import CheckpointError
from mptq.quantize.fp8 import E4M3_MAX
from mptq.recipe import Calibration

Visit = Callable[[str, torch.Tensor], torch.Tensor]
CACHE = ("key", "value")
"""Names of the observed tensors of the KV cache, in the order of the core attention's arguments after the query."""


class Observers:
    """Quantizers of the inputs of the linears `names` of a layer, and of K and V where the core attention is named too.

    They hang on the layer as hooks while `collecting` or `quantizing`, and change nothing of it otherwise.
    """

    def __init__(self, names: Iterable[str], core_attention: str | None, calibration: Calibration) -> None:
        self.calibration = calibration
        self.core_attention = core_attention
        self.strange: list[str] = []
        kind = "max" if calibration.method == "max" else "histogram"
        settings = QuantizerAttributeConfig(num_bits=(4, 3), axis=None, calibrator=kind)
        self.quantizers = {name: TensorQuantizer(settings) for name in (*names, *(CACHE if core_attention is not None else ()))}

    @contextlib.contextmanager
    def collecting(self, layer: torch.nn.Module) -> Iterator[None]:
        """What passes through `layer` goes on as it is, and its magnitudes are kept."""
        for quantizer in self.quantizers.values():
            quantizer.disable_quant()
            quantizer.enable_calib()
        with self._hooked(layer, self._collect):
            yield
        for quantizer in self.quantizers.values():
            quantizer.disable_calib()
            quantizer.enable_quant()

    def magnitudes(self, where: str) -> dict[str, torch.Tensor | None]:
        """The amax float32 [] of each tensor by ModelOpt's calibrator, or None of one that nothing passed (an expert).

        Raises CheckpointError, naming the layer as `where`, for activations that are not finite.
        """
        if self.strange:
            raise CheckpointError(f"{where}.{self.strange[0]}: the calibration data leads to activations that are not finite")
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
    def quantizing(self, layer: torch.nn.Module, amax: dict[str, torch.Tensor]) -> Iterator[None]:
        """What passes through `layer` is rounded to E4M3 with the scales amax / 448, as an engine with these scales does."""
        for name, quantizer in self.quantizers.items():
            quantizer.amax = amax[name].clamp(min=torch.finfo(torch.float32).tiny * E4M3_MAX)
        with self._hooked(layer, lambda name, states: self.quantizers[name](states)):
            yield

    def _collect(self, name: str, states: torch.Tensor) -> torch.Tensor:
        """Keep the magnitudes of `states`; ModelOpt's calibrators fail on NaN and infinity, so those are only noted."""
        if states.numel() and not all(map(torch.isfinite, torch.aminmax(states))):
            self.strange.append(name)
            return states
        collected: torch.Tensor = self.quantizers[name](states)
        return collected

    @contextlib.contextmanager
    def _hooked(self, layer: torch.nn.Module, visit: Visit) -> Iterator[None]:
        """Hand every observed tensor to `visit`, and what that returns to the module."""
        hooks = [
            layer.get_submodule(name).register_forward_pre_hook(_of_input(name, visit))
            for name in self.quantizers
            if name not in CACHE
        ]
        if self.core_attention is not None:
            hooks.append(layer.get_submodule(self.core_attention).register_forward_pre_hook(_of_cache(visit)))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _of_input(name: str, visit: Visit) -> Any:
    return lambda _module, arguments: (visit(name, arguments[0]), *arguments[1:])


def _of_cache(visit: Visit) -> Any:
    return lambda _module, arguments: (arguments[0], *map(visit, CACHE, arguments[1:3]), *arguments[3:])
