"""SHA-256 hashes of output files, computed as files are finished. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from mptq.files import sha256


class FileHashes:
    """Computes SHA-256 hashes of finished files in one background thread."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._pool = ThreadPoolExecutor(1)
        self._hashes: dict[Path, Future[str]] = {}

    def add(self, files: Iterable[Path]) -> None:
        """Queues files for hashing; each file is hashed once."""
        for file in dict.fromkeys(files):
            if file in self._hashes:
                continue
            self._hashes[file] = self._pool.submit(sha256, file)

    def collect(self) -> dict[str, dict[str, Any]]:
        """Returns name relative to the root -> size in bytes and sha256, for every added file."""
        rows = {
            file.relative_to(self.root).as_posix(): {"bytes": file.stat().st_size, "sha256": hashed.result()}
            for file, hashed in self._hashes.items()
        }
        return dict(sorted(rows.items()))

    def close(self) -> None:
        """Stops the thread; files that are still queued are not hashed."""
        self._pool.shutdown(cancel_futures=True)
