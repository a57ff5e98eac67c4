"""The tensors of the Hugging Face format, and the modules that engines must not expect in FP8. No torch.

docs/formats.md has the forms, and which engine reads which.
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
"""Mixer -> what a layer's KV cache holds in engines.

"latent" is the row that they cache of multi-latent attention: the latent after its norm and the rotated shared key, with one
scale (vLLM: `concat_and_cache_mla` takes `_k_scale` alone).
"""


class HfLayout(Layout):
    """Projections each by themselves, in the form (`dialect`) that the recipe names or all of its schemes need."""

    splits = True
    takes_rows = True

    def scheme(self, layer: int, linear: LinearSpec) -> Scheme | None:
        """The recipe's, where engines read it of the linear and of all that they fuse with it."""
        wanted = self.assignment.scheme(layer, linear)
        if wanted is None or self.assignment.group_fits(layer, linear):
            return wanted
        return ROWS if self.assignment.recipe.misaligned == "per-channel" else None

    def linear(self, layer: int, linear: LinearSpec) -> tuple[TensorSpec, ...]:
        """Of each projection its weight, scale and static input scale."""
        scheme, dtype, found = self.scheme(layer, linear), self.dtype(layer, linear), list[TensorSpec]()
        for member, shape in linear.members:
            name = hf_layer(self.model, layer) + member
            found.append(TensorSpec(f"{name}.weight", dtype, shape))
            if scheme is not None:
                found.append(self.dialect.scale(name, scheme, *shape))
                found += [self.dialect.input_scale(name)] if scheme.static else []
        return tuple(found)

    def weights(self, layer: int, linear: LinearSpec) -> tuple[str, ...]:
        """Those of the projections."""
        return tuple(f"{hf_layer(self.model, layer)}{member}.weight" for member in linear.hf)

    def unquantized(self, tensor: UnquantizedTensor, layer: int | None = None) -> tuple[TensorSpec, ...]:
        """One tensor, or one a projection; none of what Hugging Face does not have."""
        dtype = self.source.dtype(("" if layer is None else megatron_layer(layer)) + tensor.megatron)
        prefix = "" if layer is None else hf_layer(self.model, layer)
        named = zip(tensor.hf, tensor.hf_shapes, strict=True) if tensor.hf else ()
        return tuple(TensorSpec(prefix + name, dtype, shape) for name, shape in named)

    def kv_cache(self, layer: int) -> tuple[TensorSpec, ...]:
        """k_scale and v_scale."""
        return self.dialect.kv_scales(hf_layer(self.model, layer))

    def cached(self, layer: int) -> tuple[str, ...]:
        """What engines cache."""
        return _CACHED[self.model.kinds[layer].mixer] if self.assignment.has_cache(layer) else ()

    @cached_property
    def contents(self) -> Contents:
        """Modules by scheme, and those that engines must not expect in FP8."""
        groups: dict[Scheme | None, list[str]] = {None: ["lm_head"]}
        for layer in range(self.model.num_layers):
            prefix = hf_layer(self.model, layer)
            # An unquantized matrix of a layer (a router) is a linear to engines.
            matrices = [tensor for tensor in layer_copies(self.model, layer) if len(tensor.shape) == 2]
            groups[None] += [prefix + name.removesuffix(".weight") for tensor in matrices for name in tensor.hf]
            for linear in self.assignment.layer(layer):
                groups.setdefault(self.scheme(layer, linear), []).extend(prefix + name for name in linear.hf)
        excluded = groups.pop(None)
        return Contents({scheme: found for scheme, found in groups.items() if scheme}, excluded, self.assignment.kv_cache)

    @property
    def excluded(self) -> list[str]:
        """The modules that keep their precision beside those that do not."""
        return list(self.contents.excluded) if self.contents.groups else []

    @property
    def dialect_name(self) -> str:
        """The recipe's, unless it cannot hold all the schemes together."""
        used, wanted = [scheme.name for scheme in self.contents.groups], self.assignment.recipe.hf
        if not used:
            return "plain"
        alone = wanted == "compressed-tensors" or len(used) == 1
        return wanted if alone and set(used) <= set(carried(wanted)) else "compressed-tensors"

    @cached_property
    def dialect(self) -> Dialect:
        """How names, shapes and configs are spelled."""
        return DIALECTS[self.dialect_name]

    @property
    def facts(self) -> dict[str, Any]:
        """The excluded modules and the dialect."""
        return {"excluded": self.excluded, "dialect": self.dialect_name}
