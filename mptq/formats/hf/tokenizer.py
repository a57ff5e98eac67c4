"""Copies the files of a Hugging Face tokenizer to an output. Does not import torch."""

from __future__ import annotations

import shutil
from pathlib import Path

from mptq.files import sha256

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
)
"""Files that transformers tokenizers save; they are copied unchanged."""


def tokenizer_files(directory: Path) -> list[Path]:
    """Returns the tokenizer files in a directory."""
    return [directory / name for name in TOKENIZER_FILES if (directory / name).is_file()]


def tokenizer_hashes(directory: Path) -> dict[str, str]:
    """Returns the SHA-256, by name, of the files that an output takes from a tokenizer's directory."""
    files = [*tokenizer_files(directory), directory / "generation_config.json"]
    return {file.name: sha256(file) for file in files if file.is_file()}


def copy_tokenizer(source: Path, target: Path) -> list[Path]:
    """Copies the tokenizer files and returns the paths of the copies."""
    return [Path(shutil.copyfile(file, target / file.name)) for file in tokenizer_files(source)]
