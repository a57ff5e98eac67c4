"""Converts config values to plain data: Python objects become strings, and nothing is imported. No torch."""

from __future__ import annotations

from typing import Any

_FUNCTIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "fast_gelu": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_impl": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_tanh": "gelu_tanh",
    "openai_gelu": "gelu_tanh",
    "squared_relu": "squared_relu",
    "relu2": "squared_relu",
    "relu": "relu",
    "quick_gelu": "quick_gelu",
}
"""Last component of a function's name -> activation. Variants of the tanh approximation differ only in form."""


class Unknown:
    """Stands for an object that cannot be converted: no value."""


def plain(value: Any) -> Any:
    """Converts `value` to a number, a string or a flat list of them.

    A pickled class or function (a class with a `global_name`) and a `_target_` of a YAML config become the last
    component of their name, and a member of an enumeration becomes its name. Any other object becomes `Unknown`.
    """
    if isinstance(value, list | tuple):
        nested = any(isinstance(item, list | tuple | dict) for item in value)
        return Unknown if nested else [plain(item) for item in value]
    if isinstance(value, dict):
        return _target(value)
    if isinstance(value, type):
        return _last(getattr(value, "global_name", "")) or Unknown
    return value if value is None or isinstance(value, bool | int | float | str) else Unknown


def _target(value: dict[str, Any]) -> Any:
    """Converts a mapping of a run config: Bridge and NeMo write functions, dtypes and enumerations as `_target_`."""
    if "_name_" in value:
        return str(value["_name_"])
    if value.get("_call_") is True or "_target_" not in value:
        return Unknown
    return _last(str(value["_target_"]))


LONGEST = 60
"""Maximum length of a value in a message; values can be whole documents or have an entry for each layer."""


def short(value: Any) -> str:
    """Returns `value` on one line for a message, truncated to `LONGEST` characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 3]}..."


def activation(value: Any) -> Any:
    """Returns the name of an activation function given as a name, a pickled function or a `_target_` with arguments."""
    if isinstance(value, dict):
        name, tanh = str(value.get("_target_", "")), value.get("approximate") == "tanh"
    else:
        name, tanh = str(getattr(value, "global_name", value)), False
    known = _FUNCTIONS.get(_last(name), name)
    return "gelu_tanh" if known == "gelu" and tanh else known


def _last(name: str) -> str:
    return name.rpartition(".")[2]
