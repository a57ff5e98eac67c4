"""ModelOpt's quantizer of a weight, with mptq's arithmetic for the formats that it covers.

`mtq.quantize` puts a `WeightQuantizer` into every linear whose class has `quantizes_with_strips` registered. ModelOpt
calls it where it rounds: in `mtq.compress`, and when a weight is assigned to a linear that has been compressed on the
meta device (`RealQuantLinear` in modelopt/torch/quantization/nn/modules/quant_linear.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    from modelopt.torch.quantization.nn import QuantModuleRegistry, TensorQuantizer
    from modelopt.torch.quantization.nn.modules.quant_module import QuantLinearConvBase
    from modelopt.torch.quantization.qtensor import FP8QTensor, MXFP8QTensor

from mptq.errors import CheckpointError
from mptq.quantize import quantizer
from mptq.quantize.activation_quantizers import ActivationQuantizer
from mptq.recipes.schemes import SCHEMES, Scheme

if TYPE_CHECKING:
    from mptq.types import Fp8Weight, WeightError


@dataclass(frozen=True, slots=True)
class Rounding:
    """How a `WeightQuantizer` rounds its next weight.

    `name` is the weight's, for errors. `amax`, float32, is the magnitude to scale for, of the shape of the scales; None
    is the weight's own. ModelOpt dequantizes the result to `dtype`; None is the weight's. `scheme` is one of those with the
    quantizer's attributes, of which it is the first otherwise.
    """

    name: str = "weight"
    amax: torch.Tensor | None = None
    dtype: torch.dtype | None = None
    scheme: Scheme | None = None


class WeightQuantizer(TensorQuantizer):  # type: ignore[misc]
    """Rounds to FP8 with mptq's kernels if its attributes are those of a scheme, else as ModelOpt does.

    Amax and cast are one pass over the weight. The result is ModelOpt's FP8QTensor (MXFP8QTensor for MX), bit for bit
    but for the floor of the scales (fp8.SCALE_FLOOR). `rounding` applies to the next weight, and `error` is that of the
    last one. Raises CheckpointError for a weight that is not finite. Peak memory: that of `quantizer.quantize`.
    """

    # What the class adds is not part of ModelOpt's state, which its restore gives to its own class.
    _skip_properties_for_save_restore: ClassVar[set[str]] = TensorQuantizer._skip_properties_for_save_restore | {
        "rounding",
        "error",
        "_made",
    }
    rounding = Rounding()
    error: WeightError | None = None
    _made: Fp8Weight | None = None

    @property
    def scheme(self) -> Scheme | None:
        """The scheme with the same attributes; None if there is none."""
        known = [scheme for scheme in SCHEMES.values() if self._matches(scheme.modelopt)]
        return self.rounding.scheme if self.rounding.scheme in known else next(iter(known), None)

    def _matches(self, attributes: Any) -> bool:
        blocks = {key: value for key, value in (self._block_sizes or {}).items() if value is not None}
        if self._num_bits != attributes["num_bits"] or blocks != dict(attributes.get("block_sizes", {})):
            return False
        return bool(blocks) or self._axis == attributes["axis"]  # with blocks, ModelOpt sets the axis itself

    def _get_amax(self, inputs: torch.Tensor) -> torch.Tensor:
        """Returns ModelOpt's amax of a weight, which an assigned weight is asked for before it is rounded.

        ModelOpt's own refuses square blocks there: it has forgotten that they were reshaped.
        """
        scheme = None if self._fake_quant else self.scheme
        if scheme is None:
            found: torch.Tensor = super()._get_amax(inputs)
            return found
        self._made, self.error = self._quantized(inputs, scheme, self.rounding.amax)
        return self._stored_amax(self._made)

    def _real_quantize(self, inputs: torch.Tensor) -> Any:
        scheme = self.scheme
        if scheme is None:
            return super()._real_quantize(inputs)
        made = self._made
        if made is None:
            given = self.rounding.amax
            if given is None and self.amax is not None:
                given = self.amax.float().reshape(scheme.grid(*inputs.shape))
            made, self.error = self._quantized(inputs, scheme, given)
        self._made = None
        return self.stored(made, self.rounding.dtype or inputs.dtype)

    def stored(self, made: Fp8Weight, dtype: torch.dtype) -> Any:
        """Keeps the scales of a rounded weight; returns ModelOpt's tensor of it, which dequantizes to `dtype`."""
        self._set_buffer("_scale", made.scale)
        if made.amax is not None:
            self._set_buffer("_amax", self._stored_amax(made))
        if self._block_sizes and made.amax is not None:
            # ModelOpt does it before it calibrates, and keeps the axes and the slices of partial blocks in its state.
            self._setup_for_blockquant(torch.empty(made.data.shape, device="meta"))
        self._dequantize = True
        kind = FP8QTensor if made.amax is not None else MXFP8QTensor
        return kind(made.data.shape, dtype, made.data)

    def scale_for(self, amax: torch.Tensor, scheme: Scheme) -> None:
        """Scales for `amax`, float32 of the shape of the scales, from now on; for MX, when the weight is compressed."""
        self.rounding = Rounding(amax=amax, scheme=scheme)
        if not scheme.exponents:
            self._set_buffer("_amax", self._shaped(amax))

    def _quantized(self, inputs: torch.Tensor, scheme: Scheme, amax: torch.Tensor | None) -> tuple[Fp8Weight, WeightError]:
        return quantizer.quantize(inputs.detach(), scheme, self.rounding.name, amax)

    def _stored_amax(self, made: Fp8Weight) -> torch.Tensor:
        assert made.amax is not None
        return self._shaped(made.amax)

    def _shaped(self, amax: torch.Tensor) -> torch.Tensor:
        """Returns the amax in ModelOpt's shape: with a unit axis after each axis of blocks, and [] for a single one."""
        if not self._block_sizes:
            return amax
        return amax.reshape(()) if amax.numel() == 1 else amax[:, None, :, None]


def assign(linear: Any, weight: torch.Tensor, rounding: Rounding = Rounding()) -> None:
    """Gives a linear that was compressed on the meta device its weight [out, in], which ModelOpt rounds.

    Raises CheckpointError if it has one: ModelOpt would take the values of a second one for FP8 codes.
    """
    if not linear.weight.is_meta:
        raise CheckpointError(f"{rounding.name}: the linear has a compressed weight already: load into a new layer")
    linear.weight_quantizer.rounding = rounding
    linear._parameters["weight"] = weight
    linear.weight_quantizer.rounding = Rounding()


def is_compressed(module: torch.nn.Module) -> bool:
    """Whether a module is a linear that `mtq.compress` has converted, and that rounds the weight that it is given."""
    found = getattr(module, "weight_quantizer", None)
    return isinstance(found, WeightQuantizer) and found.is_enabled and not found._fake_quant


def quantizes_with_strips(linear: type[torch.nn.Linear], name: str) -> type[QuantLinearConvBase]:
    """Registers a class of linears with ModelOpt, under `name`, to be quantized with these quantizers.

    The class must have a `forward` of its own: ModelOpt takes classes that share one for the same.
    """

    @QuantModuleRegistry.register({linear: name})
    class Quantized(QuantLinearConvBase):  # type: ignore[misc]
        def _setup(self) -> None:
            super()._setup()
            self.weight_quantizer.__class__ = WeightQuantizer
            self.input_quantizer.__class__ = ActivationQuantizer

    return Quantized
