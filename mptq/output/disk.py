"""Writing in pieces, waiting until files are on the disk, and beginning with it early. No torch."""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Buffer, Callable
from functools import cache
from pathlib import Path

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2): begin to write what is not being written, and do not wait


PIECE_BYTES = 1 << 18
"""Written at once. Linux keeps what is written in pages as large as the piece, and large ones can take ten times as long to get
as small ones: 2.2 GB took 0.5 s of the processor in pieces of 256 kB, 5 s in pieces of 16 MB (docs/log.md)."""


class PieceFile(io.FileIO):
    """A file that takes a piece at a time, whatever it is given: a buffer, or a loop, comes again with the rest."""

    def write(self, data: Buffer, /) -> int:
        """Write the first piece of `data`; return how many bytes that was."""
        return super().write(memoryview(data)[:PIECE_BYTES])


def sync(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(root: Path) -> None:
    """Wait until the names of all files below `root` are on the disk: to sync a file does not promise its name (fsync(2))."""
    for folder, _, _ in os.walk(root):
        sync(Path(folder))


def sync_tree(root: Path) -> None:
    """Wait until everything below `root` is on the disk: files and their names."""
    for path in root.rglob("*"):
        if path.is_file():
            sync(path)
    sync_folders(root)


def make_folder(path: Path) -> None:
    """Make a directory and those above it, and wait until their names are on the disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def begin_sync(descriptor: int, offset: int, count: int) -> None:
    """Let the disk begin with `count` bytes that were written at `offset`: who waits for them later waits less.

    Linux alone can be told so; what goes wrong there is told to who waits.
    """
    tell = _sync_file_range()
    if tell is not None:
        tell(descriptor, offset, count, _WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
