"""Converts tensors to and from the Hugging Face format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mptq.formats.layout import canonical_weight
from mptq.formats.protocol import LoadedWeight, OpenedOutput, QuantizedCache, QuantizedLinear, Stored
from mptq.quantize.fp8 import scale_of
from mptq.quantize.quantizer import require_finite

if TYPE_CHECKING:
    from mptq.formats.hf.layout import HfLayout
    from mptq.model.tensors import LinearSpec, UnquantizedTensor
    from mptq.types import TensorSpec


def store_linear(layout: HfLayout, linear: QuantizedLinear) -> Stored:
    """Returns the tensors of each projection, quantized or in the original precision."""
    spec, specs = linear.spec, iter(layout.linear(linear.layer, linear.spec))
    found: dict[str, torch.Tensor] = {}
    if linear.weights is None:
        require_finite(linear.source, canonical_weight(linear.layer, spec))
        for stored, part in zip(specs, spec.fusion.split(linear.source), strict=True):
            found[stored.name] = part.to(getattr(torch, stored.dtype)).cpu()
        return Stored(found)
    for made in linear.weights:
        data, scale, weight = next(specs), next(specs), made.weight
        found[data.name] = weight.data.cpu()
        # contiguous() would keep the stride of a single element, and writers need the raw bytes.
        found[scale.name] = weight.scale.expand(scale.shape).clone(memory_format=torch.contiguous_format).cpu()
        if linear.input_amax is not None:
            static = next(specs)
            found[static.name] = scale_of(linear.input_amax).reshape(static.shape).cpu()
    return Stored(found)


def store_unquantized(tensor: UnquantizedTensor, specs: Sequence[TensorSpec], values: torch.Tensor, first: int) -> Stored:
    """Returns the tensor, or one tensor per projection; empty for rows that are all vocabulary padding."""
    parts = zip(specs, tensor.for_hf(values, first), strict=True) if specs else ()
    return Stored({spec.name: part for spec, part in parts if len(part)})


def store_kv_cache(layout: HfLayout, cache: QuantizedCache) -> Stored:
    """Returns k_scale and v_scale: amax / 448, float32."""
    pairs = zip(layout.kv_cache(cache.layer), cache.amax, strict=True)
    return Stored({spec.name: scale_of(value).reshape(spec.shape).cpu() for spec, value in pairs})


def load_linear(layout: HfLayout, output: OpenedOutput, layer: int, linear: LinearSpec) -> Iterator[LoadedWeight]:
    """Yields the weight of each projection."""
    specs = {spec.name for spec in layout.linear(layer, linear)}
    for name in layout.weights(layer, linear):
        scale = f"{name.removesuffix('.weight')}.{layout.dialect.scale_name}"
        yield LoadedWeight(name, output.load(name), output.load(scale) if scale in specs else None)
