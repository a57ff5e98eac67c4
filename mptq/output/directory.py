"""An output directory that is complete or not there: written under a hidden name beside it, and renamed at the end."""

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
"""The last file of a complete output, by which mptq knows its own (report/manifest.py)."""
_LOCK = ".lock"


def check_output(out: Path, source_root: Path, needed_bytes: int, overwrite: bool, resume: bool = False) -> None:
    """Refuse an output that cannot be written, before anything is.

    Raises OutputError when it exists (and `overwrite` is off, or it is no mptq output), was begun by a run that did not
    finish (and neither `overwrite` nor `resume` says what to do with that), lies inside the source, or the disk has less than
    `needed_bytes` free, those that such a run has taken already left aside.
    """
    if out == source_root or source_root in out.parents:
        raise OutputError(f"{out} is inside the checkpoint {source_root}, which is never written to: choose another -o")
    if out in source_root.parents:
        raise OutputError(f"{out} contains the checkpoint {source_root}: choose another -o")
    if out.exists() and not _is_empty(out):
        _check_replaceable(out, overwrite)
    begun = unfinished(out)
    if begun and not (overwrite or resume):
        raise OutputError(
            f"{out} was begun by a run that did not finish, of which {begun} steps are kept: pass --resume to go on with it, "
            "or --overwrite to begin again"
        )
    ancestor = next(parent for parent in out.parents if parent.exists())
    if not ancestor.is_dir():
        raise OutputError(f"{out} cannot be made: {ancestor} is a file")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise OutputError(f"{out} cannot be made: {ancestor} is not writable")
    free = shutil.disk_usage(ancestor).free + (_taken(partial_of(out)) if begun else 0)
    if free < needed_bytes:
        raise OutputError(f"{ancestor} has {free / 1e9:.2f} GB free, and the output needs {needed_bytes / 1e9:.2f} GB")


def partial_of(out: Path) -> Path:
    """Where `out` is written before it is complete."""
    return out.parent / f".{out.name}.partial"


def unfinished(out: Path) -> int:
    """Steps of a run that was to write `out` and did not finish, that are kept."""
    return len(journal.committed(partial_of(out)))


def _taken(directory: Path) -> int:
    """Bytes that the files of a directory take on the disk."""
    return sum(file.stat().st_blocks * 512 for file in directory.rglob("*") if file.is_file())


def _check_replaceable(out: Path, overwrite: bool) -> None:
    if not overwrite:
        raise OutputError(f"{out} exists: choose another -o, or pass --overwrite")
    if not (out / MANIFEST).is_file():
        raise OutputError(f"{out} is not an output of mptq, so --overwrite leaves it alone: choose another -o")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and next(path.iterdir(), None) is None


class OutputDirectory:
    """Context manager: gives the hidden directory to write into, and renames it to `out` on success.

    Otherwise it stays, if its journal says that something of it is complete, for a run with `resume`; else it is
    removed. Without `resume`, what an earlier run left is removed first. Raises OutputError when the directory cannot be made,
    or another run is writing the same output.
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
        """Keep what a later run can go on with, and say so in a note of `error`, which nothing here replaces."""
        try:
            steps = unfinished(self.out)
        except (OSError, OutputError) as problem:
            error.add_note(f"{self.partial} is left as it is ({problem})")
            return
        if steps:
            error.add_note(f"what was finished before is kept ({steps} of its steps): --resume goes on with it")
        else:
            shutil.rmtree(self.partial, ignore_errors=True)

    def _commit(self) -> None:
        """Everything is on the disk before the name says that it is complete; the journal and the lock go last."""
        sync_tree(self.partial)
        old = self.out.parent / f".{self.out.name}.old"
        if self.out.exists():
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.partial.rename(self.out)
        sync(self.out.parent)
        clear(self.out)


def clear(out: Path) -> None:
    """Remove what only an unfinished output needs, and what `out` replaced."""
    for file in (*out.glob(f"{journal.NAME}*"), out / _LOCK):
        file.unlink(missing_ok=True)
    shutil.rmtree(out.parent / f".{out.name}.old", ignore_errors=True)
