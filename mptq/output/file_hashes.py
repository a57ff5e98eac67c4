"""SHA-256 of the files of an output, as they are finished. No torch."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mptq.files import sha256


class FileHashes:
    """SHA-256 of files as they are finished, computed beside the run by one thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pool = ThreadPoolExecutor(1)
        self._hashes: dict[Path, Future[str]] = {}

    def add(self, files: Iterable[Path]) -> None:
        """Hash these files, each once."""
        for file in dict.fromkeys(files):
            if file in self._hashes:
                continue
            self._hashes[file] = self._pool.submit(sha256, file)

    def collect(self) -> dict[str, dict[str, Any]]:
        """Name relative to the root -> bytes and sha256, of every file added."""
        rows = {
            file.relative_to(self.root).as_posix(): {"bytes": file.stat().st_size, "sha256": hashed.result()}
            for file, hashed in self._hashes.items()
        }
        return dict(sorted(rows.items()))

    def close(self) -> None:
        """Stop the thread; what is not hashed yet is dropped."""
        self._pool.shutdown(cancel_futures=True)
