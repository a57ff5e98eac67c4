"""The manifest: output files with hashes, and how each source tensor is stored. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.errors import OutputError
from mptq.output.directory import MANIFEST

if TYPE_CHECKING:
    from pydantic import BaseModel

NAME = MANIFEST
SCHEMA = 3


def write_manifest(root: Path, content: dict[str, Any]) -> None:
    """Writes the manifest of the output at `root`, as the last of its files; raises OutputError if it is not valid."""
    from mptq.report.manifest_schema import Manifest

    write_document(root / NAME, {"schema": SCHEMA, **content}, SCHEMA, Manifest)


def read_manifest(root: Path) -> dict[str, Any]:
    """Reads the manifest of the mptq output at `root`; raises OutputError if it is missing or of another version."""
    from mptq.report.manifest_schema import Manifest

    return read_document(root / NAME, SCHEMA, Manifest)


def write_document(path: Path, document: dict[str, Any], schema: int, model: type[BaseModel]) -> None:
    """Writes a JSON document of an output; raises OutputError and writes nothing if it does not match `model`."""
    text = json.dumps(document, indent=1) + "\n"
    try:
        _parse(path, text, schema, model)
    except OutputError as error:
        raise OutputError(f"{error}: this is a bug in mptq, please report it; the output is incomplete") from error
    path.write_text(text)


def read_document(path: Path, schema: int, model: type[BaseModel]) -> dict[str, Any]:
    """Reads a JSON document of an output; raises OutputError if it is missing or not as `schema` and `model`."""
    try:
        text = path.read_text()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise OutputError(f"{path.parent} has no {path.name}: it is not an output of mptq") from error
    except ValueError as error:
        raise OutputError(f"{path} is damaged ({error})") from error
    return _parse(path, text, schema, model)


def _parse(path: Path, text: str, schema: int, model: type[BaseModel]) -> dict[str, Any]:
    from mptq.report.manifest_schema import problems

    try:
        document: dict[str, Any] = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise OutputError(f"{path} is damaged ({error})") from error
    if not isinstance(document, dict) or document.get("schema") != schema:
        raise OutputError(f"{path} does not have schema version {schema}, the only one that this version of mptq reads")
    wrong = problems(model, document)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise OutputError(f"{path} is damaged: {'; '.join(wrong[:3])[:500]}{more}")
    return document
