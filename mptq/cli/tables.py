"""Human-readable tables, made from the documents that `--json` prints."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from mptq.formats import FORMATS
from mptq.report.formatting import number, size, uncertain


def grid(*columns: str) -> Table:
    """A table without lines; the first column is left-aligned, the others right-aligned."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right", no_wrap=True)
    return table


def components(document: Mapping[str, Any]) -> Table:
    """Parameters, bytes and action of each component, with totals."""
    rows, forms = document["components"], document["formats"]
    table = grid("component", "parameters", "in", *(f"out ({FORMATS[form].short})" for form in forms), "")
    table.columns[-1].justify = "left"
    total: dict[str, int] = {}
    for name, row in rows.items():
        for key, value in row.items():
            total[key] = total.get(key, 0) + value
        table.add_row(*_component_cells(escape(name), row, forms), escape(document["actions"][name]))
    table.add_section()
    table.add_row(*_component_cells("total", total, forms), "", style="bold")
    return table


def _component_cells(name: str, row: Mapping[str, int], forms: list[str]) -> list[str]:
    return [name, number(row["parameters"]), size(row["in"]), *(size(row[form]) for form in forms)]


def plan(document: Mapping[str, Any]) -> RenderableType:
    """Renders the plan of a run."""
    forms = document["formats"]
    lines: list[RenderableType] = [
        f"{escape(document['source']['path'])}  [bold]{escape(document['recipe']['name'])}[/] to {' and '.join(forms)}",
        components(document),
        f"excluded    {_shortened(document['excluded'])}",
        f"dropped     {_reasons(document['dropped'])}",
        f"peak memory about {size(document['predicted_peak_bytes'])}",
    ]
    return Group(*lines, *warnings(document))


def warnings(document: Mapping[str, Any]) -> list[str]:
    """One line per warning."""
    return [f"[yellow]warning[/]     {escape(text)}" for text in document["warnings"]]


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:4]) or "nothing"
    return escape(shown + (f" and {len(names) - 4} more" if len(names) > 4 else ""))


def _reasons(dropped: Mapping[str, str]) -> str:
    counts: dict[str, int] = {}
    for reason in dropped.values():
        counts[reason] = counts.get(reason, 0) + 1
    return escape("; ".join(f"{reason} ({count})" for reason, count in counts.items()) or "nothing")


def summary(document: Mapping[str, Any]) -> RenderableType:
    """Renders the report of a run."""
    forms = document["formats"]
    worst = sorted(document["layers"], key=lambda row: -max(row.get(form) or 0 for form in forms))[:3]
    table = grid("worst layers", *(f"weight error ({FORMATS[form].short})" for form in forms), "hidden-state error")
    for row in worst:
        table.add_row(str(row["layer"]), *(_percent(row.get(form)) for form in forms), _percent(row["hidden_relative_error"]))
    last = document["layers"][-1]["hidden_relative_error"]
    whole = [_percent(document["relative_error"][form]) for form in forms]
    table.add_row("all layers", *whole, _percent(last), style="bold")
    times = ", ".join(f"{stage} {spent:.1f} s" for stage, spent in document["seconds"].items())
    # A plain conversion quantizes nothing: it has no errors to show and no excluded modules.
    figures = [*fidelity(document), *rounding(document), *left_out(document)]
    errors: list[RenderableType] = [table, "", *figures] if document["tensors"] else []
    lines: list[RenderableType] = [
        f"[bold]{escape(document['recipe']['name'])}[/]  {escape(document['recipe']['description'])}",
        components(document),
        "",
        *errors,
        *([f"excluded    {_shortened(document['excluded'])}"] if "hf" in forms and document["tensors"] else []),
        *([f"differing   {_shortened(document['differing'])}"] if len(forms) > 1 else []),
        f"time        {escape(times)}",
        f"peak memory {size(document['peak_rss_bytes'])}",
    ]
    return Group(*lines, *warnings(document))


def rounding(document: Mapping[str, Any]) -> list[str]:
    """One line about rounding by the inputs: the mean error of the outputs, and for how many weights nearest was kept."""
    rows = [row for row in document["tensors"] if None not in (row.get("output_error"), row.get("output_error_nearest"))]
    if not rows:
        return []
    error, nearest = (
        math.sqrt(sum(row[key] ** 2 for row in rows) / len(rows)) for key in ("output_error", "output_error_nearest")
    )
    kept = sum(row.get("rounding") == "nearest" for row in rows)
    method = document["recipe"].get("rounding", "nearest")
    found = f"output error {_percent(error)} (nearest {_percent(nearest)}); nearest kept for {kept} of {len(rows)}"
    return [f"rounding    {method}: {found}"]


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.3f} %"


def tensor_line(row: Mapping[str, Any]) -> str:
    """A quantized tensor on one line."""
    shape = "x".join(map(str, row["shape"]))
    return (
        f"{row['name']:<58} {row['dtype_before']} {shape} -> {row['dtype_after']} {shape}  "
        f"amax {row['amax']:.4g}  error {100 * row['relative_error']:.3f} %"
    )


def gate(row: Mapping[str, Any]) -> str:
    """The measured value of a fidelity limit, and the limit, in words."""
    words = {"max_kl": ("the KL divergence is", " nats"), "max_ppl_increase": ("the perplexity increase is", " %")}
    what, unit = words[row["name"]]
    value = "not measured" if row["value"] is None else f"{row['value']:.4g}{unit}"
    where = " on text of an unseen kind" if row.get("text") == "unseen" else ""
    return f"{what} {value}{where} (limit {row['limit']:.4g}{unit})"


def fidelity(document: Mapping[str, Any]) -> list[str]:
    """Lines with the fidelity figures on held-out text, expert coverage and limits."""
    if document["fidelity"] is None:
        return []
    lines = figures(document)
    lines += served(document)
    lines += _sensitivity(document)
    lines += _experts(document)
    lines += [f"limit       {'met' if row['met'] else '[red]missed[/]'}: {gate(row)}" for row in document["gates"]]
    return lines


def served(document: Mapping[str, Any]) -> list[str]:
    """Lines about what Blackwell's loaders make of float32 block scales."""
    form = document["formats"][0]
    error = document.get("served_error", {}).get(form)
    if error is None:
        return []
    found = document["fidelity"] and document["fidelity"].get("served")
    kl = f", KL {uncertain(found['kl']['mean'], found['kl']['standard_error'])}" if found else ""
    stored = _percent(document["relative_error"][form])
    return [
        f"Blackwell   weight error {_percent(error)} instead of {stored}{kl}: its loaders round block scales to",
        "            powers of two; with recipe fp8-blockwise-ue8m0 they are so from the start, and nothing is lost there",
    ]


def figures(document: Mapping[str, Any]) -> list[str]:
    """Lines with the fidelity figures and the data that they were measured on."""
    found, data = document["fidelity"], document["calibration"]
    kl, perplexity, agreement = found["kl"], found["perplexity"], found["top1_agreement"]
    where = "default data" if data["default_data"] else ", ".join(row["name"] for row in data["datasets"])
    ratio = uncertain(perplexity["ratio"], perplexity["ratio_standard_error"])
    same = uncertain(100 * agreement["mean"], agreement["standard_error"] and 100 * agreement["standard_error"])
    lines = [
        f"KL          {uncertain(kl['mean'], kl['standard_error'])} nats per token",
        f"perplexity  {perplexity['reference']:.3f} -> {perplexity['quantized']:.3f}, ratio {ratio}",
        f"top-1       {same} % agreement on the most likely next token",
        f"            on {found['tokens']} held-out tokens in {found['sequences']} sequences from {escape(where)}",
    ]
    unseen = found.get("unseen")
    if unseen is not None:
        kl, ratio, kind = unseen["kl"], unseen["perplexity"]["ratio"], (data.get("unseen") or {}).get("name", "a text")
        lines += [
            f"unseen kind KL {uncertain(kl['mean'], kl['standard_error'])}, perplexity ratio {ratio:.4f}, "
            f"top-1 {100 * unseen['top1_agreement']['mean']:.2f} %",
            f"            on {unseen['tokens']} tokens of {escape(kind)}, a kind of text that never calibrates",
        ]
    return lines


def left_out(document: Mapping[str, Any]) -> list[str]:
    """A line with the numbers of documents that were skipped, if any."""
    rows = (document["calibration"] or {}).get("datasets", ())
    counts = {"empty (null or blank)": "empty", "copies of held-out documents": "copies"}
    found = {words: sum(row.get(key, 0) for row in rows) for words, key in counts.items()}
    words = ", ".join(f"{count} {words}" for words, count in found.items() if count)
    return [f"skipped     documents: {words}"] if words else []


def _sensitivity(document: Mapping[str, Any]) -> list[str]:
    """The groups of linears that cost most."""
    rows = [
        (cost, f"{group} of layer {row['layer']}")
        for row in document["layers"]
        for group, cost in (row.get("sensitivity") or {}).items()
    ]
    if not rows:
        return []
    worst = ", ".join(f"{name} ({_percent(math.sqrt(cost))})" for cost, name in sorted(rows, reverse=True)[:4])
    return [f"sensitivity {worst}: change of a token's hidden state after the layer"]


def _experts(document: Mapping[str, Any]) -> list[str]:
    """Experts that received too few tokens and use their layer's static scales."""
    poor = {row["layer"]: row["experts"]["fallback"] for row in document["layers"] if row["experts"]}
    count = sum(map(len, poor.values()))
    if not count:
        return []
    names = [f"{expert} of layer {layer}" for layer, experts in poor.items() for expert in experts]
    return [f"experts     {count} received too few tokens and use their layer's static scales: {_shortened(names)}"]
