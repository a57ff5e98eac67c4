"""Tensors of the Megatron format: those of a model that ModelOpt quantized and compressed. Does not import torch.

Source: modelopt/torch/quantization/plugins/megatron.py and modelopt/torch/opt/plugins/megatron.py. ModelOpt's KV cache
quantizers are in the core attention, which receives decompressed K and V in multi-latent attention too.
"""

from __future__ import annotations

from mptq.formats.layout import Layout
from mptq.model.tensors import CORE_ATTENTION, LinearSpec, UnquantizedTensor, megatron_layer
from mptq.recipes.schemes import ROWS, Scheme
from mptq.types import TensorSpec


class MegatronLayout(Layout):
    """Stores Megatron's fused matrices with the buffers of ModelOpt's quantizers; byte items are not included."""

    def scheme(self, layer: int, linear: LinearSpec) -> Scheme | None:
        """The recipe's scheme if it fits the linear, else as `misaligned` sets; square blocks fit every shape."""
        wanted = self.assignment.scheme(layer, linear)
        if wanted is None or wanted.block is not None or linear.fits(wanted.unit):
            return wanted
        return ROWS if self.assignment.recipe.misaligned == "per-channel" else None

    def linear(self, layer: int, linear: LinearSpec) -> tuple[TensorSpec, ...]:
        """The weight, possibly in parts, and the buffers of its quantizers."""
        name, scheme, dtype = megatron_layer(layer) + linear.megatron, self.scheme(layer, linear), self.dtype(layer, linear)
        rows, columns = linear.shape
        parts = zip(linear.keys, linear.key_rows, strict=True)
        found = [TensorSpec(f"{name}.{key}", dtype, (count, columns)) for key, count in parts]
        if scheme is None:
            return tuple(found)
        grid = scheme.grid(rows, columns)
        if not scheme.exponents:
            found.append(TensorSpec(f"{name}.weight_quantizer._amax", "float32", grid or (1,)))
        found.append(TensorSpec(f"{name}.weight_quantizer._scale", scheme.scale_dtype, grid))
        if scheme.static:
            found.append(TensorSpec(f"{name}.input_quantizer._amax", "float32", (1,)))
        return tuple(found)

    def unquantized(self, tensor: UnquantizedTensor, layer: int | None = None) -> tuple[TensorSpec, ...]:
        """The tensor, in parts if a compressed model stores it in parts."""
        name = ("" if layer is None else megatron_layer(layer)) + tensor.megatron
        dtype = self.source.dtype(name)
        first, *rest = self.source.places[name]
        if not tensor.keys:
            # Keep the checkpoint's name: Transformer Engine specs fuse norms into linears, and local specs do not.
            return (TensorSpec(name if rest else first.spelled, dtype, tensor.shape),)
        owner = name.rpartition(".")[0]
        parts = zip(tensor.keys, tensor.key_rows, strict=True)
        return tuple(TensorSpec(f"{owner}.{key}", dtype, (rows, *tensor.shape[1:])) for key, rows in parts)

    def kv_cache(self, layer: int) -> tuple[TensorSpec, ...]:
        """The amax of ModelOpt's K and V quantizers."""
        prefix = f"{megatron_layer(layer)}{CORE_ATTENTION}."
        return tuple(TensorSpec(f"{prefix}{kind}_bmm_quantizer._amax", "float32", ()) for kind in "kv")

    @property
    def other_schemes(self) -> dict[str, Scheme | None]:
        """Module -> scheme, for modules that are not stored in the recipe's main scheme."""
        found = {
            megatron_layer(layer) + linear.megatron: self.scheme(layer, linear) for layer, linear in self.assignment.linears()
        }
        return {name: scheme for name, scheme in found.items() if scheme != self.assignment.recipe.scheme}
