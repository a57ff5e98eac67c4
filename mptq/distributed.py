"""The processes of a run, as torchrun starts them: each takes its share of the work, and rank 0 plans and finishes."""

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
"""How long the others may take for their shares, which are of equal bytes, when this process is done with its own."""


@dataclass(slots=True)
class Ranks:
    """This process, number `rank` of `size`.

    They speak through torch's key-value store, and share tensors through process groups of their own, gloo on CPUs and NCCL on
    GPUs. None of these is torch's default group: ModelOpt and megatron-core would take that for the group of a model that is
    spread over the processes, and reduce the scales of different layers into one.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    talks: int = 0
    groups: dict[str, ProcessGroup] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether it is the one that plans, commits and prints."""
        return self.rank == 0

    def broadcast_object(self, value: Callable[[], Any]) -> Any:
        """What `value` gives on rank 0, on every rank; what it raises there is raised there, and MptqError on the others."""
        if self.store is None:
            return value()
        self.talks += 1
        key = f"mptq/{self.talks}"
        if not self.first:
            with _told():
                said, content = self._hear(key)
            if not said:
                raise MptqError("rank 0 has ended: see what it says")
            return content
        try:
            content = value()
        except BaseException:
            self._say(key, (False, None))
            raise
        self._say(key, (True, content))
        return content

    def barrier(self) -> None:
        """Until every rank is here; raises MptqError when one of them has ended, or does not come."""
        if self.store is not None:
            import torch
            from torch.distributed import BarrierOptions

            with _told():
                self._group(torch.device("cpu")).barrier(BarrierOptions()).wait()

    def all_gather(self, value: Any) -> list[Any]:
        """The `value` of every rank, by rank, on every rank."""
        if self.store is None:
            return [value]
        self.talks += 1
        keys = [f"mptq/{self.talks}/{rank}" for rank in range(self.size)]
        self._say(keys[self.rank], value)
        self.barrier()
        with _told():
            return [self._hear(key) for key in keys]

    def broadcast(self, tensor: torch.Tensor, source: int) -> None:
        """Fill a contiguous `tensor` with that of rank `source`, which has the same shape and dtype."""
        if self.store is None:
            return
        import torch
        from torch.distributed import BroadcastOptions

        options = BroadcastOptions()
        options.rootRank, options.rootTensor = source, 0
        with _told():
            self._group(tensor.device).broadcast([tensor.view(-1).view(torch.uint8)], options).wait()

    def all_reduce_max(self, tensor: torch.Tensor) -> torch.Tensor:
        """The elements of `tensor` [any], each the largest of all ranks; in place."""
        if self.store is None or not tensor.numel():
            return tensor
        from torch.distributed import AllreduceOptions, ReduceOp

        options = AllreduceOptions()
        options.reduceOp = ReduceOp.MAX
        with _told():
            self._group(tensor.device).allreduce([tensor], options).wait()
        return tensor

    def _group(self, device: torch.device) -> ProcessGroup:
        """The process group for tensors on `device`, made when it is first asked for: by all ranks at once."""
        from torch import distributed

        if device.type not in self.groups:
            assert self.store is not None
            made = {"cpu": "ProcessGroupGloo", "cuda": "ProcessGroupNCCL"}[device.type]
            store = distributed.PrefixStore(f"mptq/{device.type}", self.store)
            self.groups[device.type] = getattr(distributed, made)(store, self.rank, self.size, PATIENCE)
        return self.groups[device.type]

    def _say(self, key: str, content: Any) -> None:
        assert self.store is not None
        self.store.set(key, b64encode(pickle.dumps(content)).decode())

    def _hear(self, key: str) -> Any:
        """What a rank says there, when it does: of a process of this run (docs/security.md)."""
        assert self.store is not None
        return pickle.loads(b64decode(self.store.get(key)))  # noqa: S301


@contextmanager
def _told() -> Iterator[None]:
    from torch.distributed import DistBackendError

    try:
        yield
    except DistBackendError as error:  # NCCL's, whose last line says what it is
        raise MptqError(
            f"the GPUs of the processes cannot share tensors, or one of the processes has ended (NCCL: "
            f"{str(error).strip().rpartition('\n')[2]}); what was finished is kept for --resume"
        ) from error
    except RuntimeError as error:  # torch's DistError, of a timeout or a closed connection
        raise MptqError(
            "another process of the run has ended: see what it says; what was finished is kept for --resume"
        ) from error


def _size() -> int:
    """How many processes the environment says there are, as torchrun writes it."""
    words = os.environ.get("WORLD_SIZE", "1")
    if not words.isdecimal() or words == "0":
        raise MptqError(f"WORLD_SIZE is {words!r} in the environment, and must be a number of processes: unset it to run alone")
    return int(words)


def is_first() -> bool:
    """Whether this process is rank 0 of those that torchrun started, or alone. No torch."""
    return _size() == 1 or os.environ.get("RANK") == "0"


def started() -> Ranks:
    """This process among those that torchrun says there are, or alone."""
    if _size() == 1:
        return Ranks()
    from torch.distributed import rendezvous

    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=PATIENCE)))
    except (ValueError, RuntimeError) as error:  # a variable that is missing, or a store that is not there
        reason = str(error).partition("\n")[0]
        raise MptqError(
            f"the environment says that there are {_size()} processes, which do not find each other ({reason}): start them "
            "with torchrun, or unset WORLD_SIZE to run alone"
        ) from error
    return Ranks(rank, size, store)


def shares(weights: Mapping[int, int], size: int) -> list[set[int]]:
    """Units by rank: each unit, the largest first, to the rank that has least bytes so far. `weights` are bytes by unit."""
    found: list[set[int]] = [set() for _ in range(size)]
    loads = [0] * size
    for unit in sorted(weights, key=lambda unit: (-weights[unit], unit)):
        rank = loads.index(min(loads))
        found[rank].add(unit)
        loads[rank] += weights[unit]
    return found
