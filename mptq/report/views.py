"""What the page shows of the tensors: values by kind of module and layer, the worst, and long lists of names by pattern."""

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
    """Layer and kind of module of a tensor, as in (3, "q_proj") or (3, "experts up_proj"); None outside the layers."""
    found = _LAYER.search(row["name"])
    if found is None:
        return None
    parts = [part for part in found[2].split(".") if not part.isdigit() and part not in _CONTAINERS]
    return int(found[1]), " ".join(parts) or found[2]


def grid(rows: Iterable[Row], field: str, layers: int, pick: Callable[[float, float], float]) -> dict[str, list[float]]:
    """`field` of the tensors by kind of module, one value a layer; experts of a layer share one, that `pick` chooses.

    NaN where there is none. Kinds stand in the order in which the tensors first name them.
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
    """The rows of one output."""
    return [row for row in document["tensors"] if row["format"] == form]


def by_layer(document: Row, field: str) -> list[float]:
    """A field of the layers, NaN where it is null or absent."""
    values = (row.get(field) for row in document["layers"])
    return [NAN if value is None else value for value in values]


def known(values: Iterable[float]) -> list[float]:
    """The values that are there."""
    return [value for value in values if not math.isnan(value)]


def covered(document: Row) -> list[Row]:
    """The layers whose experts were calibrated."""
    return [row for row in document["layers"] if row.get("experts")]


def pattern(name: str) -> str:
    """A name with * for the numbers in it: the names of 25 600 experts have one pattern."""
    return re.sub(r"(?<![A-Za-z0-9])\d+(?![A-Za-z0-9])", "*", name)
