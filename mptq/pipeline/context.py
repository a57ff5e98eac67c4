"""What the steps of a run share: the plan, the device, the checkpoint's tensors as they are read, and what is recorded."""

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
    """The run on this process. `mine` are the numbers of the units that it writes (None: all)."""

    plan: Plan
    device: torch.device
    log: RunLog
    progress: Progress
    hidden_states: HiddenStatePair | None = None
    mine: Container[int] | None = None
    ranks: Ranks = field(default_factory=Ranks)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the model computes."""
        found: torch.dtype = getattr(torch, self.plan.model.dtype)
        return found

    def writes(self, unit: Unit) -> bool:
        """Whether this process writes a unit."""
        return self.mine is None or unit.number in self.mine


class PlannedReader:
    """Reads the tensors of units in the order of the run, the next two while one is worked on, and others out of that order.

    Memory: the tensor that was taken last, and the next two (pinned for a GPU, which fetches them by itself).
    """

    def __init__(self, context: RunContext, units: Sequence[Unit]) -> None:
        self.context = context
        self._reader = Reader(context.plan.source.checkpoint)
        self._prefetcher = Prefetcher(self._read, (item for unit in units for item in self._items(unit)))

    def _items(self, unit: Unit) -> Iterator[Item]:
        """What a unit takes from the checkpoint, in its order."""
        plan = self.context.plan
        if unit.layer is not None:
            prefix = megatron_layer(unit.layer)
            yield from (Item(prefix + tensor.megatron, tensor.shape) for tensor in plan.unquantized(unit.layer))
            yield from (Item(canonical_weight(unit.layer, linear), linear.shape) for linear in plan.linears(unit.layer))
        elif self.context.writes(unit):
            yield from (item for tensor in plan.units.tensors(unit) for item in self.pieces(tensor))

    def pieces(self, tensor: UnquantizedTensor) -> Iterator[Item]:
        """A tensor outside the layers, or some rows after the others of a large one, where every format takes it so."""
        plan = self.context.plan
        row = math.prod(tensor.shape[1:]) * DTYPE_BYTES[plan.source.dtype(tensor.megatron)]
        by_rows = tensor.by_rows and plan.by_rows
        height = max(1, PIECE_BYTES // row) if by_rows else tensor.shape[0]
        for first in range(0, tensor.shape[0], height):
            yield Item(tensor.megatron, (min(height, tensor.shape[0] - first), *tensor.shape[1:]), first)

    def take(self, name: str, shape: tuple[int, ...], first: int = 0) -> torch.Tensor:
        """The tensor (or rows of it) that is next in the order of the run, in its own dtype, in CPU memory."""
        with self.context.log.timed("waiting to read"):
            tensor = self._prefetcher.take(Item(name, shape, first))
        self.context.progress.bytes(tensor.nbytes)
        return tensor

    def read(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor out of that order, for the hidden states: in the dtype in which the model computes, on the device."""
        return self._read(Item(name, shape)).to(self.context.device, self.context.dtype)

    def _read(self, item: Item) -> torch.Tensor:
        context = self.context
        with context.log.timed("read"):
            dtype, pinned = getattr(torch, context.plan.source.dtype(item.name)), context.device.type == "cuda"
            out = torch.empty(item.shape, dtype=dtype, pin_memory=pinned)
            context.log.bytes["read"] += out.nbytes
            return self._reader.read_parts(context.plan.source.places[item.name], out, item.first)

    def close(self) -> None:
        """Stop reading."""
        self._prefetcher.close()
