"""Writes files in pieces and syncs them to disk, early where possible. Does not import torch."""

from __future__ import annotations

import ctypes
import io
import os
from collections.abc import Buffer, Callable
from functools import cache
from pathlib import Path

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2): start writeback of dirty pages without waiting


PIECE_BYTES = 1 << 18
"""Maximum bytes of one write.

Linux caches written data in pages as large as the piece, and large pages can take ten times as long to allocate as small
ones: writing 2.2 GB took 0.5 s of CPU time in pieces of 256 kB and 5 s in pieces of 16 MB (docs/dev/log.md).
"""


class PieceFile(io.FileIO):
    """A file whose `write` accepts at most one piece; the caller (a buffered writer or a loop) writes the rest."""

    def write(self, data: Buffer, /) -> int:
        """Writes the first piece of `data` and returns its size in bytes."""
        return super().write(memoryview(data)[:PIECE_BYTES])


def sync(path: Path) -> None:
    """Waits until a file, or the entries of a directory, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_folders(root: Path) -> None:
    """Syncs all directories below `root`: syncing a file does not sync its directory entry (fsync(2))."""
    for folder, _, _ in os.walk(root):
        sync(Path(folder))


def sync_tree(root: Path) -> None:
    """Syncs all files and directories below `root`."""
    for path in root.rglob("*"):
        if path.is_file():
            sync(path)
    sync_folders(root)


def make_folder(path: Path) -> None:
    """Creates a directory and its missing parents, and waits until their directory entries are on disk."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        sync(folder.parent)


def begin_sync(descriptor: int, offset: int, count: int) -> None:
    """Starts writing `count` bytes at `offset` to disk, so that a later sync takes less time.

    Has an effect only on Linux. Errors are not checked here: the later sync reports them.
    """
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(descriptor, offset, count, _WRITE)


@cache
def _sync_file_range() -> Callable[[int, int, int, int], int] | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
