"""Write docs/report.md from the schema of report.json.

python scripts/report_reference.py
"""

from __future__ import annotations

import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from mptq.report.schema import Report

PAGE = Path(__file__).parent.parent / "docs" / "report.md"
INTRODUCTION = """\
# report.json and report.html

`report.json` records what a run did and what it cost, as one JSON document; `mptq report OUT --json` prints it. Every
value in it was measured in that run, or is null. `mptq report OUT --html FILE` renders it as an HTML page with plots and
sortable tables: a single self-contained file, which every run also writes if matplotlib and jinja2 are installed (the
extra `report`). The same document gives the same bytes.

    from mptq.report import read
    from mptq.report.html import render
    from mptq.report.schema import Report

    document = read(Path("OUT"))
    Report.model_validate(document)      # raises for unknown or missing fields
    Report.model_json_schema()           # the JSON Schema
    page = render(document)

This page is generated from `mptq/report/schema.py` by `scripts/report_reference.py`.
"""

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", Any: "anything"}
_COMPOSED = {
    list: "list of {}".format,
    dict: "{} -> {}".format,
    types.UnionType: lambda *words: " or ".join(words),
    Union: lambda *words: " or ".join(words),
}


def markdown() -> str:
    """The content of docs/report.md: a table for every model of the schema, in order of first reference."""
    models: list[type[BaseModel]] = [Report]
    sections = [INTRODUCTION]
    for model in models:  # extended while iterating
        rows = [_row(name, field, models) for name, field in model.model_fields.items()]
        sections.append(
            f"## {model.__name__}\n\n{model.__doc__}\n\n| field | type | meaning |\n|---|---|---|\n" + "".join(rows)
        )
    return "\n".join(sections)


def _row(name: str, field: FieldInfo, models: list[type[BaseModel]]) -> str:
    limits = [_limit(item) for item in field.metadata]
    words = " ".join(filter(None, [_type(field.annotation, models), *limits]))
    words += "" if field.is_required() else ", may be absent"
    return f"| `{field.alias or name}` | {words} | {field.description} |\n"


def _limit(item: Any) -> str:
    match item:
        case Ge():
            return f">= {item.ge}"
        case Gt():
            return f"> {item.gt}"
        case Le():
            return f"<= {item.le}"
    return ""


def _type(annotation: Any, models: list[type[BaseModel]]) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        if annotation not in models:
            models.append(annotation)
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if origin is None:
        return _PLAIN[annotation]
    if origin is Literal:
        return " or ".join(f"`{argument}`" for argument in arguments)
    if origin is Annotated:
        return _type(arguments[0], models)
    return _COMPOSED[origin](*(_type(argument, models) for argument in arguments))


if __name__ == "__main__":
    PAGE.write_text(markdown())
