"""The layer stream: reads a checkpoint and quantizes it, one layer at a time, into what the writers store."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mptq import report
from mptq.arch import naming
from mptq.arch.layer import build_layer
from mptq.checkpoint.index import read_blob
from mptq.checkpoint.reader import Reader
from mptq.quantize.fp8 import require_finite, weight_error
from mptq.quantize.logical import to_members
from mptq.quantize.modelopt import compress_linear, megatron_state
from mptq.types import LayerOutput

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from mptq.arch.naming import Copy, Linear
    from mptq.plan import Plan
    from mptq.record import Progress, Record
    from mptq.types import Fp8Weight


def _release_memory() -> None:
    """Free the layer that has been written: ModelOpt ties its modules into cycles, and glibc keeps what is freed."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)


class LayerStream:
    """One LayerOutput after another, in the order of the forward pass. Peak memory: `plan.peak_memory`."""

    def __init__(self, plan: Plan, device: torch.device, record: Record, progress: Progress) -> None:
        self.plan = plan
        self.device = device
        self.record = record
        self.progress = progress
        self.reader = Reader(plan.source.checkpoint)

    def outputs(self) -> Iterator[LayerOutput]:
        """The embedding, every layer, and what follows the layers."""
        first, *last = naming.outer_copies(self.plan.model)
        layers = self.plan.model.num_layers
        yield self.outer(0, [first])
        gc.collect()
        gc.freeze()  # what the imports made is not looked through again after every layer
        try:
            for index in range(layers):
                yield self.layer(index)[1]
                _release_memory()
        finally:
            gc.unfreeze()
        final = self.outer(layers + 1, last)
        checkpoint = self.plan.source.checkpoint
        # The training arguments go over byte by byte: what is never unpickled is never executed.
        final.blobs = {
            name: read_blob(checkpoint.directory, record)
            for name, record in checkpoint.blobs.items()
            if name.partition("/")[0] == "common_state"
        }
        yield final

    def outer(self, index: int, copies: Sequence[Copy]) -> LayerOutput:
        """Tensors outside the layers, as they are, the vocabulary's padding cut off for Hugging Face."""
        output = LayerOutput(index, {form: {} for form in self.plan.formats})
        for copy in copies:
            tensor = self.read(copy.megatron, copy.shape)
            require_finite(tensor, copy.megatron)
            for form in self.plan.formats:
                kept = tensor if form == "megatron" else tensor[: copy.hf_rows]
                output.tensors[form][self.plan.copy_spec(form, copy).name] = kept
        return output

    def layer(self, index: int) -> tuple[TransformerLayer, LayerOutput]:
        """One layer of megatron-core, quantized for good and frozen, and what the writers store of it."""
        output = LayerOutput(index + 1, {form: {} for form in self.plan.formats})
        module = build_layer(self.plan.model, index)
        prefix = naming.megatron_layer(index)
        for copy in naming.layer_copies(self.plan.model):
            tensor = self.read(prefix + copy.megatron, copy.shape)
            require_finite(tensor, prefix + copy.megatron)
            owner, _, attribute = copy.megatron.rpartition(".")
            setattr(module.get_submodule(owner), attribute, torch.nn.Parameter(tensor.to(self.device), requires_grad=False))
            for form in self.plan.formats:
                output.tensors[form][self.plan.copy_spec(form, copy, index).name] = tensor
        for linear in self.plan.linears:
            self.linear(module, linear, index, output)
        return module, output

    def linear(self, module: TransformerLayer, linear: Linear, index: int, output: LayerOutput) -> None:
        """Quantize one linear of `module` in place, and add to `output` what each format stores of it."""
        name = f"{naming.megatron_layer(index)}{linear.megatron}.weight"
        source = self.read(name, linear.shape, float32=True)
        target = module.get_submodule(linear.megatron)
        with self.record.timed("quantize"):
            fused = compress_linear(target, source, self.plan.recipe, name)
        if "megatron" in self.plan.formats:
            self._row("megatron", name, fused, source, name)
            self._megatron(linear, index, fused, target, output)
        if "hf" in self.plan.formats:
            self._hf(linear, index, fused, source, output)

    def _megatron(self, linear: Linear, index: int, fused: Fp8Weight, target: torch.nn.Module, output: LayerOutput) -> None:
        owner = f"{naming.megatron_layer(index)}{linear.megatron}."
        tensors, output.blobs[f"{owner}_extra_state/shard_0_1"] = megatron_state(target)
        tensors |= zip(linear.keys, fused.data.chunk(len(linear.keys)), strict=True)
        output.tensors["megatron"] |= {owner + key: tensor.cpu() for key, tensor in tensors.items()}

    def _hf(self, linear: Linear, index: int, fused: Fp8Weight, source: torch.Tensor, output: LayerOutput) -> None:
        inner = f"{naming.megatron_layer(index)}{linear.megatron}.weight"
        specs = list(self.plan.hf_linear_specs(index, linear))
        parts = linear.fusion.split(source)
        if not self.plan.in_hf(linear):
            for spec, part in zip(specs, parts, strict=True):
                output.tensors["hf"][spec.name] = part.to(getattr(torch, spec.dtype)).cpu()
            return
        with self.record.timed("quantize"):
            members = to_members(fused, source, linear, self.plan.recipe, inner)
        for (weight, scale), part, member in zip(zip(specs[::2], specs[1::2], strict=True), parts, members, strict=True):
            output.tensors["hf"][weight.name] = member.data.cpu()
            output.tensors["hf"][scale.name] = member.scale.expand(scale.shape).contiguous().cpu()
            self._row("hf", weight.name, member, part, inner)

    def _row(self, form: str, name: str, weight: Fp8Weight, source: torch.Tensor, inner: str) -> None:
        with self.record.timed("measure"):
            error = weight_error(source, weight, self.plan.recipe.block)
        row = report.tensor_row(form, name, inner, self.plan.source.dtype(inner), tuple(source.shape), error)
        self.record.rows.append(row)
        self.progress.tensor(row)

    def read(self, inner: str, shape: tuple[int, ...], float32: bool = False) -> torch.Tensor:
        """An inner tensor in its own dtype, or in float32 and on the device."""
        dtype = torch.float32 if float32 else getattr(torch, self.plan.source.dtype(inner))
        with self.record.timed("read"):
            tensor = self.reader.read_parts(self.plan.source.places[inner], torch.empty(shape, dtype=dtype))
            return tensor.to(self.device) if float32 else tensor
