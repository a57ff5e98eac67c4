"""The layer stream: reads a checkpoint and quantizes it, one layer at a time, into what the writers store."""

from __future__ import annotations

import ctypes
import gc
import math
import sys
from collections.abc import Container, Generator, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from mptq.checkpoint.index import read_blob
from mptq.checkpoint.prefetch import Item, Prefetcher
from mptq.checkpoint.reader import Reader
from mptq.distributed import Ranks
from mptq.model import tensors
from mptq.pipeline.layer_quantizer import LayerQuantizer
from mptq.quantize.quantizer import require_finite
from mptq.types import DTYPE_BYTES, LayerOutput

if TYPE_CHECKING:
    from mptq.calibration.hidden_state_pair import HiddenStatePair
    from mptq.model.tensors import UnquantizedTensor
    from mptq.plan.plan import Plan
    from mptq.report.run_log import Progress, RunLog


def _release_memory() -> None:
    """Free the layer that has been written: ModelOpt ties its modules into cycles, and glibc keeps what is freed."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)


PIECE_BYTES = 1 << 26
"""Of the rows of a tensor outside the layers that are in memory at once."""


class LayerStream:
    """The outputs of one unit after another, in the order of the forward pass; the checkpoint is read two tensors ahead.

    Units are what stands before the layers (0), the layers (from 1), what follows them, and each carried tensor; a
    layer has an output for each of its linears. With `activations`, their two streams go through each layer as it is quantized,
    on all ranks together; of the outputs of a unit that is not among `mine` (None: all are), only the last comes. Peak
    memory: `forecast.peak_memory` of the plan.
    """

    def __init__(
        self,
        plan: Plan,
        device: torch.device,
        record: RunLog,
        progress: Progress,
        activations: HiddenStatePair | None = None,
        mine: Container[int] | None = None,
    ) -> None:
        self.plan = plan
        self.device = device
        self.record = record
        self.progress = progress
        self.activations = activations
        self.ranks = activations.options.ranks if activations else Ranks()
        self.mine = mine
        self.compute_dtype: torch.dtype = getattr(torch, plan.model.dtype)
        self.reader = Reader(plan.source.checkpoint)
        self.ahead: Prefetcher | None = None
        self.work: LayerQuantizer | None = None

    def outputs(self, units: Sequence[int] | None = None) -> Generator[LayerOutput]:
        """The outputs of `units`, or of all; an empty one with `last` set follows those of each."""
        units = range(self.plan.outputs) if units is None else units
        self.ahead = Prefetcher(self._read, (item for unit in units for item in self._items(unit)))
        try:
            for unit in units:
                for output in self.unit(unit):
                    if self._is_mine(unit):
                        yield output
                yield LayerOutput(unit, {form: {} for form in self.plan.formats}, last=True)
                _release_memory()
        finally:
            self.ahead.close()

    def unit(self, unit: int) -> Iterator[LayerOutput]:
        """The outputs of one unit."""
        layers = self.plan.model.num_layers
        if 1 <= unit <= layers:
            self.work = LayerQuantizer(self, unit - 1)
            yield from self.work.outputs()
            self.work = None
            return
        if unit == layers + 1:
            self.finish()
        if self._is_mine(unit):
            for copy in self._copies(unit):
                yield from self._copied(unit, copy)
            if unit == layers + 1 and "megatron" in self.plan.formats:
                yield self._arguments(unit)
        if unit == 0:
            self.start()

    def _is_mine(self, unit: int) -> bool:
        return self.mine is None or unit in self.mine

    def _copies(self, unit: int) -> Sequence[UnquantizedTensor]:
        """The tensors of a unit outside the layers."""
        layers = self.plan.model.num_layers
        before, after = tensors.outer_copies(self.plan.model)
        return {0: before, layers + 1: after}.get(unit) or (self.plan.carried[unit - layers - 2],)

    def _items(self, unit: int) -> Iterator[Item]:
        """What a unit takes from the checkpoint, in its order."""
        if 1 <= unit <= self.plan.model.num_layers:
            prefix = tensors.megatron_layer(unit - 1)
            yield from (Item(prefix + copy.megatron, copy.shape) for copy in self.plan.copies(unit - 1))
            yield from (Item(f"{prefix}{linear.megatron}.weight", linear.shape) for linear in self.plan.linears(unit - 1))
        elif self._is_mine(unit):
            yield from (item for copy in self._copies(unit) for item in self._pieces(copy))

    def _pieces(self, copy: UnquantizedTensor) -> Iterator[Item]:
        """A tensor outside the layers, or, of a large one that Hugging Face stores by rows, some rows after the others."""
        row = math.prod(copy.shape[1:]) * DTYPE_BYTES[self.plan.source.dtype(copy.megatron)]
        height = max(1, PIECE_BYTES // row) if copy.by_rows and self.plan.formats == ("hf",) else copy.shape[0]
        for first in range(0, copy.shape[0], height):
            yield Item(copy.megatron, (min(height, copy.shape[0] - first), *copy.shape[1:]), first)

    def _copied(self, unit: int, copy: UnquantizedTensor) -> Iterator[LayerOutput]:
        """A tensor outside the layers, as it is, the vocabulary's padding cut off for Hugging Face."""
        for item in self._pieces(copy):
            tensor = self.take(*item)
            require_finite(tensor, copy.megatron)
            output = LayerOutput(unit, {form: {} for form in self.plan.formats}, first=item.first)
            self.copied(output, copy, tensor)
            yield output

    def _arguments(self, unit: int) -> LayerOutput:
        """The training arguments, byte by byte: what is never unpickled is never executed."""
        checkpoint = self.plan.source.checkpoint
        blobs = {
            name: read_blob(checkpoint.directory, record)
            for name, record in checkpoint.blobs.items()
            if name.partition("/")[0] == "common_state"
        }
        return LayerOutput(unit, {form: {} for form in self.plan.formats}, blobs)

    def copied(self, output: LayerOutput, copy: UnquantizedTensor, tensor: torch.Tensor, layer: int | None = None) -> None:
        """Add to an output what each format stores of a tensor that keeps its precision."""
        for form in self.plan.formats:
            specs = self.plan.copy_specs(form, copy, layer)
            if specs:
                parts = copy.for_hf(tensor, output.first) if form == "hf" else tensor.split([spec.shape[0] for spec in specs])
                # Rows of padding alone are nothing to Hugging Face.
                output.tensors[form] |= {spec.name: part for spec, part in zip(specs, parts, strict=True) if len(part)}

    def start(self) -> None:
        """Let both streams of activations through what stands before the layers."""
        if self.activations:
            before, _ = tensors.outer_copies(self.plan.model)
            with self.record.timed("forward"):
                self.activations.embed([self.read(copy.megatron, copy.shape) for copy in before])

    def finish(self) -> None:
        """Let both streams of activations through what follows the layers, and record what they say."""
        if not self.activations:
            return
        (words, *_), norms = tensors.outer_copies(self.plan.model)
        if self.plan.model.tied_embeddings:
            norms = (*norms, words)
        with self.record.timed("forward"):
            self.progress.doing("measuring the fidelity")
            *norm, head = (self.read(copy.megatron, copy.shape) for copy in norms)
            self.record.fidelity = self.activations.finish(norm, head)

    def take(self, inner: str, shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
        """The inner tensor (or rows of it) that is next in the order of the run, in its own dtype, in (pinned) CPU memory."""
        assert self.ahead is not None
        with self.record.timed("waiting to read"):
            tensor = self.ahead.take(Item(inner, shape, first))
        self.progress.bytes(tensor.nbytes)
        return tensor

    def read(self, inner: str, shape: tuple[int, ...]) -> torch.Tensor:
        """An inner tensor out of that order, for the activations: in their dtype, on the device."""
        return self._read(Item(inner, shape)).to(self.device, self.compute_dtype)

    def _read(self, item: Item) -> torch.Tensor:
        with self.record.timed("read"):
            # Pinned, a GPU fetches it by itself, while the next is read.
            dtype, pinned = getattr(torch, self.plan.source.dtype(item.name)), self.device.type == "cuda"
            out = torch.empty(item.shape, dtype=dtype, pin_memory=pinned)
            self.record.bytes["read"] += out.nbytes
            return self.reader.read_parts(self.plan.source.places[item.name], out, item.first)
