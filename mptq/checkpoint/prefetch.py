"""Prefetching: while one tensor is processed, a thread reads the next ones."""

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
    """A tensor by its inner name, or its rows starting at `first`; `shape` is the shape of what is read."""

    name: str
    shape: tuple[int, ...]
    first: int = 0


class Prefetcher:
    """Reads tensors ahead in a given order. Memory: the tensor that was taken last and the next two.

    Two, because sizes differ: with only one, the consumer of a small tensor would wait for the large one after it.
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
        """Returns the next tensor, which must be `item`; errors from reading it are raised here."""
        assert self._next, f"{item} is read after the last"
        following, reading = self._next.popleft()
        assert following == item, f"{item} is read where {following} comes next"
        tensor = reading.result()
        self._begin()
        return tensor

    def close(self) -> None:
        """Stops the thread after the current read."""
        self._pool.shutdown(cancel_futures=True)
