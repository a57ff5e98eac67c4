"""Reads documents from text, JSON Lines and Parquet files. Only what is used is read and decoded."""

from __future__ import annotations

import codecs
import json
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from mptq.calibration.datasets.documents import Document, from_row, one_line, shuffled, usable_columns
from mptq.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from mptq.calibration.datasets.options import DataOptions

Buffer = bytes | mmap.mmap

STRETCH = 8
"""Bytes of a stretch of text per token of a sequence: about two sequences, so that no whole book is tokenized."""

SCAN = 1 << 24
"""Bytes that are searched for line ends at once."""


def mapped(path: Path) -> Buffer:
    """Maps the file into memory; raises DataError if it cannot be opened."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def is_text(path: Path) -> bool:
    """Whether the file begins with UTF-8 text."""
    try:  # an incremental decoder accepts an incomplete character at the end
        return "\0" not in codecs.getincrementaldecoder("utf-8")().decode(mapped(path)[:65536])
    except UnicodeDecodeError:
        return False


def text_files(name: str) -> list[Path]:
    """Returns the text file `name`, or the sorted files of a directory of only .txt (and .md) files; else nothing."""
    path = Path(name)
    if path.is_file():
        return [path] if is_text(path) else []
    if not path.is_dir():
        return []
    files = sorted(file for file in path.rglob("*") if file.is_file() and not file.name.startswith("."))
    return files if {file.suffix for file in files} in ({".txt"}, {".txt", ".md"}) else []


def read_text(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields stretches of a text file, or of a directory of them, of about 8 bytes per token of a sequence.

    A stretch begins after a line end if there is one nearby. Stretches do not overlap, and each counts as a document.
    """
    return stretches([(str(path), mapped(path)) for path in text_files(name)], options, bits)


def stretches(texts: Sequence[tuple[str, Buffer]], options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields stretches of UTF-8 texts, given as names and bytes; raises DataError for bytes that are not UTF-8."""
    size = STRETCH * options.seq_length
    ends = list(accumulate(-(-len(buffer) // size) for _, buffer in texts))
    for index in shuffled(ends[-1] if ends else 0, bits):
        which = bisect_right(ends, index)
        name, buffer = texts[which]
        start = (index - (ends[which - 1] if which else 0)) * size
        first, last = _border(buffer, start, size), _border(buffer, start + size, size)
        try:
            yield Document(buffer[first:last].decode().removeprefix("\ufeff"), f"{name}, byte {first}")
        except UnicodeDecodeError as error:
            raise DataError(f"{name}, byte {first + error.start}: not UTF-8 text ({error.reason})") from error


def _border(buffer: Buffer, at: int, size: int) -> int:
    """Returns where the stretch at `at` begins: after the next line end within `size`, else at the next character."""
    if at == 0 or at >= len(buffer):
        return min(at, len(buffer))
    end = buffer.find(b"\n", at - 1, at + size)
    if end >= 0:
        return end + 1
    while at < len(buffer) and buffer[at] & 0xC0 == 0x80:  # inside a multi-byte character
        at += 1
    return at


def read_json_lines(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields the document of each non-blank line. Line ends are located once; only the rows that are used are parsed.

    Raises DataError, naming the line, for a used row that is not a JSON object or has no document.
    """
    del options
    buffer = mapped(Path(name))
    starts = _line_starts(Path(name))
    for index in shuffled(len(starts) - 1, bits):
        line = buffer[int(starts[index]) : int(starts[index + 1])]
        if not line.strip():
            continue
        where = f"{name}, line {index + 1}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{where}: not valid JSON ({one_line(error)}); each line must be a JSON object") from error
        yield from_row(row, where)


def _line_starts(path: Path) -> np.ndarray:
    """Returns the byte offsets of the lines of a file, and its length: int64 [lines + 1].

    The file is read in parts instead of mapped, because mapped pages would count as memory of the process.
    """
    import numpy as np

    found, start = [np.zeros(1, np.int64)], 0
    with path.open("rb") as file:
        while part := file.read(SCAN):
            found.append(np.flatnonzero(np.frombuffer(part, np.uint8) == ord("\n")) + start + 1)
            start += len(part)
    return np.concatenate([*found, np.array([start], np.int64)])


def read_parquet(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields the document of each row. Row groups are shuffled, then rows within each; one group is in memory at once.

    Raises DataError for a file that is not Parquet or lacks the columns, and for a row without a document.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    del options
    try:
        file = pq.ParquetFile(name)
        columns = usable_columns(file.schema_arrow.names, name)
        sizes = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
        for group in shuffled(len(sizes), bits):
            rows, before = file.read_row_group(group, columns=columns), sum(sizes[:group])
            for index in shuffled(sizes[group], bits):
                yield from_row(rows.slice(index, 1).to_pylist()[0], f"{name}, row {before + index + 1}")
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{name} cannot be read as Parquet: {one_line(error)}") from error
