"""An output directory that is complete or not there: written under a hidden name beside it, and renamed at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from mptq.errors import OutputError
from mptq.writers import manifest

_LOCK = ".lock"


def check_output(out: Path, source_root: Path, needed_bytes: int, overwrite: bool) -> None:
    """Refuse an output that cannot be written, before anything is.

    Raises OutputError when it exists (and `overwrite` is off, or it is no mptq output), lies inside the source, or the
    disk has less than `needed_bytes` free.
    """
    if out == source_root or source_root in out.parents:
        raise OutputError(f"{out} is inside the checkpoint {source_root}, which is never written to: choose another -o")
    if out in source_root.parents:
        raise OutputError(f"{out} contains the checkpoint {source_root}: choose another -o")
    if out.exists() and not _is_empty(out):
        _check_replaceable(out, overwrite)
    ancestor = next(parent for parent in out.parents if parent.exists())
    if not ancestor.is_dir():
        raise OutputError(f"{out} cannot be made: {ancestor} is a file")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be made: {ancestor} is not writable")
    free = shutil.disk_usage(ancestor).free
    if free < needed_bytes:
        raise OutputError(f"{ancestor} has {free / 1e9:.2f} GB free, and the output needs {needed_bytes / 1e9:.2f} GB")


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{out} exists: choose another -o, or pass --overwrite")
    if not (out / manifest.NAME).is_file():
        raise OutputError(f"{out} is not an output of mptq, so --overwrite leaves it alone: choose another -o")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


class OutputDirectory:
    """Context manager: gives the hidden directory to write into; renames it to `out` on success, else removes it.

    What a killed run left under the hidden name is removed by the next. Raises OutputError when the directory cannot be
    made, or another run is writing the same output.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.partial = out.parent / f".{out.name}.partial"
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            self._lock = (self.partial / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{self.out} is being written by another run of mptq") from error
        except OSError as error:
            raise OutputError(f"{self.out} cannot be written: {error.strerror} ({error.filename})") from error
        for leftover in self.partial.iterdir():
            if leftover.name != _LOCK:
                shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        assert self._lock is not None
        if kind is None:
            self._commit()
        else:
            shutil.rmtree(self.partial, ignore_errors=True)
        self._lock.close()

    def _commit(self) -> None:
        (self.partial / _LOCK).unlink()
        old = self.out.parent / f".{self.out.name}.old"
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.partial.rename(self.out)
        shutil.rmtree(old, ignore_errors=True)
