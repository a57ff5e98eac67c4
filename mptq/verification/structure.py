"""Verifies the files, hashes, names, shapes, scales and configs of an output; numbers.py compares every value."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.files import sha256
from mptq.formats import FORMATS
from mptq.formats.protocol import OpenedOutput
from mptq.recipes.schemes import Scheme, scheme_named
from mptq.report import manifest
from mptq.types import TensorSpec

if TYPE_CHECKING:
    from mptq.model.source import SourceOptions


@dataclass
class Verification:
    """Counts of what was checked, and the failures; each is one line that names the file or tensor."""

    files: int = 0
    tensors: int = 0
    compared: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def document(self) -> dict[str, Any]:
        """The result as plain data, for `--json`."""
        return {
            "schema": 1,
            "ok": not self.failures,
            "files": self.files,
            "tensors": self.tensors,
            "compared_with_source": self.compared,
            "failures": self.failures,
        }


def verify(path: Path, against: Path | None = None, options: SourceOptions | None = None) -> Verification:
    """Checks the output at `path` and, with `against`, compares its values with the source checkpoint.

    `options` must be those with which the output was made.

    Raises OutputError if `path` is not an mptq output, and CheckpointError if `against` is not a checkpoint. Memory: one
    linear in float32, regardless of the number of layers.
    """
    path = path.resolve()
    made = manifest.read_manifest(path)
    found = Verification()
    found.failures += check_files(path, made, found)
    if found.failures:
        return found  # the files are not what was written, so further checks would be meaningless
    nested = len(made["formats"]) > 1
    outputs = [FORMATS[form].open(path / form if nested else path) for form in made["formats"]]
    for output in outputs:
        found.tensors += len(output.specs)
        found.failures += check_names(output, made)
        found.failures += check_scales(output, made)
        found.failures += FORMATS[output.format].verify(output, made)
    if against is not None and not found.failures:
        from mptq.model.source import open_source
        from mptq.verification.numbers import compare

        found.compared, failures = compare(outputs, made, open_source(against, options))
        found.failures += failures
    return found


def check_files(path: Path, made: dict[str, Any], found: Verification) -> Iterator[str]:
    """Checks that every file in the manifest exists, with its size and hash."""
    for name, entry in made["files"].items():
        file = path / name
        found.files += 1
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        elif sha256(file) != entry["sha256"]:
            yield f"{name} has changed: its SHA-256 does not match the manifest"


def expected(output: OpenedOutput, made: dict[str, Any]) -> dict[str, TensorSpec]:
    """Returns the tensors that the manifest lists for this format."""
    items = [item for entry in made["tensors"].values() for item in entry.get(output.format, [])]
    items += made["kv_cache"].get(output.format, [])
    return {item["name"]: TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in items}


def check_names(output: OpenedOutput, made: dict[str, Any]) -> Iterator[str]:
    """Checks that files and manifest list the same tensors, dtypes and shapes, and that no source tensor is missing."""
    wanted = expected(output, made)
    for name in sorted(wanted.keys() | output.specs.keys()):
        want, have = wanted.get(name), output.specs.get(name)
        if have is None:
            yield f"{name} is missing from the {output.format} output"
        elif want is None:
            yield f"{name} is in the {output.format} output but not in the manifest"
        elif want != have:
            yield f"{name} is {have.dtype} {list(have.shape)}, not {want.dtype} {list(want.shape)}"
    for inner, entry in made["tensors"].items():
        if not entry.get(output.format) and not FORMATS[output.format].lacks(inner):
            yield f"{inner} of the source is not accounted for in the {output.format} output"


def check_scales(output: OpenedOutput, made: dict[str, Any]) -> Iterator[str]:
    """Checks that every FP8 weight has scales of the right shape, and that all scales have valid values."""
    import torch

    from mptq.quantize.fp8 import SCALE_FLOOR

    for inner, entry in made["tensors"].items():
        weights = [item for item in entry.get(output.format, []) if item["dtype"] == "float8_e4m3fn"]
        if not weights:
            continue
        scheme = scheme_named(entry["scheme"][output.format])
        for spec in FORMATS[output.format].scales(inner, weights, scheme, made):
            if output.specs.get(spec.name) != spec:
                yield f"{spec.name} of {inner} is missing, or not {spec.dtype} {list(spec.shape)}"
            else:
                yield from _check_values(output, spec.name, scheme)
    for item in _calibrated(output.format, made):
        value = output.load(item["name"]) if item["name"] in output.specs else torch.tensor(torch.nan)
        if not (torch.isfinite(value) & (value >= SCALE_FLOOR)).all():
            yield f"{item['name']} is not a finite scale of at least {SCALE_FLOOR:.2g}"


def _check_values(output: OpenedOutput, name: str, scheme: Scheme) -> Iterator[str]:
    """Checks that the scales in tensor `name` are finite and not below the floor."""
    import torch

    from mptq.quantize.fp8 import SCALE_FLOOR, powers_of_two

    stored = output.load(name)
    scale = torch.where(stored == _NOT_A_NUMBER, torch.nan, powers_of_two(stored)) if scheme.exponents else stored
    if not (torch.isfinite(scale) & (scale >= SCALE_FLOOR)).all():
        yield f"{name} has scales that are not finite or are below {SCALE_FLOOR:.2g}"


_NOT_A_NUMBER = 255
"""The E8M0 byte that encodes NaN."""


def _calibrated(form: str, made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yields the manifest items of calibrated scales: of the KV cache and of inputs."""
    yield from made["kv_cache"].get(form, [])
    end = FORMATS[form].input_scale
    for entry in made["tensors"].values():
        yield from (item for item in entry.get(form, []) if end and item["name"].endswith(end))
