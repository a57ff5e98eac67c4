"""An output directory that is complete or absent: written under a hidden name next to it and renamed at the end."""

from __future__ import annotations

import fcntl
import os
import shutil
from contextlib import closing
from pathlib import Path
from types import TracebackType
from typing import IO, Self

from mptq.errors import OutputError
from mptq.output import journal
from mptq.output.disk import make_folder, sync, sync_tree

MANIFEST = "manifest.json"
"""The file that is written last and identifies an output of mptq (report/manifest.py)."""
_LOCK = ".lock"


def check_output(out: Path, source_root: Path, needed_bytes: int, overwrite: bool, resume: bool = False) -> None:
    """Checks that the output can be written, before a run starts.

    Raises OutputError if the output is inside the source, contains it, cannot be created, exists (without `overwrite`, or it
    is not an mptq output) or was started by an unfinished run (without `overwrite` or `resume`), or if less than
    `needed_bytes` are free on the disk. Space that the unfinished run already uses counts as free.
    """
    if out == source_root or source_root in out.parents:
        raise OutputError(f"{out} is inside the checkpoint {source_root}, which mptq never writes to: choose another -o")
    if out in source_root.parents:
        raise OutputError(f"{out} contains the checkpoint {source_root}: choose another -o")
    if out.exists() and not _is_empty(out):
        _check_replaceable(out, overwrite)
    begun = unfinished(out)
    if begun and not (overwrite or resume):
        raise OutputError(
            f"{out} was started by a run that did not complete (finished steps: {begun}): pass --resume to continue it, or "
            "--overwrite to start over"
        )
    ancestor = next(parent for parent in out.parents if parent.exists())
    if not ancestor.is_dir():
        raise OutputError(f"{out} cannot be created: {ancestor} is a file")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be created: {ancestor} is not writable")
    free = shutil.disk_usage(ancestor).free + (_taken(partial_of(out)) if begun else 0)
    if free < needed_bytes:
        raise OutputError(f"{ancestor} has {free / 1e9:.2f} GB free, and the output needs {needed_bytes / 1e9:.2f} GB")


def partial_of(out: Path) -> Path:
    """Returns the hidden directory in which `out` is written until it is complete."""
    return out.parent / f".{out.name}.partial"


def unfinished(out: Path) -> int:
    """Returns the number of finished steps that an unfinished run for `out` left."""
    return len(journal.committed(partial_of(out)))


def _taken(directory: Path) -> int:
    """Returns the disk space in bytes that the files of a directory use."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{out} exists: choose another -o, or pass --overwrite")
    if not (out / MANIFEST).is_file():
        raise OutputError(f"{out} is not an output of mptq, so --overwrite does not replace it: choose another -o")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


class OutputDirectory:
    """Context manager that provides the hidden directory to write into and renames it to `out` on success.

    On failure, the directory is kept for a run with `resume` if its journal lists finished steps, and removed otherwise.
    Without `resume`, files of an earlier run are removed first. Raises OutputError if the directory cannot be created or
    another run is writing the same output.
    """

    def __init__(self, out: Path, resume: bool = False) -> None:
        self.out = out
        self.partial = partial_of(out)
        self.resume = resume
        self._lock: IO[str] | None = None

    def __enter__(self) -> Self:
        try:
            make_folder(self.partial)
            self._lock = (self.partial / _LOCK).open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OutputError(f"{self.out} is being written by another run of mptq") from error
        except OSError as error:
            raise OutputError(f"{self.out} cannot be written: {error.strerror} ({error.filename})") from error
        self.resume = self.resume and unfinished(self.out) > 0
        if not self.resume:
            for leftover in self.partial.iterdir():
                if leftover.name != _LOCK:
                    shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None) -> None:
        assert self._lock is not None
        with closing(self._lock):
            if error is not None:
                self._leave(error)
                return
            try:
                self._commit()
            except OSError as problem:
                failure = OutputError(f"{self.out} cannot be written: {problem.strerror} ({problem.filename})")
                self._leave(failure)
                raise failure from problem

    def _leave(self, error: BaseException) -> None:
        """Keeps finished steps and adds a note about them to `error`; never raises another error instead of it."""
        try:
            steps = unfinished(self.out)
        except (OSError, OutputError) as problem:
            error.add_note(f"{self.partial} is left unchanged ({problem})")
            return
        if steps:
            error.add_note(f"progress is kept (finished steps: {steps}): pass --resume to continue")
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _commit(self) -> None:
        """Syncs all files, renames the directory to its final name, then removes the journal and the lock."""
        sync_tree(self.partial)
        old = self.out.parent / f".{self.out.name}.old"
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.partial.rename(self.out)
        sync(self.out.parent)
        clear(self.out)


def clear(out: Path) -> None:
    """Removes the journal and lock of an unfinished output, and the output that `out` replaced."""
    for file in (*out.glob(f"{journal.NAME}*"), out / _LOCK):
        file.unlink(missing_ok=True)
    shutil.rmtree(out.parent / f".{out.name}.old", ignore_errors=True)
