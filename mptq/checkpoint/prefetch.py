"""Reading ahead: while one tensor is worked on, a thread reads those that come next."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


_AHEAD = 2


class Item(NamedTuple):
    """A tensor by its inner name, or its rows from `first` on: `shape` is that of what is read."""

    name: str
    shape: tuple[int, ...]
    first: int = 0


class Prefetcher:
    """Tensors in an order that is known before. Memory: the one that was taken last, and the next two.

    Two, because they are of unequal size: with one, who takes a small tensor waits for the large one after it.
    """

    def __init__(self, read: Callable[[Item], torch.Tensor], items: Iterable[Item]) -> None:
        self._read = read
        self._items: Iterator[Item] = iter(items)
        self._pool = ThreadPoolExecutor(1, "read")
        self._next: deque[tuple[Item, Future[torch.Tensor]]] = deque()
        for _ in range(_AHEAD):
            self._begin()

    def _begin(self) -> None:
        for item in islice(self._items, 1):
            self._next.append((item, self._pool.submit(self._read, item)))

    def take(self, item: Item) -> torch.Tensor:
        """The next tensor, which must be this one; what went wrong in reading it is raised here."""
        assert self._next, f"{item} is read after the last"
        following, reading = self._next.popleft()
        assert following == item, f"{item} is read where {following} comes next"
        tensor = reading.result()
        self._begin()
        return tensor

    def close(self) -> None:
        """Stop the thread; what is being read is finished first."""
        self._pool.shutdown(cancel_futures=True)
