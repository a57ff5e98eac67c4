"""SHA-256 of files and detection of remote paths. mptq never connects to remote storage. No torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from mptq.errors import MptqError

# pathlib collapses slashes: s3://bucket/x becomes s3:/bucket/x, which resolves to a path below the current directory.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def remote_url(path: Path | str) -> str | None:
    """Returns the URL that a path was built from, such as s3://bucket/x, or None for a local path."""
    parts = Path(path).parts
    for place, part in enumerate(parts[:-1]):
        if _SCHEME.fullmatch(part) and not Path(*parts[: place + 1]).exists():
            return f"{part}//{'/'.join(parts[place + 1 :])}"
    return None


def require_local(path: Path | str, done: Literal["read", "written"] = "read") -> None:
    """Raises MptqError if `path` is a URL; `done` is the operation that the message names."""
    url = remote_url(path)
    if url is not None:
        remedy = "mount or copy it" if done == "read" else "write to a mounted or local directory"
        raise MptqError(f"{url}: remote paths are not {done}: {remedy}")


_PIECE = 1 << 24  # bytes
"""Read size for hashing: after each piece the thread has to wait for the GIL again."""


def sha256(file: Path) -> str:
    """Returns the SHA-256 of a file in hexadecimal. Memory: 16 MB."""
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    with file.open("rb", buffering=0) as opened, memoryview(piece) as view:
        while count := opened.readinto(view):
            digest.update(view[:count])
    return digest.hexdigest()
