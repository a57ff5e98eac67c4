"""Sums the moments of inputs over batches in one order, whichever rank has which batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch

from mptq.calibration.linear_inputs import Inputs
from mptq.distributed import Ranks
from mptq.quantize.rounding.moments import Moments, Sample

WITHHELD = 8
"""One of this many batches is withheld, to compare the rounding that the others have led to."""
MOST = 4
"""No more batches than this are withheld, because their inputs are kept as they are."""


def withheld(number: int, batches: int) -> bool:
    """Whether batch `number` of a set of `batches` is withheld: the last of every eight or more, or of them all."""
    period = min(max(WITHHELD, -(-batches // MOST)), batches)
    return batches > 1 and number % period == period - 1


@dataclass(frozen=True, slots=True)
class Batches:
    """Inputs of a linear that this rank has, by number of the batch: in the quantized stream, and in the reference.

    There are `count` batches on all ranks, `width` inputs, and `added` outputs if these are added to the residual
    stream, else 0. `reference` is None where one stream is enough.
    """

    count: int
    width: int
    quantized: Mapping[int, Inputs]
    reference: Mapping[int, Inputs] | None = None
    added: int = 0

    @property
    def widths(self) -> tuple[int, int, int]:
        """Columns of the inputs, their shifts and those of the residual stream; 0 for what is not known."""
        return (self.width, 0, 0) if self.reference is None else (self.width, self.width, self.added)

    def sample(self, number: int, device: torch.device) -> Sample:
        """Returns the inputs of a batch, weighted, on `device`; empty if this rank has none."""
        mine = self.quantized.get(number)
        if mine is None:
            return self.empty(0, device)
        rows = mine.weighted(mine.rows, device)
        if self.reference is None:
            return Sample(rows)
        other = self.reference[number]
        shift = mine.weighted(other.rows, device).sub_(rows)
        if mine.residual is None or other.residual is None:
            return Sample(rows, shift)
        return Sample(rows, shift, mine.weighted(other.residual.float() - mine.residual.float(), device))

    def empty(self, tokens: int, device: torch.device) -> Sample:
        """Returns room for the inputs of a batch of `tokens`."""
        found = [torch.zeros(tokens, width, device=device) if width else None for width in self.widths]
        assert found[0] is not None
        return Sample(found[0], *found[1:])


def moments(given: Batches, device: torch.device, ranks: Ranks) -> Moments:
    """Returns the moments of inputs whose batches are spread over ranks: each has every n-th.

    All ranks call it at once, and get the same. Memory: 3 times the moments, and twice the withheld inputs, float32.
    """
    total, tokens, samples = _sums(given.empty(0, device)), 0, [given.empty(0, device)]
    alone = given.count == 1
    for number, count, found in _in_order(given, lambda number: withheld(number, given.count), device, ranks):
        if withheld(number, given.count):
            samples.append(found)
            continue
        tokens += count
        for place, more in enumerate(found.parts):
            total.parts[place].add_(more)
    if alone:
        samples += (found for _, _, found in _in_order(given, lambda _: True, device, ranks))
    joined = Sample(*(torch.cat(parts) for parts in zip(*(one.parts for one in samples), strict=True)))
    return Moments(total.rows, tokens, joined, total.shift, total.residual)


def _in_order(
    given: Batches, whole: Callable[[int], bool], device: torch.device, ranks: Ranks
) -> Iterator[tuple[int, int, Sample]]:
    """Yields number, tokens and sums of each batch in order; of those that are wanted `whole`, the inputs themselves.

    All ranks compute one of theirs, then each passes it on.
    """
    for first in range(0, given.count, ranks.size):
        own = given.sample(first + ranks.rank, device)
        counts = ranks.all_gather(len(own.rows))
        if not whole(first + ranks.rank):
            own = _sums(own)
        for rank in range(min(ranks.size, given.count - first)):
            found = own
            if rank != ranks.rank:
                kept = whole(first + rank)
                found = given.empty(counts[rank], device) if kept else _sums(given.empty(0, device))
            for part in found.parts:
                ranks.broadcast(part, rank)
            yield first + rank, counts[rank], found


def _sums(sample: Sample) -> Sample:
    """Returns the products of the inputs, their shifts, and those of the residual stream, with the inputs."""
    return Sample(*(part.T @ sample.rows for part in sample.parts))
