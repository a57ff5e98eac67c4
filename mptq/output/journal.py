"""The journal of a run: lists the units that are safely on disk, so that a run can resume after stopping at any point.

There is one JSON Lines file per rank in the unfinished output. The first line identifies the run; each further line records
a written unit with the data that the report and the metadata need. Incomplete lines are ignored. Does not import torch.
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
        os.ftruncate(self._descriptor, end)  # drops a line that was cut off when the run ended
        if not found:
            self._append(self._header)

    def commit(self, unit: int, row: Row) -> None:
        """Records that unit `unit` is on disk, which makes it part of the output."""
        self._append({"unit": unit, **row})

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)

    def _append(self, line: Mapping[str, Any]) -> None:
        data = memoryview(json.dumps(line).encode() + b"\n")
        while data:
            data = data[os.write(self._descriptor, data) :]
        os.fdatasync(self._descriptor)


def committed(folder: Path) -> dict[int, Row]:
    """Returns the rows of all ranks' journals by unit, sorted by unit."""
    rows: dict[int, Row] = {}
    for file in sorted(folder.glob(f"{NAME}*")) if (folder / NAME).is_file() else ():
        rows |= read(file)[1]
    return dict(sorted(rows.items()))


def read(path: Path) -> tuple[dict[str, Any], dict[int, Row], int]:
    """Returns the header, the rows by unit, and the size in bytes of the complete lines; empty without a journal.

    Raises OutputError for a damaged journal.
    """
    try:
        raw = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return {}, {}, 0
    lines = raw[: raw.rfind(b"\n") + 1].splitlines(keepends=True)
    try:
        header, *found = [dict(json.loads(line)) for line in lines] or [{}]
        rows = {int(row.pop("unit")): row for row in found}
    except (ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} is damaged ({error}): pass --overwrite to start over") from error
    if not all(row.keys() >= _KEYS for row in rows.values()):
        raise OutputError(f"{path} is damaged (a line lacks {' or '.join(sorted(_KEYS))}): pass --overwrite to start over")
    return header, rows, sum(map(len, lines))
