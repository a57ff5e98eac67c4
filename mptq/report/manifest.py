"""The manifest: every file of an output with its hash, and every tensor of the source with what became of it. No torch."""

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
    """Write the manifest of the output at `root`: the last of its files. Raises OutputError for one that is not valid."""
    from mptq.report.manifest_schema import Manifest

    write_document(root / NAME, {"schema": SCHEMA, **content}, SCHEMA, Manifest)


def read_manifest(root: Path) -> dict[str, Any]:
    """The manifest of the mptq output at `root`; raises OutputError where there is none that this version reads."""
    from mptq.report.manifest_schema import Manifest

    return read_document(root / NAME, SCHEMA, Manifest)


def write_document(path: Path, document: dict[str, Any], schema: int, model: type[BaseModel]) -> None:
    """Write a JSON document of an output; raises OutputError, and writes nothing, where `read_document` would refuse it."""
    text = json.dumps(document, indent=1) + "\n"
    try:
        _parse(path, text, schema, model)
    except OutputError as error:
        raise OutputError(f"{error}: this is a fault of mptq, please report it; the output is not complete") from error
    path.write_text(text)


def read_document(path: Path, schema: int, model: type[BaseModel]) -> dict[str, Any]:
    """A JSON document of an mptq output; raises OutputError when it is missing, of another schema, or not as `model`."""
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
        raise OutputError(f"{path} is not of schema {schema}, which this version of mptq reads")
    wrong = problems(model, document)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise OutputError(f"{path} is damaged: {'; '.join(wrong[:3])[:500]}{more}")
    return document
