"""Converts tensors to and from the Megatron format."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from mptq.checkpoint.index import read_blob
from mptq.formats.layout import canonical_weight
from mptq.formats.megatron.writer import BACKEND
from mptq.formats.protocol import LoadedWeight, OpenedOutput, QuantizedCache, QuantizedLinear, Stored
from mptq.model.tensors import CORE_ATTENTION, megatron_layer
from mptq.quantize.fp8 import scale_of
from mptq.quantize.modelopt import attention_state, linear_state, modelopt_state, quant_config
from mptq.quantize.quantizer import require_finite

if TYPE_CHECKING:
    from mptq.formats.layout import Layout
    from mptq.formats.megatron.layout import MegatronLayout
    from mptq.model.source import Source
    from mptq.model.tensors import LinearSpec

_STATE = "_extra_state/shard_0_1"


def store_linear(layout: MegatronLayout, linear: QuantizedLinear) -> Stored:
    """Returns the fused matrix, quantized or not, with the state from which ModelOpt restores it."""
    spec, name = linear.spec, canonical_weight(linear.layer, linear.spec)
    owner, (module,) = name.removesuffix("weight"), linear.modules
    found, blob = linear_state(module, linear.input_amax)
    if linear.weights is None:
        require_finite(linear.source, name)
        weight = linear.source.to(getattr(torch, layout.source.dtype(name)))
    else:
        (fused,) = linear.weights
        weight = fused.weight.data
    found |= zip(spec.keys, weight.split(spec.key_rows), strict=True)
    return Stored({owner + key: tensor.cpu() for key, tensor in found.items()}, {owner + _STATE: blob})


def store_kv_cache(cache: QuantizedCache) -> Stored:
    """Returns the amax of ModelOpt's K and V quantizers, with their state."""
    owner = f"{megatron_layer(cache.layer)}{CORE_ATTENTION}."
    tensors, blob = attention_state(cache.attention, *cache.amax)
    return Stored({owner + key: tensor.cpu() for key, tensor in tensors.items()}, {owner + _STATE: blob})


def store_rest(source: Source) -> Stored:
    """Returns the training arguments as raw bytes: they are never unpickled, so nothing in them is executed."""
    checkpoint = source.checkpoint
    wanted = {name: item for name, item in checkpoint.blobs.items() if name.partition("/")[0] == "common_state"}
    return Stored({}, {name: read_blob(checkpoint.directory, item) for name, item in wanted.items()})


def rest_of_files(layout: MegatronLayout) -> dict[str, bytes]:
    """Returns ModelOpt's state of the whole model, and the training arguments if they are in a separate file."""
    assignment, common = layout.assignment, layout.source.checkpoint.directory / "common.pt"
    assert assignment.recipe.scheme is not None
    state = modelopt_state(quant_config(assignment.recipe.scheme, assignment.kv_cache, layout.other_schemes))
    found = {"modelopt_state/common.pt": state, "modelopt_state/metadata.json": BACKEND}
    return found | ({"common.pt": common.read_bytes()} if common.is_file() else {})


def load_linear(layout: Layout, output: OpenedOutput, layer: int, linear: LinearSpec) -> Iterator[LoadedWeight]:
    """Yields the fused matrix, concatenated from its parts along the rows."""
    name = canonical_weight(layer, linear)
    owner, dtype = name.removesuffix("weight"), getattr(torch, layout.dtype(layer, linear))
    data = torch.cat([output.load(owner + key).view(torch.uint8) for key in linear.keys]).view(dtype)
    quantized = layout.scheme(layer, linear) is not None
    yield LoadedWeight(name, data, output.load(f"{owner}weight_quantizer._scale") if quantized else None)


def check_magnitudes(output: OpenedOutput) -> Iterator[str]:
    """Yields a line for each weight whose `_amax` is not 448 times its `_scale`; MX weights have no `_amax`."""
    for name in output.specs:
        scale = f"{name.removesuffix('_amax')}_scale"
        if not name.endswith(".weight_quantizer._amax") or scale not in output.specs:
            continue
        if not torch.equal(scale_of(output.load(name)).flatten(), output.load(scale).flatten()):
            yield f"{name} is not 448 times {scale}: ModelOpt would restore different weights from each"
