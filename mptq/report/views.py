"""Views of the document for the page: tensor values by module and layer, and name patterns."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]
NAN = math.nan
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+)$")
_CONTAINERS = {"self_attn", "self_attention", "attention", "mlp", "block_sparse_moe", "local_experts", "weight"}


def place(row: Row) -> tuple[int, str] | None:
    """Returns layer and module of a tensor: (3, "q_proj"), (3, "experts up_proj"); None outside the layers."""
    found = _LAYER.search(row["name"])
    if found is None:
        return None
    parts = [part for part in found[2].split(".") if not part.isdigit() and part not in _CONTAINERS]
    return int(found[1]), " ".join(parts) or found[2]


def grid(rows: Iterable[Row], field: str, layers: int, pick: Callable[[float, float], float]) -> dict[str, list[float]]:
    """Returns `field` of the tensors by module, one value per layer; `pick` combines the experts of a layer.

    Missing values are NaN. Modules are in order of first appearance.
    """
    table: dict[str, list[float]] = {}
    for row in rows:
        where, value = place(row), row.get(field)
        if where is None or value is None or where[0] >= layers:
            continue
        line = table.setdefault(where[1], [NAN] * layers)
        line[where[0]] = value if math.isnan(line[where[0]]) else pick(line[where[0]], value)
    return table


def of_format(document: Row, form: str) -> list[Row]:
    """Returns the tensor rows of one output."""
    return [row for row in document["tensors"] if row["format"] == form]


def by_layer(document: Row, field: str) -> list[float]:
    """Returns a field of all layers, with NaN for null or absent values."""
    values = (row.get(field) for row in document["layers"])
    return [NAN if value is None else value for value in values]


def known(values: Iterable[float]) -> list[float]:
    """Returns the values that are not NaN."""
    return [value for value in values if not math.isnan(value)]


def covered(document: Row) -> list[Row]:
    """Returns the layers with expert calibration data."""
    return [row for row in document["layers"] if row.get("experts")]


def pattern(name: str) -> str:
    """Replaces the numbers in a name with *, so that the names of 25,600 experts share one pattern."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name)
