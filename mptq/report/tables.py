"""Tables of the page: columns as data, and cells with a sort value and a displayed text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mptq.formats import FORMATS
from mptq.report import views
from mptq.report.formatting import number, percent, size

SHOWN = 200
"""Maximum number of rows in the tensor table; a report may have 150,000 tensors."""
Value = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True)
class Column:
    """A column: its title, a function that returns the sort value of a row, and one that formats the value."""

    title: str
    value: Value
    show: Callable[[Any], str] = str
    numeric: bool = True
    order: str = "none"
    """Initial sort order of this column, as an aria-sort value."""


@dataclass(frozen=True)
class Table:
    """Non-empty columns, and for each row one (value, text) pair per column; both are None for a missing value."""

    caption: str
    columns: list[Column]
    rows: list[list[tuple[Any, str | None]]] = field(default_factory=list)
    foot: list[str] = field(default_factory=list)


def make(caption: str, columns: Iterable[Column], rows: Iterable[Mapping[str, Any]]) -> Table | None:
    """Returns a table with the columns that have a value in some row; None without rows."""
    rows = list(rows)
    kept = [column for column in columns if any(column.value(row) is not None for row in rows)]
    cells = [[_cell(column, column.value(row)) for column in kept] for row in rows]
    return Table(caption, kept, cells) if rows else None


def _cell(column: Column, value: Any) -> tuple[Any, str | None]:
    return (None, None) if value is None else (value, column.show(value))


def layers(document: Mapping[str, Any]) -> Table | None:
    """All layers."""
    columns = [
        Column("layer", _get("layer"), order="ascending"),
        *(Column(f"weight error ({FORMATS[form].label})", _get(form), percent) for form in document["formats"]),
        Column("hidden-state error", _get("hidden_relative_error"), percent),
        Column("hidden-state 1 - cosine", _get("hidden_cosine", lambda cosine: 1 - cosine), _short),
        Column("K scale", _get("kv_cache", lambda cache: cache["k_scale"]), _short),
        Column("V scale", _get("kv_cache", lambda cache: cache["v_scale"]), _short),
        Column("min tokens per expert", _get("experts", lambda experts: min(experts["tokens"])), number),
        Column("max tokens per expert", _get("experts", lambda experts: max(experts["tokens"])), number),
        Column("experts using the layer's scale", _get("experts", lambda experts: len(experts["fallback"]))),
    ]
    return make("Layers", columns, document["layers"])


def tensors(document: Mapping[str, Any]) -> Table | None:
    """The tensors with the largest relative error."""
    several = len(document["formats"]) > 1
    columns = [
        Column("tensor", _get("name"), numeric=False),
        *([Column("output", _get("format"), lambda form: FORMATS[form].label, numeric=False)] if several else []),
        Column("relative error", _get("relative_error"), percent, order="descending"),
        Column("SNR [dB]", _get("sqnr_db"), _two),
        Column("output error", _get("output_error"), percent),
        Column("with nearest rounding", _get("output_error_nearest"), percent),
        Column("rounding", _rounding, numeric=False),
        Column("largest error", _get("max_abs_error"), _short),
        Column("amax", _get("amax"), _short),
        Column("smallest scale", _get("scale_min"), _short),
        Column("largest scale", _get("scale_max"), _short),
        Column("zeros", _get("zeros"), percent),
        Column("saturated", _get("saturated"), percent),
        Column("input amax", _get("input_amax"), _short),
        Column("shape", lambda row: " x ".join(map(str, row["shape"])), numeric=False),
        Column("scheme", _get("scheme"), numeric=False),
    ]
    worst = sorted(document["tensors"], key=lambda row: (-row["relative_error"], row["format"], row["name"]))[:SHOWN]
    return make("Tensors with the largest relative error", columns, worst)


def _rounding(row: Mapping[str, Any]) -> str | None:
    """How a weight was rounded, if it was by a method."""
    return row.get("rounding") if row.get("output_error") is not None else None


def components(document: Mapping[str, Any]) -> Table | None:
    """Parameters, bytes and action by component, with totals."""
    sizes = {"in": "checkpoint"} | {form: FORMATS[form].label for form in document["formats"]}
    columns = [
        Column("component", _get("name"), numeric=False),
        Column("parameters", _get("parameters"), number),
        *(Column(title, _get(key), size) for key, title in sizes.items()),
        Column("action", _get("action"), numeric=False),
    ]
    rows = [{"name": name, "action": document["actions"][name]} | row for name, row in document["components"].items()]
    table = make("Components", columns, rows)
    if table is not None:
        sums = [sum(row.get(key, 0) for row in rows) for key in ("parameters", *sizes)]
        table.foot.extend(["total", number(sums[0]), *map(size, sums[1:]), ""])
    return table


def datasets(document: Mapping[str, Any]) -> Table | None:
    """The datasets of the calibration sequences."""
    columns = [
        Column("dataset", _get("name"), numeric=False),
        Column("kind", _get("kind"), numeric=False),
        Column("weight", _get("weight"), "{:g}".format),
        Column("documents", _get("documents"), number),
        Column("skipped: empty", _get("empty"), number),
        Column("skipped: copies of held-out", _get("copies"), number),
        Column("sequences", _get("sequences"), number),
        Column("tokens", _get("tokens"), number),
        Column("sha256", _get("sha256"), lambda digest: digest[:12], numeric=False),
    ]
    return make("Datasets", columns, (document.get("calibration") or {}).get("datasets", []))


def schemes(document: Mapping[str, Any]) -> Table | None:
    """Number of linears by scheme."""
    columns = [
        Column("output", lambda row: FORMATS[row["format"]].label, numeric=False),
        Column("scheme", _get("name"), numeric=False),
        Column("linears", _get("count"), number),
    ]
    rows = [
        {"format": form, "name": name, "count": count}
        for form, counts in document["schemes"].items()
        for name, count in counts.items()
    ]
    return make("Schemes", columns, rows)


def versions(document: Mapping[str, Any]) -> Table | None:
    """Versions of the packages that affect the results."""
    columns = [Column("package", _get("name"), numeric=False), Column("version", _get("version"), numeric=False)]
    return make("Versions", columns, ({"name": name, "version": found} for name, found in document["versions"].items()))


def names(caption: str, found: Iterable[str], reasons: Mapping[str, str] | None = None) -> Table | None:
    """Name patterns with the number of names that match each, and a reason if given."""
    columns = [
        Column("name (* is any number)", _get("name"), numeric=False),
        Column("count", _get("count"), number),
        Column("reason", _get("why"), numeric=False),
    ]
    counts = Counter((views.pattern(name), (reasons or {}).get(name)) for name in found)
    return make(caption, columns, ({"name": name, "why": why, "count": count} for (name, why), count in counts.items()))


def _get(key: str, then: Callable[[Any], Any] = lambda value: value) -> Value:
    def value(row: Mapping[str, Any]) -> Any:
        found = row.get(key)
        return None if found is None else then(found)

    return value


def _short(value: float) -> str:
    return f"{value:#.4g}"


def _two(value: float) -> str:
    return f"{value:.2f}"
