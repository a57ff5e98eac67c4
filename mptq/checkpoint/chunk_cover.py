"""Checks that boxes cover every element of a tensor exactly once, in time linear in the number of boxes."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate, product, repeat

Box = tuple[int, ...]


def covers(shape: Box, offsets: Sequence[Box], sizes: Sequence[Box]) -> bool:
    """Whether the boxes at `offsets` with extents `sizes` cover a tensor of `shape`, each element exactly once."""
    return _is_grid(shape, offsets, sizes) or _adds_up(shape, offsets, sizes)


def _is_grid(shape: Box, offsets: Sequence[Box], sizes: Sequence[Box]) -> bool:
    """Whether the boxes are the cells of a grid, with the same cuts along each dimension throughout."""
    count = 1
    for size, starts, lengths in zip(shape, zip(*offsets, strict=True), zip(*sizes, strict=True), strict=False):
        cuts = _cuts(starts, lengths)
        if [start for start, _ in cuts] != list(accumulate((length for _, length in cuts[:-1]), initial=0)):
            return False
        if sum(cuts[-1]) != size:
            return False
        count *= len(cuts)
    return count == len(offsets) == len(set(offsets))


def _cuts(starts: Box, lengths: Box) -> list[tuple[int, int]]:
    """Returns the distinct intervals along one dimension, in order."""
    different = set(lengths)
    if len(different) == 1:  # the common case, and much faster
        return sorted(zip(set(starts), repeat(*different), strict=False))
    return sorted(set(zip(starts, lengths, strict=True)))


def _adds_up(shape: Box, offsets: Sequence[Box], sizes: Sequence[Box]) -> bool:
    """Whether the boxes cover each element once, for any arrangement of boxes.

    The mixed differences of the coverage count determine it. Those of a box are 1 or -1 at its corners and 0 elsewhere,
    so the signed corners of all boxes must add up to those of the whole tensor.
    """
    left: Counter[Box] = Counter()
    whole = [(tuple(0 for _ in shape), shape, -1)]
    for offset, size, weight in (*whole, *((offset, size, 1) for offset, size in zip(offsets, sizes, strict=True))):
        if math.prod(size):
            ends = (((start, 1), (start + length, -1)) for start, length in zip(offset, size, strict=True))
            for corner in product(*ends):
                left[tuple(place for place, _ in corner)] += weight * math.prod(sign for _, sign in corner)
    return not any(left.values())
