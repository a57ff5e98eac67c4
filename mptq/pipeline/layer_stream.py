"""Reads and quantizes a checkpoint, one unit at a time, and yields what the formats store."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import TYPE_CHECKING

from mptq.formats import FORMATS
from mptq.model.tensors import outer_copies
from mptq.pipeline.context import PlannedReader, RunContext
from mptq.pipeline.layer_quantizer import LayerQuantizer
from mptq.pipeline.stored import add, empty, store_unquantized
from mptq.plan.units import Unit, UnitKind
from mptq.quantize.quantizer import require_finite

if TYPE_CHECKING:
    from mptq.model.tensors import UnquantizedTensor
    from mptq.types import LayerOutput


def _release_memory() -> None:
    """Frees a written layer: ModelOpt's modules form reference cycles, and glibc keeps freed memory."""
    gc.collect()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # not in every C library
        if trim is not None:
            trim(0)


class LayerStream:
    """Produces the outputs of all units, in the order of the forward pass; reads the checkpoint two tensors ahead.

    A layer has one output per linear. Hidden states, if any, pass through each layer as it is quantized, on all ranks
    together. For a unit that another rank writes, only the empty last output is yielded. Peak memory:
    `estimates.peak_memory`.
    """

    def __init__(self, context: RunContext, units: Sequence[Unit] | None = None) -> None:
        self.context = context
        self.units = context.plan.units if units is None else units

    def outputs(self) -> Generator[LayerOutput]:
        """Yields the outputs of the units; those of each unit are followed by an empty one with `last` set."""
        reader = PlannedReader(self.context, self.units)
        try:
            for unit in self.units:
                for output in self._unit(unit, reader):
                    if self.context.writes(unit):
                        yield output
                yield empty(self.context.plan, unit, last=True)
                _release_memory()
        finally:
            reader.close()

    def _unit(self, unit: Unit, reader: PlannedReader) -> Iterator[LayerOutput]:
        if unit.layer is not None:
            yield from LayerQuantizer(self.context, reader, unit).outputs()
            return
        if unit.kind is UnitKind.AFTER:
            self._measure(reader)
        if self.context.writes(unit):
            for tensor in self.context.plan.units.tensors(unit):
                yield from self._unquantized(unit, tensor, reader)
        if unit.kind is UnitKind.AFTER and self.context.writes(unit):
            yield self._rest(unit)
        if unit.kind is UnitKind.BEFORE:
            self._embed(reader)

    def _unquantized(self, unit: Unit, tensor: UnquantizedTensor, reader: PlannedReader) -> Iterator[LayerOutput]:
        """Yields a tensor outside the layers, unchanged."""
        for item in reader.pieces(tensor):
            values = reader.take(*item)
            require_finite(values, tensor.megatron)
            output = empty(self.context.plan, unit, first=item.first)
            store_unquantized(self.context.plan, output, tensor, values)
            yield output

    def _rest(self, unit: Unit) -> LayerOutput:
        """Returns what formats store besides the model's tensors."""
        output = empty(self.context.plan, unit)
        for form, layout in self.context.plan.layouts.items():
            add(output, form, FORMATS[form].store_rest(layout))
        return output

    def _embed(self, reader: PlannedReader) -> None:
        """Initializes the hidden states from the embeddings."""
        states = self.context.hidden_states
        if states:
            before, _ = outer_copies(self.context.plan.model)
            with self.context.log.timed("forward"):
                states.embed([reader.read(tensor.megatron, tensor.shape) for tensor in before])

    def _measure(self, reader: PlannedReader) -> None:
        """Runs the hidden states through the final norm and the output layer, and records the fidelity."""
        states, plan = self.context.hidden_states, self.context.plan
        if not states:
            return
        (words, *_), after = outer_copies(plan.model)
        after = (*after, words) if plan.model.tied_embeddings else after
        with self.context.log.timed("forward"):
            self.context.progress.doing("measuring the fidelity")
            *norm, head = (reader.read(tensor.megatron, tensor.shape) for tensor in after)
            self.context.log.fidelity = states.finish(norm, head)
