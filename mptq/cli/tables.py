"""Tables for people, from the same documents that `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from mptq.cli.console import number, size

_FORM = {"hf": "HF", "megatron": "Megatron"}


def _grid(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def components(document: Mapping[str, Any]) -> Table:
    """What happens to each component, its parameters and bytes, with a total."""
    rows, forms = document["components"], document["formats"]
    table = _grid("component", "parameters", "in", *(f"out ({_FORM[form]})" for form in forms), "")
    table.columns[-1].justify = "left"
    total: dict[str, int] = {}
    for name, row in rows.items():
        for key, value in row.items():
            total[key] = total.get(key, 0) + value
        table.add_row(*_component_cells(name, row, forms), document["actions"][name])
    table.add_section()
    table.add_row(*_component_cells("total", total, forms), "", style="bold")
    return table


def _component_cells(name: str, row: Mapping[str, int], forms: list[str]) -> list[str]:
    return [name, number(row["parameters"]), size(row["in"]), *(size(row[form]) for form in forms)]


def plan(document: Mapping[str, Any]) -> RenderableType:
    """What a run will do."""
    forms = document["formats"]
    lines: list[RenderableType] = [
        f"{escape(document['source']['path'])}  [bold]{document['recipe']['name']}[/] to {' and '.join(forms)}",
        components(document),
        f"excluded    {_shortened(document['excluded'])}",
        f"dropped     {_reasons(document['dropped'])}",
        f"peak memory about {size(document['predicted_peak_bytes'])}",
    ]
    return Group(*lines, *warnings(document))


def warnings(document: Mapping[str, Any]) -> list[str]:
    """One line a warning."""
    return [f"[yellow]warning[/]     {escape(text)}" for text in document["warnings"]]


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing"
    return escape(shown + (f" and {len(names) - 4} more" if len(names) > 4 else ""))


def _reasons(dropped: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in dropped.values():
        counts[reason] = counts.get(reason, 0) + 1
    return escape("; ".join(f"{count} of {reason}" for reason, count in counts.items()) or "nothing")


def summary(document: Mapping[str, Any]) -> RenderableType:
    """What a run did."""
    forms = document["formats"]
    worst = sorted(document["layers"], key=lambda row: -max(row.get(form) or 0 for form in forms))[:3]
    table = _grid("worst layers", *(f"weight error ({_FORM[form]})" for form in forms))
    for row in worst:
        table.add_row(str(row["layer"]), *(_percent(row.get(form)) for form in forms))
    table.add_row("all layers", *(_percent(document["relative_error"][form]) for form in forms), style="bold")
    times = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in document["seconds"].items())
    lines: list[RenderableType] = [
        f"[bold]{document['recipe']['name']}[/]  {escape(document['recipe']['description'])}",
        components(document),
        "",
        table,
        "",
        *([f"excluded    {_shortened(document['excluded'])}"] if "hf" in forms else []),
        *([f"differing   {_shortened(document['differing'])}"] if len(forms) > 1 else []),
        f"time        {times}",
        f"peak memory {size(document['peak_rss_bytes'])}",
    ]
    return Group(*lines, *warnings(document))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3f} %"


def tensor_line(row: Mapping[str, Any]) -> str:
    """One quantized tensor, on one line."""
    shape = "x".join(map(str, row["shape"]))
    return (
        f"{row['name']:<58} {row['dtype_before']} {shape} -> {row['dtype_after']} {shape}  "
        f"amax {row['amax']:.4g}  error {100 * row['relative_error']:.3f} %"
    )


def inspection(document: Mapping[str, Any]) -> RenderableType:
    """What `mptq inspect` found."""
    lines: list[RenderableType] = [f"{escape(document['path'])}  [bold]{document['kind']}[/]"]
    width = max(map(len, document["facts"]))
    facts = [f"{name:<{width}}  {escape(str(value))}" for name, value in document["facts"].items() if value not in ("", None)]
    table = _grid("component", "parameters", "bytes", "dtypes")
    for row in document["components"]:
        table.add_row(row["component"], number(row["parameters"]), size(row["bytes"]), ", ".join(row["dtypes"]))
    table.add_section()
    table.add_row("total", number(document["parameters"]), size(document["bytes"]), "", style="bold")
    return Group(*lines, *facts, "", table)
