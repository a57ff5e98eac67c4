"""The journal of a run: which units of it are written for good, so that a run that was stopped at any moment can go on.

Lines of JSON in the unfinished output, a file for each rank: the first says what run this is, each further one that a unit is
written, with what the report and the metadata need of it. A line counts when it is whole. No torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mptq.errors import OutputError

NAME = ".journal"
SCHEMA = 2

Row = dict[str, Any]
_KEYS = frozenset(("rank", "tensors", "layers", "fidelity", "accounts"))


class Journal:
    """The open journal of one rank."""

    def __init__(self, folder: Path, header: Mapping[str, Any], rank: int = 0) -> None:
        self._path = folder / (f"{NAME}-{rank}" if rank else NAME)
        self._header = {"schema": SCHEMA, **header}
        found, _, end = read(self._path)
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._descriptor, end)  # a line that the end of a run cut short
        if not found:
            self._append(self._header)

    def commit(self, unit: int, row: Row) -> None:
        """Unit `unit` is on the disk, and from now on part of the output, whatever happens."""
        self._append({"unit": unit, **row})

    def close(self) -> None:
        """Let go of the file."""
        os.close(self._descriptor)

    def _append(self, line: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(line).encode() + b"\n")
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fdatasync(self._descriptor)


def committed(folder: Path) -> dict[int, Row]:
    """The rows of all ranks' journals, by unit, in their order."""
    rows: dict[int, Row] = {}
    for file in sorted(folder.glob(f"{NAME}*")) if (folder / NAME).is_file() else ():
        rows |= read(file)[1]
    return dict(sorted(rows.items()))


def read(path: Path) -> tuple[dict[str, Any], dict[int, Row], int]:
    """Header, rows by unit, and the bytes that they take in the file; all empty where there is no journal."""
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}, 0
    lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        header, *found = [dict(json.loads(line)) for line in lines] or [{}]
        rows = {int(row.pop("unit")): row for row in found}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}): pass --overwrite to begin again") from error
    if not all(row.keys() >= _KEYS for row in rows.values()):
        raise OutputError(f"{path} is damaged (a line without {' or '.join(sorted(_KEYS))}): pass --overwrite to begin again")
    return header, rows, sum(map(len, lines))
