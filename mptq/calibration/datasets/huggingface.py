"""Reads Hugging Face datasets: saved ones, directories of data files, and the Hub (the only use of the network)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.calibration.datasets.documents import Document, from_row, one_line, shuffled, usable_columns
from mptq.errors import DataError

if TYPE_CHECKING:
    import numpy as np

    from mptq.calibration.datasets.options import DataOptions

WINDOW = 10_000
"""Size of the shuffle buffer for datasets that can only be read sequentially."""

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)?")
SAVED = "dataset_dict.json", "state.json"


def is_saved(name: str) -> bool:
    """Whether the directory was written by `datasets`' save_to_disk."""
    return any((Path(name) / file).is_file() for file in SAVED)


def is_directory(name: str) -> bool:
    """Whether it is a directory; `datasets` finds the data files in it."""
    return Path(name).is_dir()


def is_hub_name(name: str) -> bool:
    """Whether it is `org/name` or `org/name/config`, and neither an existing path nor the name of a data file."""
    return (
        HUB_NAME.fullmatch(name) is not None
        and name[0] != "."
        and Path(name).suffix not in (".txt", ".md", ".json", ".jsonl", ".parquet", ".bin", ".idx")
        and not Path(name).exists()
    )


def read_saved(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields the rows of a saved dataset, or of its split `train`, in random order; only those used are decoded."""
    import datasets

    del options
    try:
        saved = datasets.load_from_disk(name)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"{name} cannot be read as a saved dataset: {one_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if "train" not in saved:
            raise DataError(f"{name} has no split train: pass the directory of one of its splits ({', '.join(saved)})")
        saved = saved["train"]
    saved = saved.select_columns(usable_columns(saved.column_names, name))
    for index in shuffled(len(saved), bits):
        yield from_row(saved[index], f"{name}, row {index + 1}")


def read_streamed(name: str, options: DataOptions, bits: np.random.PCG64) -> Iterator[Document]:
    """Yields the split `train` of a directory of data files or a Hub dataset, read in order and shuffled in windows.

    The dataset is streamed, so only what is used is fetched; offline, `datasets` streams the same rows from its cache.
    Raises DataError with the message of `datasets` if that fails. No version of `datasets` that mptq supports runs a
    dataset's code.
    """
    import datasets

    del options
    try:
        rows = enumerate(_stream(name), start=1)
        while window := list(islice(rows, WINDOW)):
            for index in shuffled(len(window), bits):
                number, row = window[index]
                yield from_row(row, f"{name}, row {number}")
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        remedy = "" if is_directory(name) else "; without network access, pass a directory that it was downloaded to"
        raise DataError(f"dataset {name} cannot be loaded: {one_line(error)}{remedy}") from error


def _stream(name: str) -> Iterator[Any]:
    import datasets

    parts = [name] if is_directory(name) else ["/".join(name.split("/")[:2]), *name.split("/")[2:]]
    stream = datasets.load_dataset(*parts, split="train", streaming=True)
    if stream.column_names is not None:
        stream = stream.select_columns(usable_columns(stream.column_names, name))
    return iter(stream)
