"""Files and their paths: SHA-256, and what is not local. Nothing in mptq opens a connection to a store. No torch."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Literal

from mptq.errors import MptqError

# pathlib makes one slash of several: s3://bucket/x is s3:/bucket/x, and below the current directory once it is resolved.
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")


def remote_url(path: Path | str) -> str | None:
    """The URL that a path was before pathlib had it, as in s3://bucket/x; None for a local path."""
    parts = Path(path).parts
    for place, part in enumerate(parts[:-1]):
        if _SCHEME.fullmatch(part) and not Path(*parts[: place + 1]).exists():
            return f"{part}//{'/'.join(parts[place + 1 :])}"
    return None


def require_local(path: Path | str, done: Literal["read", "written"] = "read") -> None:
    """Raise MptqError for a URL."""
    url = remote_url(path)
    if url is not None:
        remedy = "mount or copy it" if done == "read" else "write to a mounted or local directory"
        raise MptqError(f"{url}: remote paths are not {done}: {remedy}")


_PIECE = 1 << 24  # bytes
"""Of a file at once: after each piece the thread waits until the one that runs Python lets it go on."""


def sha256(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal. Memory: 16 MB."""
    digest, piece = hashlib.sha256(), bytearray(_PIECE)
    with file.open("rb", buffering=0) as opened, memoryview(piece) as view:
        while count := opened.readinto(view):
            digest.update(view[:count])
    return digest.hexdigest()
