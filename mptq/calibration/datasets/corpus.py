"""Turns documents into sequences: packing, holding out, sharing between datasets, and hashing."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import numpy as np


def pieces(documents: Iterable[np.ndarray], length: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yields numbered documents. A single one is cut into pieces of `length` tokens, so that it can be split."""
    filled = enumerate(documents)
    first, second = next(filled, None), next(filled, None)
    if first is not None and second is None:
        yield from ((0, first[1][start : start + length]) for start in range(0, len(first[1]), length))
    yield from (piece for piece in (first, second) if piece is not None and second is not None)
    yield from filled


class Supply:
    """The sequences of one dataset, made from its documents (int64 [n] each).

    What a call of `take` does not use of its last document is dropped: no document is in the sequences of two calls.
    `apart` has the hashes of held-out documents and is shared by all datasets of a run; copies of these are not used to
    calibrate. Of the documents read so far, `empty` counts those without tokens (or, if not packed, with only one,
    which predicts nothing), and `copies` those that are copies of held-out documents.
    """

    def __init__(self, documents: Iterable[np.ndarray], length: int, packed: bool, apart: set[bytes]) -> None:
        self.empty = self.copies = 0
        self._pieces = pieces(self._filled(documents), length)
        self._length, self._packed, self._apart = length, packed, apart
        self._used: set[int] = set()

    @property
    def documents(self) -> int:
        """Number of documents used so far."""
        return len(self._used)

    def _filled(self, documents: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        for document in documents:
            if len(document):
                yield document
            else:
                self.empty += 1

    def take(self, count: int, hold_out: bool) -> list[np.ndarray]:
        """Returns the next `count` sequences, or as many as are left."""
        if not count:
            return []
        return self._pack(count, hold_out) if self._packed else self._cut(count, hold_out)

    def _pack(self, count: int, hold_out: bool) -> list[np.ndarray]:
        """Packs documents end to end into full sequences."""
        parts, missing = [np.zeros(0, np.int64)], count * self._length
        for number, ids in self._next(hold_out):
            parts.append(ids[:missing])
            self._used.add(number)
            missing -= len(parts[-1])
            if not missing:
                break
        tokens = np.concatenate(parts)
        full = len(tokens) // self._length
        return list(tokens[: full * self._length].reshape(full, self._length))

    def _cut(self, count: int, hold_out: bool) -> list[np.ndarray]:
        """Makes each document a sequence, cut at the sequence length."""
        sequences: list[np.ndarray] = []
        for number, ids in self._next(hold_out):
            if len(ids) >= 2:
                sequences.append(ids)
                self._used.add(number)
            else:
                self.empty += 1
            if len(sequences) == count:
                break
        return sequences

    def _next(self, hold_out: bool) -> Iterator[tuple[int, np.ndarray]]:
        for number, document in self._pieces:
            ids = document if self._packed else document[: self._length]
            mark = hashlib.sha256(ids.tobytes()).digest()
            if hold_out:
                self._apart.add(mark)
            elif mark in self._apart:
                self.copies += 1
                continue
            yield number, ids


def shares(total: int, weights: Sequence[float]) -> list[int]:
    """Splits `total` in proportion to the weights, by largest remainder; ties go to the first."""
    quotas = [total * weight / sum(weights) for weight in weights]
    parts = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(parts)), key=lambda index: parts[index] - quotas[index])
    for index in by_remainder[: total - sum(parts)]:
        parts[index] += 1
    return parts


def interleave(groups: Sequence[Sequence[np.ndarray]]) -> tuple[np.ndarray, ...]:
    """Interleaves the groups: each keeps its order, and its sequences are spread evenly over the result."""
    places = [((at + 0.5) / len(group), index, at) for index, group in enumerate(groups) for at in range(len(group))]
    return tuple(groups[index][at] for _, index, at in sorted(places))


def describe(sequences: Sequence[np.ndarray]) -> dict[str, int | str]:
    """Returns the numbers of sequences and tokens, and a SHA-256 over each length and its ids (little-endian int64)."""
    digest = hashlib.sha256()
    for ids in sequences:
        digest.update(np.array([len(ids), *ids], "<i8").tobytes())
    return {"sequences": len(sequences), "tokens": sum(map(len, sequences)), "sha256": digest.hexdigest()}
