"""Reads Megatron's indexed datasets: `PREFIX.bin` has token ids and `PREFIX.idx` the document boundaries."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.calibration.datasets.documents import Document, one_line, shuffled
from mptq.errors import DataError
from mptq.quiet import quiet_imports

if TYPE_CHECKING:
    import numpy as np

    from mptq.calibration.datasets.options import DataOptions

MAGIC = b"MMIDIDX"
HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, dtype code, numbers of sequences and boundaries (megatron/core/datasets/indexed_dataset.py).

Then a length (int32) and an offset (int64) for each sequence, and a sequence number (int64) for each boundary.
"""


def prefix_of(name: str) -> str:
    """Returns the path without .bin or .idx."""
    return name[:-4] if name.endswith((".bin", ".idx")) else name


def is_indexed(name: str) -> bool:
    """Whether both files exist."""
    return all(Path(prefix_of(name) + suffix).is_file() for suffix in (".bin", ".idx"))


def read_indexed(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields documents as token ids, int64 [n], in random order, each cut to what a run can use. Maps the files.

    Raises DataError for files that megatron-core cannot read.
    """
    most = (options.calib_size + options.eval_size) * options.seq_length
    try:
        _check(prefix_of(name))
        dataset = _open(prefix_of(name))
        borders = dataset.document_indices
        for index in shuffled(len(borders) - 1, bits):
            ids = _join(dataset, range(borders[index], borders[index + 1]), most)
            yield Document(ids, f"{name}, document {index + 1}")
    except (AssertionError, ValueError, OSError) as error:
        raise DataError(f"{prefix_of(name)}.bin does not match its .idx: {one_line(error)}") from error


def _check(prefix: str) -> None:
    """Raises DataError for a damaged index, where megatron-core fails an assertion or prints a traceback to stderr."""
    index = Path(prefix + ".idx")
    with index.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size or not head.startswith(MAGIC):
        raise DataError(f"{index} is not the index of a Megatron dataset: it does not begin with {MAGIC.decode()}")
    _, version, _, sequences, borders = HEADER.unpack(head)
    if version != 1:
        raise DataError(f"{index} has version {version} of Megatron's indexed dataset format: only version 1 is supported")
    if index.stat().st_size < HEADER.size + 12 * sequences + 8 * borders or not Path(prefix + ".bin").stat().st_size:
        raise DataError(f"{prefix}.idx or .bin is truncated: copy it again")


def _open(prefix: str) -> Any:
    with quiet_imports():  # megatron-core also warns about running in a single process
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        return IndexedDataset(prefix)


def _join(dataset: Any, parts: range, most: int) -> np.ndarray:
    """Returns the first `most` tokens of a document's parts, copied: the maps close when the dataset is freed."""
    import numpy as np

    found = [np.zeros(0, np.int64)]
    for part in parts:
        found.append(dataset[part][:most].astype(np.int64))
        most -= len(found[-1])
        if most <= 0:
            break
    return np.concatenate(found)
