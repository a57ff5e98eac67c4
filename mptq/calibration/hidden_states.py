"""Hidden states between layers: in memory up to a budget, in a memory-mapped file beyond it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True, slots=True)
class Batch:
    """`count` sequences of `length` tokens each, from token `start` of all sequences end to end."""

    start: int
    count: int
    length: int

    @property
    def tokens(self) -> slice:
        """The batch's rows among all tokens."""
        return slice(self.start, self.start + self.count * self.length)

    @property
    def sequences(self) -> list[Batch]:
        """Its sequences, each as a batch of one."""
        return [Batch(self.start + place * self.length, 1, self.length) for place in range(self.count)]


def batches(lengths: Sequence[int], size: int, start: int = 0) -> list[Batch]:
    """Groups neighboring sequences of the same length, at most `size` in a batch, so that nothing is ever padded."""
    found: list[Batch] = []
    for length in lengths:
        last = found[-1] if found else None
        if last is not None and last.length == length and last.count < size:
            found[-1] = Batch(last.start, last.count + 1, length)
        else:
            found.append(Batch(start, 1, length))
        start += length
    return found


class HiddenStates:
    """Hidden states [tokens, hidden] of all sequences end to end, replaced batch by batch with the outputs of a layer.

    With `folder`, they are in a memory-mapped file there, removed by `close`; without, in memory. Memory: tokens *
    hidden * 2 bytes (for 16-bit models), or the part of the file that the operating system caches.
    """

    def __init__(self, tokens: int, hidden: int, dtype: torch.dtype, folder: Path | None, name: str) -> None:
        self._file = folder / f".activations-{name}" if folder else None
        if self._file is None:
            self.states = torch.empty(tokens, hidden, dtype=dtype)
        else:
            self.states = torch.from_file(str(self._file), shared=True, size=tokens * hidden, dtype=dtype).view(tokens, hidden)

    def read(self, batch: Batch, device: torch.device) -> torch.Tensor:
        """Returns the batch's hidden states [count, length, hidden] on `device`."""
        states: torch.Tensor = self.states[batch.tokens].unflatten(0, (batch.count, batch.length))
        return states.to(device)

    def write(self, batch: Batch, states: torch.Tensor) -> None:
        """Replaces the batch's hidden states with `states` [count, length, hidden]."""
        self.states[batch.tokens].unflatten(0, (batch.count, batch.length)).copy_(states)

    def close(self) -> None:
        """Frees the memory and removes the file."""
        self.states = torch.empty(0)
        if self._file is not None:
            self._file.unlink(missing_ok=True)


def flat(sequences: Sequence[np.ndarray]) -> torch.Tensor:
    """Concatenates all sequences: int64 [tokens]."""
    return torch.cat([torch.from_numpy(sequence) for sequence in sequences])


def chunks(tokens: slice, size: int) -> Iterator[slice]:
    """Splits `tokens` into pieces of at most `size`."""
    for start in range(tokens.start, tokens.stop, size):
        yield slice(start, min(start + size, tokens.stop))
