"""Groups tensors by component and by name pattern, and describes stacking. Does not import torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mptq.types import TensorSpec

_COMPONENTS = (
    ("_scale", "scales"),
    ("_amax", "scales"),
    ("k_proj.k_scale", "scales"),
    ("vision", "vision"),
    ("visual", "vision"),
    ("mtp.", "multi-token prediction"),
    ("norm", "norms"),
    ("embed", "embedding"),
    ("shared_expert", "shared experts"),
    ("router", "router"),
    ("gate.weight", "router"),
    ("gate.e_score", "router"),
    ("expert", "experts"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("q_proj", "attention"),
    ("k_proj", "attention"),
    ("v_proj", "attention"),
    ("o_proj", "attention"),
    ("mlp", "mlp"),
    ("up_proj", "mlp"),
    ("down_proj", "mlp"),
    (".fc1.", "mlp"),
    (".fc2.", "mlp"),
    ("mixer", "mamba"),
    ("output_layer", "output layer"),
    ("lm_head", "output layer"),
)
"""Substring of a tensor name in any format -> component; the first match is used."""
_NO_PARAMETERS = ("scales",)
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)|(?<=\.weight)\d+$|(?<=\.bias)\d+$")
_LAYER = re.compile(r"\blayers\.(?P<index>\d+\.)?")
_EXPERT = re.compile(r"(?<!shared_)experts\.(?:experts\.|local_experts\.)?(?P<index>\d+\.|.*\.(?:weight|bias)\d+$)?")


def component(name: str) -> str:
    """Returns the component that a tensor belongs to, from its name in any format."""
    return next((label for part, label in _COMPONENTS if part in name), "other")


def tree(specs: Iterable[TensorSpec]) -> dict[str, Any]:
    """Returns `components` with their `tensors`, and totals; tensors that differ only in name numbers share an entry.

    Scales count as bytes but not as parameters.
    """
    rows: dict[str, dict[str, Any]] = {}
    leaves: dict[tuple[str, str, tuple[int, ...]], dict[str, Any]] = {}
    for spec in specs:
        name = _NUMBER.sub("*", spec.name)
        leaf = leaves.get((name, spec.dtype, spec.shape))
        if leaf is None:
            label = component(spec.name)
            leaf = {"name": name, "count": 0, "shape": list(spec.shape), "dtype": spec.dtype, "stacking": stacking(spec)}
            leaves[name, spec.dtype, spec.shape] = leaf
            rows.setdefault(label, {"component": label, "tensors": []})["tensors"].append(leaf)
        leaf["count"] += 1
    components = [_summed(row) for row in rows.values()]
    totals = {key: sum(row[key] for row in components) for key in ("parameters", "bytes")}
    return totals | {"components": components}


def _summed(row: dict[str, Any]) -> dict[str, Any]:
    """Adds parameters and bytes to a component and its tensors."""
    counts = row["component"] not in _NO_PARAMETERS
    for leaf in row["tensors"]:
        spec = TensorSpec(leaf["name"], leaf["dtype"], tuple(leaf["shape"]))
        leaf["parameters"], leaf["bytes"] = counts * leaf["count"] * spec.numel, leaf["count"] * spec.nbytes
    return {
        "component": row["component"],
        "parameters": sum(leaf["parameters"] for leaf in row["tensors"]),
        "bytes": sum(leaf["bytes"] for leaf in row["tensors"]),
        "dtypes": list(dict.fromkeys(leaf["dtype"] for leaf in row["tensors"])),
        "stacking": "; ".join(dict.fromkeys(leaf["stacking"] for leaf in row["tensors"] if leaf["stacking"])),
        "tensors": row["tensors"],
    }


def stacking(spec: TensorSpec) -> str:
    """Describes whether a tensor holds one layer (expert) or a stack of them; "" outside the layers."""
    words, sizes = [], list(spec.shape)
    for pattern, what in ((_LAYER, "layer"), (_EXPERT, "expert")):
        match = pattern.search(spec.name)
        if match is None:
            continue
        if match["index"]:
            words.append(f"one key per {what}")
        elif sizes:
            words.append(f"{sizes.pop(0)} {what}s stacked")
    return ", ".join(words)
