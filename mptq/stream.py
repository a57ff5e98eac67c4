"""The layer stream: reads a checkpoint and quantizes it, one layer at a time, into what the writers store."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mptq.arch import naming
from mptq.arch.layer import build_layer, hold_linears
from mptq.checkpoint.index import read_blob
from mptq.checkpoint.reader import Reader
from mptq.layer_work import LayerWork, place
from mptq.quantize.fp8 import require_finite
from mptq.types import LayerOutput

if TYPE_CHECKING:
    from mptq.arch.naming import Copy
    from mptq.plan import Plan
    from mptq.record import Progress, Record
    from mptq.streams import Streams


def _release_memory() -> None:
    """Free the layer that has been written: ModelOpt ties its modules into cycles, and glibc keeps what is freed."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)


class LayerStream:
    """One LayerOutput after another, in the order of the forward pass. Peak memory: `forecast.peak_memory` of the plan.

    With `activations`, their two streams go through each layer as it is quantized; `hidden` and `fidelity` are what they said.
    """

    def __init__(
        self, plan: Plan, device: torch.device, record: Record, progress: Progress, activations: Streams | None = None
    ) -> None:
        self.plan = plan
        self.device = device
        self.record = record
        self.progress = progress
        self.activations = activations
        self.compute_dtype: torch.dtype = getattr(torch, plan.model.dtype)
        self.reader = Reader(plan.source.checkpoint)

    def outputs(self) -> Iterator[LayerOutput]:
        """The embedding, every layer, and what follows the layers."""
        before, after = naming.outer_copies(self.plan.model)
        layers = self.plan.model.num_layers
        yield self.outer(0, before)
        self.start()
        gc.collect()
        gc.freeze()  # what the imports made is not looked through again after every layer
        try:
            for index in range(layers):
                yield self.layer(index)[1]
                _release_memory()
        finally:
            gc.unfreeze()
        self.finish()
        final = self.outer(layers + 1, after)
        checkpoint = self.plan.source.checkpoint
        # The training arguments go over byte by byte: what is never unpickled is never executed.
        final.blobs = {
            name: read_blob(checkpoint.directory, record)
            for name, record in checkpoint.blobs.items()
            if name.partition("/")[0] == "common_state"
        }
        yield final
        for number, copy in enumerate(self.plan.carried):
            yield self.outer(layers + 2 + number, [copy])

    def outer(self, index: int, copies: Sequence[Copy]) -> LayerOutput:
        """Tensors outside the layers, as they are, the vocabulary's padding cut off for Hugging Face."""
        output = LayerOutput(index, {form: {} for form in self.plan.formats})
        for copy in copies:
            tensor = self.read(copy.megatron, copy.shape)
            require_finite(tensor, copy.megatron)
            self.copied(output, copy, tensor)
        return output

    def copied(self, output: LayerOutput, copy: Copy, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Add to an output what each format stores of a tensor that keeps its precision."""
        for form in self.plan.formats:
            specs = self.plan.copy_specs(form, copy, layer)
            if specs:
                parts = copy.for_hf(tensor) if form == "hf" else tensor.split([spec.shape[0] for spec in specs])
                output.tensors[form] |= {spec.name: part for spec, part in zip(specs, parts, strict=True)}

    def start(self) -> None:
        """Let both streams of activations through what stands before the layers."""
        if self.activations:
            before, _ = naming.outer_copies(self.plan.model)
            with self.record.timed("forward"):
                self.activations.embed([self.read(copy.megatron, copy.shape, self.compute_dtype) for copy in before])

    def finish(self) -> None:
        """Let both streams of activations through what follows the layers, and record what they say."""
        if not self.activations:
            return
        (words, *_), norms = naming.outer_copies(self.plan.model)
        if self.plan.model.tied_embeddings:
            norms = (*norms, words)
        with self.record.timed("forward"):
            self.progress.doing("measuring the fidelity")
            *norm, head = (self.read(copy.megatron, copy.shape, self.compute_dtype) for copy in norms)
            self.record.fidelity = self.activations.finish(norm, head)

    def layer(self, index: int) -> tuple[torch.nn.Module, LayerOutput]:
        """One layer of megatron-core, quantized for good and frozen, and what the writers store of it."""
        output = LayerOutput(index + 1, {form: {} for form in self.plan.formats})
        runs = not self.plan.model.not_run
        module = build_layer(self.plan.model, index) if runs else hold_linears(self.plan.model, index)
        work = LayerWork(self, index, module, output)
        prefix = naming.megatron_layer(index)
        for copy in self.plan.copies(index):
            tensor = self.read(prefix + copy.megatron, copy.shape)
            require_finite(tensor, prefix + copy.megatron)
            work.copies[copy.megatron] = tensor
            if runs:
                place(module, copy.parameter, tensor.to(self.device))
            self.copied(output, copy, tensor, index)
        if self.activations:
            work.calibrate(self.activations)
        for linear in self.plan.linears(index):
            work.linear(linear)
        if self.activations:
            work.compare(self.activations)
        return module, output

    def read(self, inner: str, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> torch.Tensor:
        """An inner tensor in its own dtype, or in `dtype` and on the device."""
        own: torch.dtype = getattr(torch, self.plan.source.dtype(inner))
        with self.record.timed("read"):
            tensor = self.reader.read_parts(self.plan.source.places[inner], torch.empty(shape, dtype=dtype or own))
            count = tensor.numel() * own.itemsize
            self.record.bytes["read"] += count
            self.progress.bytes(count)
            return tensor if dtype is None else tensor.to(self.device)
