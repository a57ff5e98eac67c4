"""The processes of a run, started by torchrun: each takes a share of the work; rank 0 plans and finishes."""

from __future__ import annotations

import os
import pickle
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mptq.errors import MptqError

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup, Store

PATIENCE = timedelta(hours=2)
"""How long a process that has finished its share waits for the others, whose shares have about as many bytes."""


@dataclass(slots=True)
class Ranks:
    """This process, number `rank` of `size`, and its communication with the others.

    Objects go through torch's key-value store; tensors go through separate process groups, gloo on CPUs and NCCL on
    GPUs. None of these is torch's default group: ModelOpt and megatron-core would assume that one model is sharded over
    it, and reduce the scales of different layers into one.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    talks: int = 0
    groups: dict[str, ProcessGroup] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is rank 0, which plans, finishes and prints."""
        return self.rank == 0

    def broadcast_object(self, value: Callable[[], Any]) -> Any:
        """Calls `value` on rank 0 and returns the result on every rank.

        If `value` raises, rank 0 raises the same exception and the others raise MptqError.
        """
        if self.store is None:
            return value()
        self.talks += 1
        key = f"mptq/{self.talks}"
        if not self.first:
            with _peer_failures():
                succeeded, content = self._get(key)
            if not succeeded:
                raise MptqError("rank 0 failed: see its error message")
            return content
        try:
            content = value()
        except BaseException:
            self._set(key, (False, None))
            raise
        self._set(key, (True, content))
        return content

    def barrier(self) -> None:
        """Waits for every rank; raises MptqError when one has exited or does not arrive in time."""
        if self.store is not None:
            import torch
            from torch.distributed import BarrierOptions

            with _peer_failures():
                self._group(torch.device("cpu")).barrier(BarrierOptions()).wait()

    def all_gather(self, value: Any) -> list[Any]:
        """Returns the `value` of every rank, in rank order, on every rank."""
        if self.store is None:
            return [value]
        self.talks += 1
        keys = [f"mptq/{self.talks}/{rank}" for rank in range(self.size)]
        self._set(keys[self.rank], value)
        self.barrier()
        with _peer_failures():
            return [self._get(key) for key in keys]

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Fills the contiguous `tensor` with that of rank `source`, which has the same shape and dtype."""
        if self.store is None:
            return
        import torch
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        with _peer_failures():
            self._group(tensor.device).broadcast([tensor.view(-1).view(torch.uint8)], options).wait()

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """Reduces `tensor` [any] in place to its elementwise maximum over all ranks, and returns it."""
        if self.store is None or not tensor.numel():
            return tensor
        from torch.distributed import AllreduceOptions, ReduceOp

        options = AllreduceOptions()
        options.reduceOp = ReduceOp.MAX
        with _peer_failures():
            self._group(tensor.device).allreduce([tensor], options).wait()
        return tensor

    def _group(self, device: torch.device) -> ProcessGroup:
        """Returns the process group for tensors on `device`, created on first use, by all ranks at once."""
        from torch import distributed

        if device.type not in self.groups:
            assert self.store is not None
            made = {"cpu": "ProcessGroupGloo", "cuda": "ProcessGroupNCCL"}[device.type]
            store = distributed.PrefixStore(f"mptq/{device.type}", self.store)
            self.groups[device.type] = getattr(distributed, made)(store, self.rank, self.size, PATIENCE)
        return self.groups[device.type]

    def _set(self, key: str, content: Any) -> None:
        assert self.store is not None
        self.store.set(key, b64encode(pickle.dumps(content)).decode())

    def _get(self, key: str) -> Any:
        """Waits until a rank sets `key`. Only processes of this run write to the store (docs/security.md)."""
        assert self.store is not None
        return pickle.loads(b64decode(self.store.get(key)))  # noqa: S301


@contextmanager
def _peer_failures() -> Iterator[None]:
    from torch.distributed import DistBackendError

    try:
        yield
    except DistBackendError as error:  # NCCL's; its last line has the reason
        raise MptqError(
            f"the GPUs of the processes cannot exchange tensors, or a process has exited (NCCL: "
            f"{str(error).strip().rpartition('\n')[2]}); finished units are kept for --resume"
        ) from error
    except RuntimeError as error:  # torch's DistError: a timeout or a closed connection
        raise MptqError(
            "another process of the run has exited: see its error message; finished units are kept for --resume"
        ) from error


def _size() -> int:
    """Number of processes: WORLD_SIZE, which torchrun sets, or 1."""
    words = os.environ.get("WORLD_SIZE", "1")
    if not words.isdecimal() or words == "0":
        raise MptqError(f"WORLD_SIZE is {words!r}, which is not a number of processes: unset it to run a single process")
    return int(words)


def is_first() -> bool:
    """Whether this process is rank 0, or the only one. Does not import torch."""
    return _size() == 1 or os.environ.get("RANK") == "0"


def started() -> Ranks:
    """Connects to the other processes that torchrun started, if there are any.

    Raises MptqError when WORLD_SIZE is not a number or the processes cannot connect.
    """
    if _size() == 1:
        return Ranks()
    from torch.distributed import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    except (ValueError, RuntimeError) as error:  # a missing variable, or a store that cannot be reached
        reason = str(error).partition("\n")[0]
        raise MptqError(
            f"WORLD_SIZE is {_size()}, but the processes cannot connect to each other ({reason}): start them with torchrun, or "
            "unset WORLD_SIZE to run a single process"
        ) from error
    return Ranks(rank, size, store)


def shares(weights: Mapping[int, int], size: int) -> list[set[int]]:
    """Returns the units of each rank. Each unit, largest first, goes to the rank with the fewest bytes so far.

    `weights` are bytes by unit.
    """
    found: list[set[int]] = [set() for _ in range(size)]
    loads = [0] * size
    for unit in sorted(weights, key=lambda unit: (-weights[unit], unit)):
        rank = loads.index(min(loads))
        found[rank].add(unit)
        loads[rank] += weights[unit]
    return found
