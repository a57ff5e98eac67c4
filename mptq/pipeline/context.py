"""What the steps of a run share: plan, device, reader of the checkpoint's tensors, and log."""

from __future__ import annotations

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from mptq.checkpoint.prefetch import Item, Prefetcher
from mptq.checkpoint.reader import Reader
from mptq.distributed import Ranks
from mptq.formats.layout import canonical_weight
from mptq.model.tensors import megatron_layer
from mptq.plan.estimates import PIECE_BYTES
from mptq.types import DTYPE_BYTES

if TYPE_CHECKING:
    from mptq.calibration.hidden_state_pair import HiddenStatePair
    from mptq.model.tensors import UnquantizedTensor
    from mptq.plan.plan import Plan
    from mptq.plan.units import Unit
    from mptq.report.run_log import Progress, RunLog


@dataclass(frozen=True)
class RunContext:
    """The run on this process. `mine` has the numbers of the units that it writes (None: all).

    With `sensitivity`, what each group of linears does to the hidden states is measured.
    """

    plan: Plan
    device: torch.device
    log: RunLog
    progress: Progress
    hidden_states: HiddenStatePair | None = None
    mine: Container[int] | None = None
    ranks: Ranks = field(default_factory=Ranks)
    sensitivity: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """The model's compute dtype."""
        found: torch.dtype = getattr(torch, self.plan.model.dtype)
        return found

    def writes(self, unit: Unit) -> bool:
        """Whether this process writes `unit`."""
        return self.mine is None or unit.number in self.mine


class PlannedReader:
    """Reads the tensors of units in the order of the run, two tensors ahead; `read` reads any tensor out of order.

    Memory: the tensor taken last, and the next two (pinned if the device is a GPU, for asynchronous copies).
    """

    def __init__(self, context: RunContext, units: Sequence[Unit]) -> None:
        self.context = context
        self._reader = Reader(context.plan.source.checkpoint)
        self._prefetcher = Prefetcher(self._read, (item for unit in units for item in self._items(unit)))

    def _items(self, unit: Unit) -> Iterator[Item]:
        """Yields what a unit takes from the checkpoint, in order."""
        plan = self.context.plan
        if unit.layer is not None:
            prefix = megatron_layer(unit.layer)
            yield from (Item(prefix + tensor.megatron, tensor.shape) for tensor in plan.unquantized(unit.layer))
            yield from (Item(canonical_weight(unit.layer, linear), linear.shape) for linear in plan.linears(unit.layer))
        elif self.context.writes(unit):
            yield from (item for tensor in plan.units.tensors(unit) for item in self.pieces(tensor))

    def pieces(self, tensor: UnquantizedTensor) -> Iterator[Item]:
        """Yields a tensor outside the layers, in blocks of rows if it is large and every format supports that."""
        plan = self.context.plan
        row = math.prod(tensor.shape[1:]) * DTYPE_BYTES[plan.source.dtype(tensor.megatron)]
        by_rows = tensor.by_rows and plan.by_rows
        height = max(1, PIECE_BYTES // row) if by_rows else tensor.shape[0]
        for first in range(0, tensor.shape[0], height):
            yield Item(tensor.megatron, (min(height, tensor.shape[0] - first), *tensor.shape[1:]), first)

    def take(self, name: str, shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
        """Returns the next tensor (or its rows) in the order of the run, in its stored dtype, in CPU memory."""
        with self.context.log.timed("waiting to read"):
            tensor = self._prefetcher.take(Item(name, shape, first))
        self.context.progress.bytes(tensor.nbytes)
        return tensor

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Reads a tensor out of order, for the hidden states: in the compute dtype, on the device."""
        return self._read(Item(name, shape)).to(self.context.device, self.context.dtype)

    def _read(self, item: Item) -> torch.Tensor:
        context = self.context
        with context.log.timed("read"):
            dtype, pinned = getattr(torch, context.plan.source.dtype(item.name)), context.device.type == "cuda"
            out = torch.empty(item.shape, dtype=dtype, pin_memory=pinned)
            context.log.bytes["read"] += out.nbytes
            return self._reader.read_parts(context.plan.source.places[item.name], out, item.first)

    def close(self) -> None:
        """Stops reading."""
        self._prefetcher.close()
