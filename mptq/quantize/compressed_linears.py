"""The linears of a layer as an output stores them, compressed by ModelOpt one weight at a time."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mptq.quantize.modelopt import convert, quant_config, quantize
from mptq.quantize.quantizer import unfilled
from mptq.quantize.weight_quantizer import Rounding, assign, quantizes_with_strips
from mptq.quiet import quiet_imports
from mptq.types import Fp8Weight, WeightError

with quiet_imports():
    from modelopt.torch.quantization.qtensor import QTensorWrapper

if TYPE_CHECKING:
    from mptq.recipes.schemes import Scheme


class Matrix(torch.nn.Linear):
    """A matrix that an output stores: a projection, or Megatron's fused matrix; weight [out, in], on the meta device."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        rows, columns = shape
        super().__init__(columns, rows, bias=False, device="meta", dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Maps `x` [..., in] to [..., out]. ModelOpt tells classes apart by their `forward`."""
        return super().forward(x)


quantizes_with_strips(Matrix, "mptq.Matrix")


_UNCALIBRATED = {"algorithm": None}
"""There are no weights yet: amax is set with each."""


@dataclass(frozen=True, slots=True)
class Compressed:
    """A compressed matrix: its weight, its error (None on other ranks than the one that rounded it), and its linear.

    `linear` is ModelOpt's module, which has the same weight, and the state from which ModelOpt restores it. `served` is
    the relative error after a loader has quantized it again (served.py); None if none does.
    """

    weight: Fp8Weight
    error: WeightError | None
    linear: Any
    served: float | None = None


class CompressedLinears:
    """Linears that ModelOpt has quantized and compressed without weights; each takes its weight once.

    `shapes` and `schemes` are [out, in] and the scheme (None: it keeps its precision) of each by its full name in the
    model, which is what patterns match; ModelOpt dequantizes to `dtype`. `algorithm` is ModelOpt's for the scales.
    Memory: 30 kB per linear, and the weights that have been taken and not been dropped. Time: 2 ms per linear.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        schemes: Mapping[str, Scheme | None],
        dtype: torch.dtype,
        algorithm: str = "max",
    ) -> None:
        self.schemes, self.dtype, self.algorithm = schemes, dtype, algorithm
        # Apart, because ModelOpt refuses a config that quantizes none of the linears.
        self._quantized, self._kept = torch.nn.Module(), torch.nn.Module()
        for name, shape in shapes.items():
            _place(self._holder(name), name, Matrix(shape, dtype))
        used = Counter(scheme for scheme in schemes.values() if scheme is not None)
        if used:
            ((main, _),) = used.most_common(1)
            others = {name: scheme for name, scheme in schemes.items() if scheme not in (None, main)}
            convert(self._quantized, quant_config(main, others=others) | _UNCALIBRATED)
        convert(self._kept, quant_config(None) | _UNCALIBRATED)

    def _holder(self, name: str) -> torch.nn.Module:
        return self._kept if self.schemes[name] is None else self._quantized

    def linear(self, name: str) -> Any:
        """Returns ModelOpt's module of a linear."""
        return self._holder(name).get_submodule(name)

    def compress(self, name: str, weight: torch.Tensor, label: str, amax: torch.Tensor | None = None) -> Compressed:
        """Assigns `weight` [out, in] to a linear, which rounds it; returns the result.

        `amax`, float32 of the shape of the scales, is that of a group with one scale, or what a search has found. Raises
        CheckpointError, with `label`, for a weight that is not finite.
        """
        linear, scheme = self.linear(name), self.schemes[name]
        if amax is None and scheme is not None and self.algorithm != "max":
            amax = calibrated_amax([weight], scheme, self.algorithm)
        assign(linear, weight, Rounding(label, amax, self.dtype, scheme))
        return Compressed(self._weight(linear, name), linear.weight_quantizer.error, linear)

    def receive(self, name: str, device: torch.device) -> Compressed:
        """Returns a compressed linear with uninitialized tensors, for a weight that another rank rounds."""
        scheme, linear = self.schemes[name], self.linear(name)
        assert scheme is not None
        made = unfilled(tuple(linear.weight.shape), scheme, device)
        linear._parameters["weight"] = QTensorWrapper(linear.weight_quantizer.stored(made, self.dtype))
        return Compressed(made, None, linear)

    def _weight(self, linear: Any, name: str) -> Fp8Weight:
        quantizer, scheme = linear.weight_quantizer, self.schemes[name]
        assert scheme is not None
        amax = None if scheme.exponents else quantizer.amax.reshape(quantizer._scale.shape)
        return Fp8Weight(linear.weight.data, quantizer._scale, amax)


def calibrated_amax(weights: Sequence[torch.Tensor], scheme: Scheme, algorithm: str) -> torch.Tensor:
    """Returns the amax, float32, that ModelOpt's `algorithm` finds for the rows of all `weights` [out, in] together.

    It has the shape of the scales of the whole. Peak memory: 17 bytes per element, on their device.
    """
    matrix = Matrix((sum(map(len, weights)), weights[0].shape[1]), torch.float32)
    matrix.weight = torch.nn.Parameter(torch.cat([weight.float() for weight in weights]), requires_grad=False)
    shape = tuple(matrix.weight.shape)
    # ModelOpt draws a progress bar for each matrix.
    with contextlib.redirect_stderr(io.StringIO()):
        quantize(torch.nn.ModuleDict({"matrix": matrix}), quant_config(scheme) | {"algorithm": {"method": algorithm}})
    quantizer: Any = matrix.weight_quantizer
    amax: torch.Tensor = quantizer.amax.float().reshape(scheme.grid(*shape))
    release(matrix)
    return amax


def drop(made: Sequence[Compressed]) -> None:
    """Frees the tensors of linears that have been stored: ModelOpt's modules are reference cycles."""
    for one in made:
        one.linear._parameters.clear()
        one.linear.weight_quantizer._buffers.clear()


def release(layer: torch.nn.Module) -> None:
    """Frees the tensors of a layer that is done with, for the same reason."""
    for module in layer.modules():
        module._parameters.clear()
        module._buffers.clear()


def _place(root: torch.nn.Module, name: str, linear: torch.nn.Module) -> None:
    """Puts `linear` into `root` under a name with dots, as in the model."""
    owner, *inner = name.split(".")
    if not inner:
        root.add_module(owner, linear)
        return
    if not hasattr(root, owner):
        root.add_module(owner, torch.nn.Module())
    _place(root.get_submodule(owner), ".".join(inner), linear)
