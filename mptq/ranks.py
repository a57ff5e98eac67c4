"""The processes of a run, as torchrun starts them: each takes its share of the units, and rank 0 plans and commits."""

from __future__ import annotations

import os
import pickle
import time
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from mptq.errors import MptqError

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = timedelta(hours=2)
"""How long the others may take for their shares, which are of equal bytes, when this process is done with its own."""


@dataclass(slots=True)
class Ranks:
    """This process, number `rank` of `size`.

    They speak through torch's key-value store alone. There is no process group: ModelOpt and megatron-core would take it for
    that of a model that is spread over the processes, and reduce the scales of different layers into one.
    """

    rank: int = 0
    size: int = 1
    store: Store | None = None
    talks: int = 0

    @property
    def first(self) -> bool:
        """Whether it is the one that plans, commits and prints."""
        return self.rank == 0

    def agree(self, value: Callable[[], Any]) -> Any:
        """What `value` gives on rank 0, on every rank; what it raises there is raised there, and MptqError on the others."""
        if self.store is None:
            return value()
        self.talks += 1
        key = f"mptq/{self.talks}"
        if not self.first:
            with _told():
                said, content = pickle.loads(b64decode(self.store.get(key)))  # noqa: S301 (of our own process)
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

    def _say(self, key: str, content: tuple[bool, Any]) -> None:
        assert self.store is not None
        self.store.set(key, b64encode(pickle.dumps(content)).decode())

    def wait(self) -> None:
        """Until every rank is here; raises MptqError when one of them does not come."""
        if self.store is None:
            return
        self.talks += 1
        key = f"mptq/{self.talks}"
        with _told():
            if self.store.add(f"{key}/here", 1) == self.size:
                self.store.set(f"{key}/all", "yes")
            self.store.wait([f"{key}/all"], PATIENCE)
            self.store.add(f"{key}/gone", 1)
            # The store may be in the first process: it stays until the others have seen that all are here.
            while self.first and self.store.add(f"{key}/gone", 0) < self.size:
                time.sleep(0.01)


@contextmanager
def _told() -> Iterator[None]:
    try:
        yield
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
