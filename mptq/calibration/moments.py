"""Sums the second moments of inputs over batches in one order, whichever rank has which batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from mptq.distributed import Ranks
from mptq.quantize.rounding.moments import Moments

WITHHELD = 8
"""One of this many batches is withheld, to compare the rounding that the others have led to."""


def withheld(number: int, batches: int) -> bool:
    """Whether batch `number` of a set of `batches` is withheld: the last of every eight, or of them all."""
    period = min(WITHHELD, batches)
    return batches > 1 and number % period == period - 1


def moments(rows: Mapping[int, torch.Tensor], batches: int, width: int, device: torch.device, ranks: Ranks) -> Moments:
    """Returns the moments of the inputs `rows`, batch number -> [tokens, in] on any device, that this rank has.

    Each rank has every n-th of the `batches`; all call it at once, and get the same. Memory: 3 matrices [in, in].
    """
    parts = {kind: torch.zeros(width, width, device=device) for kind in (False, True)}
    tokens = 0
    for number, moment, count in _in_order(rows, batches, width, device, ranks):
        held = withheld(number, batches)
        parts[held] += moment
        tokens += 0 if held else count
    return Moments(parts[False], tokens, parts[True] if batches > 1 else None)


def _in_order(
    rows: Mapping[int, torch.Tensor], batches: int, width: int, device: torch.device, ranks: Ranks
) -> Iterable[tuple[int, torch.Tensor, int]]:
    """Yields number, moment and tokens of each batch in order. All ranks compute one of theirs, then each passes it on."""
    for first in range(0, batches, ranks.size):
        mine = rows.get(first + ranks.rank)
        own = torch.zeros(width, width, device=device) if mine is None else _moment(mine.to(device).float())
        counts = ranks.all_gather(0 if mine is None else len(mine))
        for rank in range(min(ranks.size, batches - first)):
            moment = own if rank == ranks.rank else torch.empty_like(own)
            ranks.broadcast(moment, rank)
            yield first + rank, moment, counts[rank]


def _moment(rows: torch.Tensor) -> torch.Tensor:
    return rows.T @ rows
