"""Paths that users give: local ones. Nothing in mptq opens a connection to a store."""

from __future__ import annotations

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
