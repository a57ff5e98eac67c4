"""Describes a Hugging Face model in safetensors files, quantized by any tool or not. Does not import torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mptq.errors import CheckpointError
from mptq.formats.hf.headers import read_headers
from mptq.inspection.quantized import scales
from mptq.inspection.tree import tree


def describe_huggingface(path: Path) -> dict[str, Any]:
    """Returns the document of a model; raises CheckpointError for invalid files."""
    config = _json(path / "config.json")
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    excluded = _words(quantization.get("modules_to_not_convert") or quantization.get("ignore"))
    architectures = ", ".join(_words(config.get("architectures")) or ["?"])
    specs = list(read_headers(path).values())
    facts = {
        "format": "safetensors (Hugging Face)",
        "architecture": f"{architectures}, {_word(config.get('num_hidden_layers', '?'))} layers, "
        f"hidden {_word(config.get('hidden_size', '?'))}",
        "source": "config.json",
        "quantization": _word(quantization.get("quant_method", "none")),
        "excluded": ", ".join(excluded[:4]) + (f" and {len(excluded) - 4} more" if len(excluded) > 4 else ""),
        "files": len(list(path.glob("*.safetensors"))),
    }
    document: dict[str, Any] = {"path": str(path), "kind": "Hugging Face model", "facts": facts, **tree(specs)}
    return document | {"quantization": scales(specs), "quantization_config": quantization or None, "files": _files(path)}


def _words(listed: Any) -> list[str]:
    """Returns the items of a list in another tool's config as text; empty if the value is not a list."""
    return [_word(item) for item in listed] if isinstance(listed, list) else []


def _word(value: Any) -> str:
    """Returns a config value as one line of text, escaping unprintable characters."""
    word = str(value)
    return word if word.isprintable() else ascii(value)


def _files(path: Path) -> dict[str, int]:
    """Returns the size in bytes of every file in the directory."""
    return {file.name: file.stat().st_size for file in sorted(path.iterdir()) if file.is_file()}


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
    return content if isinstance(content, dict) else {}
