"""The kinds of dataset, and how a name maps to one of them. A new kind is a reader and an entry of KINDS."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mptq.calibration.datasets import default, files, huggingface, megatron_indexed
from mptq.errors import DataError
from mptq.extras import missing
from mptq.files import remote_url

if TYPE_CHECKING:
    import numpy as np

    from mptq.calibration.datasets.documents import Document
    from mptq.calibration.datasets.options import DataOptions


@dataclass(frozen=True)
class DatasetKind:
    """How to recognize a dataset of this kind by its name, and to read its documents, shuffled with the random bits.

    `needs` are packages that mptq's own installation does not include.
    """

    name: str
    recognize: Callable[[str], object]
    read: Callable[[str, DataOptions, np.random.PCG64], Iterator[Document]]
    tokenized: bool = False
    needs: tuple[str, ...] = ()


def _file_of(*suffixes: str) -> Callable[[str], bool]:
    return lambda name: Path(name).suffix.lower() in suffixes and Path(name).is_file()


KINDS = (
    DatasetKind("megatron", megatron_indexed.is_indexed, megatron_indexed.read_indexed, tokenized=True),
    DatasetKind("json-lines", _file_of(".jsonl", ".json"), files.read_json_lines),
    DatasetKind("parquet", _file_of(".parquet"), files.read_parquet, needs=("pyarrow",)),
    DatasetKind("text", files.text_files, files.read_text),
    DatasetKind("saved", huggingface.is_saved, huggingface.read_saved, needs=("datasets",)),
    DatasetKind("directory", huggingface.is_directory, huggingface.read_streamed, needs=("datasets",)),
    DatasetKind("hub", huggingface.is_hub_name, huggingface.read_streamed, needs=("datasets",)),
)
"""The first kind that recognizes a name reads the dataset."""

_DEFAULT = DatasetKind("default", lambda _: False, default.read)


@dataclass(frozen=True)
class Dataset:
    """A dataset of the run; `path` is a path or a name on the Hub."""

    path: str
    kind: DatasetKind
    weight: float

    @property
    def name(self) -> str:
        """Name in reports: the last part of a path, so that reports are the same on every machine."""
        return self.path if self.kind.name in ("hub", "default") else Path(self.path).resolve().name

    @property
    def place(self) -> Path:
        """The resolved path, or name, by which overlapping datasets are detected."""
        return (
            Path(self.path) if self.kind.name in ("hub", "default") else Path(megatron_indexed.prefix_of(self.path)).resolve()
        )


def unseen_source() -> Dataset:
    """Returns the kind of the default data that never calibrates."""
    return Dataset(default.UNSEEN, _DEFAULT, 1.0)


def find_sources(datasets: tuple[str, ...]) -> list[Dataset]:
    """Returns the given datasets, or the default ones; raises DataError with all problems of the names in one line."""
    if not datasets:
        return [Dataset(name, _DEFAULT, weight) for name, weight in default.WEIGHTS.items()]
    found: list[Dataset] = []
    problems: list[str] = []
    for given in datasets:
        try:
            source = _find(given)
        except DataError as error:
            problems.append(str(error))
            continue
        twins = [other for other in found if _overlap(source.place, other.place)]
        problems += [f"{given!r} and {other.path!r} overlap: pass only one of them, with a weight" for other in twins]
        found.append(source)
    if problems:
        raise DataError("; ".join(problems))
    return found


def _overlap(one: Path, other: Path) -> bool:
    return one == other or one in other.parents or other in one.parents


def _find(given: str) -> Dataset:
    path, weight = _split_weight(given)
    if not (weight > 0 and math.isfinite(weight)):
        raise DataError(f"dataset {given!r}: the weight must be a positive number")
    for kind in KINDS:
        if path and kind.recognize(path):
            if problem := missing(*kind.needs):
                raise DataError(f"dataset {path!r} cannot be read: {problem}")
            return Dataset(path, kind, weight)
    raise DataError(_unknown(path))


def _split_weight(given: str) -> tuple[str, float]:
    """Splits "NAME:WEIGHT"; an existing path, or a name that does not end in a number, has weight 1."""
    path, colon, weight = given.rpartition(":")
    if not colon or Path(given).exists() or megatron_indexed.is_indexed(given):
        return given, 1.0
    try:
        return path, float(weight)
    except ValueError:
        return given, 1.0


def _unknown(path: str) -> str:
    """Returns the error message for a name that no kind recognizes."""
    if remote_url(path):
        return f"dataset {path!r}: remote paths are not read: mount or copy it"
    if path.endswith((".bin", ".idx")) and Path(path).exists():
        return f"dataset {path!r}: a Megatron indexed dataset needs both {megatron_indexed.prefix_of(path)}.bin and .idx"
    if Path(path).is_file():
        return f"dataset {path!r} is not a UTF-8 text, JSON Lines (.jsonl), Parquet or Megatron indexed dataset"
    return f"dataset {path!r} does not exist: pass a file, a directory, the prefix of .bin and .idx, or org/name on the Hub"
