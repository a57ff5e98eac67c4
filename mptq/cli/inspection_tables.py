"""Human-readable form of the document that `mptq inspect --json` prints."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from textwrap import wrap
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from mptq.cli import tables
from mptq.formats import FORMATS
from mptq.report.formatting import number, size

WIDEST = 400
"""Maximum line width in characters: tensor names are long and are never truncated."""
_WIDTH = 120


def inspection(document: Mapping[str, Any]) -> RenderableType:
    """Renders the whole document: why it cannot be quantized, facts, tensors, unread items, settings and recipes."""
    facts = {**document["facts"], **_quantized(document)}
    width = max(map(len, facts))
    lines: list[RenderableType] = [f"{escape(document['path'])}  [bold]{document['kind']}[/]"]
    if document.get("problem"):
        lines.append(f"[yellow]cannot be quantized:[/] {escape(document['problem'])}")
    lines += tables.warnings({"warnings": document.get("warnings", ())})
    lines += [f"{name:<{width}}  {escape(str(value))}" for name, value in facts.items() if value not in ("", None)]
    return Group(*lines, "", _tree(document), *_not_read(document), *_settings(document), *_recipes(document))


def _quantized(document: Mapping[str, Any]) -> dict[str, str]:
    """How weights are quantized and, for an output of mptq, the figures of its report."""
    facts: dict[str, str] = {}
    found = document["quantization"]
    if found is not None:
        words = [f"{count} weights in {what}" for what, count in found["weights"].items()]
        counts = {"inputs with static scales": found["static_inputs"], "KV cache scales": found["cache_scales"]}
        facts["quantized"] = "; ".join(words + [f"{count} {what}" for what, count in counts.items() if count])
    made = document.get("output")
    if made is not None:
        errors = [
            f"{value:.4g} ({FORMATS[form].short})"
            for form, value in (made["relative_error"] or {}).items()
            if value is not None
        ]
        facts["weight error"] = ", ".join(errors)
        facts |= {line[:12].strip() or " ": line[12:] for line in _fidelity(made)}
        files = made["files"]
        facts["output"] = f"{len(files)} files, {size(sum(row['bytes'] for row in files.values()))}, listed in manifest.json"
    return facts


def _fidelity(made: Mapping[str, Any]) -> list[str]:
    """Fidelity figures, one per line, as printed after a run."""
    return tables.figures(made) if made["fidelity"] and made["calibration"] else []


def _tree(document: Mapping[str, Any]) -> Table:
    table = tables.grid("component", "parameters", "bytes", "dtypes", "shape", "stored as")
    for column in table.columns[3:]:
        column.justify = "left"
    for row in document["components"]:
        cells = (row["component"], number(row["parameters"]), size(row["bytes"]), ", ".join(row["dtypes"]), "", row["stacking"])
        table.add_row(*cells, style="bold")
        for leaf in () if row["component"] == "scales" else row["tensors"]:
            table.add_row(*_leaf(leaf))
    table.add_section()
    table.add_row("total", number(document["parameters"]), size(document["bytes"]), "", "", "", style="bold")
    return table


def _leaf(leaf: Mapping[str, Any]) -> list[str]:
    shape = "x".join(map(str, leaf["shape"])) or "scalar"
    times = f"{leaf['count']} of {shape}" if leaf["count"] > 1 else shape
    return [f"  {escape(leaf['name'])}", number(leaf["parameters"]), size(leaf["bytes"]), leaf["dtype"], times]


def _not_read(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    rows = document.get("not_read")
    if not rows:
        return
    table = tables.grid("never read", "items", "bytes")
    for row in rows:
        table.add_row(escape(row["what"]), str(row["items"]), size(row["bytes"]))
    yield from ("", table)


def _settings(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Settings that affect the model, grouped by source, and conflicts between sources."""
    by_source: dict[str, list[str]] = {}
    for row in document.get("settings", ()):
        if row["matters"]:
            by_source.setdefault(row["source"], []).append(f"{row['key']}={_short(row['value'])}")
    if by_source:
        yield ""
        yield "[bold]settings[/]"
    for source, words in by_source.items():
        yield f"  from {escape(source)}"
        yield from (f"    {escape(line)}" for line in wrap("  ".join(words), _WIDTH, break_on_hyphens=False))
    for conflict in document.get("conflicts", ()):
        yield f"[yellow]conflict[/]    {escape(conflict['text'])}"


def _short(value: Any) -> str:
    text = str(value).replace(" ", "")
    return text if len(text) <= 60 else f"{text[:57]}..."


def _recipes(document: Mapping[str, Any]) -> Iterator[RenderableType]:
    """Predictions for each recipe, then the reasons why recipes cannot be applied; empty if the model has a problem."""
    rows = document.get("recipes")
    if not rows or document.get("problem"):
        return
    table = tables.grid("recipe", *(f"bytes ({FORMATS[form].short})" for form in FORMATS), "peak memory")
    for row in rows:
        sizes = [size(row["bytes"][form]) if form in row["bytes"] else "-" for form in FORMATS]
        table.add_row(row["recipe"], *sizes, "-" if row["peak_bytes"] is None else size(row["peak_bytes"]))
    yield from (
        "",
        table,
        "peak memory: the larger of the formats, without activations; `mptq quantize --dry-run` includes activations",
    )
    for problem in dict.fromkeys(text for row in rows for text in row["problems"].values()):
        yield f"[yellow]-[/] {escape(problem)}"
