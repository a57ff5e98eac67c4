"""Reading ahead: while one tensor is worked on, a thread reads the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

Item = tuple[str, tuple[int, ...]]
"""Inner name and shape of a tensor."""


class ReadAhead:
    """Tensors in an order that is known before. Memory: the one that was taken last, and the next."""

    def __init__(self, read: Callable[[str, tuple[int, ...]], torch.Tensor], items: Iterable[Item]) -> None:
        self._read = read
        self._items: Iterator[Item] = iter(items)
        self._pool = ThreadPoolExecutor(1, "read")
        self._next: tuple[Item, Future[torch.Tensor]] | None = None
        self._begin()

    def _begin(self) -> None:
        item = next(self._items, None)
        self._next = None if item is None else (item, self._pool.submit(self._read, *item))

    def take(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """The next tensor, which must be this one; what went wrong in reading it is raised here."""
        assert self._next is not None, f"{name} is read after the last"
        item, reading = self._next
        assert item == (name, shape), f"{name} is read where {item[0]} comes next"
        tensor = reading.result()
        self._begin()
        return tensor

    def close(self) -> None:
        """Stop the thread; what is being read is finished first."""
        self._pool.shutdown(cancel_futures=True)
