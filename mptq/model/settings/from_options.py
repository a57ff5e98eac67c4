"""Settings from the user: `--config key=value`. No torch."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from mptq.errors import OptionError
from mptq.model.settings.from_megatron_args import NEGATED, RENAMED, TRANSLATED, from_args
from mptq.model.settings.settings import ACTIVATIONS, KINDS
from mptq.model.settings.values import activation

NAMES = (*KINDS, *RENAMED, *NEGATED, *TRANSLATED)
"""All valid keys, with underscores."""


def from_options(options: Sequence[str]) -> dict[str, Any]:
    """Returns the settings in `options`, each `key=value` with a YAML value.

    A key is a setting or an argument of Megatron-LM, with `-` or `_`. Raises OptionError for an unknown key, suggesting
    a similar one, and for a value of the wrong type.
    """
    given: dict[str, Any] = {}
    for option in options:
        key, value = _parsed(option)
        given[key] = value
    arguments = {key: value for key, value in given.items() if key not in KINDS}
    settings = {key: value for key, value in given.items() if key in KINDS}
    return from_args(arguments) | settings


def _parsed(option: str) -> tuple[str, Any]:
    import yaml

    name, equals, text = option.partition("=")
    key = name.strip().lstrip("-").replace("-", "_")
    if not equals or not key:
        raise OptionError(f"--config {option}: write key=value, as in --config rotary_base=500000")
    if key not in NAMES:
        near = difflib.get_close_matches(key, NAMES, n=1)
        raise OptionError(f"--config {option}: unknown setting {key!r}" + (f"; did you mean {near[0]}?" if near else ""))
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise OptionError(f"--config {option}: {text!r} is not a YAML value") from error
    return key, _checked(option, key, value)


def _checked(option: str, key: str, value: Any) -> Any:
    """Returns `value` with the type that `key` needs; raises OptionError if it is of the wrong type."""
    kinds = KINDS.get(RENAMED.get(key, key), (bool,))
    if key == "activation_func":
        value = activation(value)
        if value not in ACTIVATIONS:
            raise OptionError(f"--config {option}: unknown activation {value!r}: use one of {', '.join(ACTIVATIONS)}")
    if float in kinds and isinstance(value, str):
        value = _number(value)  # YAML 1.1 reads 1e-5 as a string
    # In Python a bool is an int, but not for a user.
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if value is not None and not fits:
        wanted = " or ".join(kind.__name__ for kind in kinds)
        raise OptionError(f"--config {option}: {key} must be {wanted}, not {type(value).__name__}")
    return value


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text
