"""Tensors of the Hugging Face format, and the modules to exclude from quantization. Does not import torch.

See docs/formats.md for the dialects and the engines that load them.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from mptq.formats.hf.quantization_config import DIALECTS, Contents, Dialect
from mptq.formats.layout import K_AND_V, Layout
from mptq.model.tensors import LinearSpec, UnquantizedTensor, hf_layer, layer_copies, megatron_layer
from mptq.recipes.schemes import ROWS, Scheme, carried
from mptq.types import TensorSpec

_CACHED = {"attention": K_AND_V, "mla": ("latent", "latent")}
"""Mixer -> what engines store in a layer's KV cache.

For multi-latent attention this is one "latent" row per token: the normalized latent and the rotated shared key, with a
single scale (vLLM's `concat_and_cache_mla` takes only `_k_scale`).
"""


class HfLayout(Layout):
    """Stores each projection separately, in the recipe's dialect or in one that supports all of its schemes."""

    splits = True
    takes_rows = True

    def scheme(self, layer: int, linear: LinearSpec) -> Scheme | None:
        """The recipe's scheme if it fits the linear and those fused with it in engines, else as `misaligned` sets."""
        wanted = self.assignment.scheme(layer, linear)
        if wanted is None or self.assignment.group_fits(layer, linear):
            return wanted
        return ROWS if self.assignment.recipe.misaligned == "per-channel" else None

    def linear(self, layer: int, linear: LinearSpec) -> tuple[TensorSpec, ...]:
        """Weight, scale and static input scale of each projection."""
        scheme, dtype, found = self.scheme(layer, linear), self.dtype(layer, linear), list[TensorSpec]()
        for member, shape in linear.members:
            name = hf_layer(self.model, layer) + member
            found.append(TensorSpec(f"{name}.weight", dtype, shape))
            if scheme is not None:
                found.append(self.dialect.scale(name, scheme, *shape))
                found += [self.dialect.input_scale(name)] if scheme.static else []
        return tuple(found)

    def weights(self, layer: int, linear: LinearSpec) -> tuple[str, ...]:
        """Weight names of the projections."""
        return tuple(f"{hf_layer(self.model, layer)}{member}.weight" for member in linear.hf)

    def unquantized(self, tensor: UnquantizedTensor, layer: int | None = None) -> tuple[TensorSpec, ...]:
        """One tensor, or one per projection; empty for a tensor that the Hugging Face model does not have."""
        dtype = self.source.dtype(("" if layer is None else megatron_layer(layer)) + tensor.megatron)
        prefix = "" if layer is None else hf_layer(self.model, layer)
        named = zip(tensor.hf, tensor.hf_shapes, strict=True) if tensor.hf else ()
        return tuple(TensorSpec(prefix + name, dtype, shape) for name, shape in named)

    def kv_cache(self, layer: int) -> tuple[TensorSpec, ...]:
        """k_scale and v_scale."""
        return self.dialect.kv_scales(hf_layer(self.model, layer))

    def cached(self, layer: int) -> tuple[str, ...]:
        """What the scales of a layer's KV cache apply to in engines."""
        return _CACHED[self.model.kinds[layer].mixer] if self.assignment.has_cache(layer) else ()

    @cached_property
    def contents(self) -> Contents:
        """Modules by scheme, and the modules to exclude from quantization."""
        groups: dict[Scheme | None, list[str]] = {None: ["lm_head"]}
        for layer in range(self.model.num_layers):
            prefix = hf_layer(self.model, layer)
            # Engines treat an unquantized matrix of a layer (a router) as a linear.
            matrices = [tensor for tensor in layer_copies(self.model, layer) if len(tensor.shape) == 2]
            groups[None] += [prefix + name.removesuffix(".weight") for tensor in matrices for name in tensor.hf]
            for linear in self.assignment.layer(layer):
                groups.setdefault(self.scheme(layer, linear), []).extend(prefix + name for name in linear.hf)
        excluded = groups.pop(None)
        return Contents({scheme: found for scheme, found in groups.items() if scheme}, excluded, self.assignment.kv_cache)

    @property
    def excluded(self) -> list[str]:
        """The modules to exclude from quantization; empty if the output has no quantized modules."""
        return list(self.contents.excluded) if self.contents.groups else []

    @property
    def dialect_name(self) -> str:
        """The recipe's dialect, or compressed-tensors if that does not support the schemes; "plain" without schemes."""
        used, wanted = [scheme.name for scheme in self.contents.groups], self.assignment.recipe.hf
        if not used:
            return "plain"
        alone = wanted == "compressed-tensors" or len(used) == 1
        return wanted if alone and set(used) <= set(carried(wanted)) else "compressed-tensors"

    @cached_property
    def dialect(self) -> Dialect:
        """Names, shapes and configs of the quantized tensors."""
        return DIALECTS[self.dialect_name]

    @property
    def facts(self) -> dict[str, Any]:
        """The excluded modules and the dialect."""
        return {"excluded": self.excluded, "dialect": self.dialect_name}
