"""Checks the JSON files of a Hugging Face output against its tensors. Does not import torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mptq.formats.protocol import OpenedOutput
from mptq.model.tensors import LAYERS


def check_config(output: OpenedOutput, made: Mapping[str, Any]) -> Iterator[str]:
    """Checks that config.json excludes exactly lm_head and the unquantized layer matrices, and checks the index."""
    index = output.directory / "model.safetensors.index.json"
    if index.is_file() and _indexed(index) != set(output.specs):
        yield f"{index.name} does not match the tensors in the files"
    if made["dialect"] == "plain":
        return
    listed = _excluded(output.directory / "config.json")
    if listed is None:
        yield "config.json has no valid quantization_config"
        return
    plain = {"lm_head"}
    for items in (entry.get("hf", []) for inner, entry in made["tensors"].items() if inner.startswith(LAYERS)):
        weights = [item for item in items if item["name"].endswith(".weight") and len(item["shape"]) == 2]
        plain |= {item["name"].removesuffix(".weight") for item in weights if item["dtype"] != "float8_e4m3fn"}
    if listed != plain:
        yield f"config.json has missing or extra excluded modules {sorted(listed ^ plain)[:3]}: engines would misread them"


def _excluded(path: Path) -> set[str] | None:
    """Returns the modules that config.json excludes from quantization, or None without a valid quantization_config."""
    try:
        config = json.loads(path.read_text())["quantization_config"]
        listed = set(config.get("modules_to_not_convert") or config.get("ignore") or [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return listed if all(isinstance(name, str) for name in listed) else None


def _indexed(path: Path) -> set[str] | None:
    """Returns the tensor names in an index file, or None if the file is not a valid index."""
    try:
        return set(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
