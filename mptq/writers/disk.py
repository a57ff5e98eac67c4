"""Waiting until files are on the disk, and beginning with it early. No torch."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

_WRITE = 2  # SYNC_FILE_RANGE_WRITE of sync_file_range(2): begin to write what is not being written, and do not wait


def sync(path: Path) -> None:
    """Wait until a file, or what a directory lists, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
