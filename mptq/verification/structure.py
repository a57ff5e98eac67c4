"""Re-read an output: files and hashes, names and shapes, scales, configs; then, in numbers.py, every number."""

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
    """What was checked, and every failure as a line that names the file or the tensor."""

    files: int = 0
    tensors: int = 0
    compared: int = 0
    failures: list[str] = field(default_factory=list)

    @property
    def document(self) -> dict[str, Any]:
        """As plain data."""
        return {
            "schema": 1,
            "ok": not self.failures,
            "files": self.files,
            "tensors": self.tensors,
            "compared_with_source": self.compared,
            "failures": self.failures,
        }


def verify(path: Path, against: Path | None = None, options: SourceOptions | None = None) -> Verification:
    """Check the output at `path`, and with `against` its numbers against the checkpoint that it was made from.

    `options` are those with which the output was made.

    Raises OutputError when `path` is no output of mptq, CheckpointError when `against` is no checkpoint. Memory: one
    linear in float32, whatever the number of layers.
    """
    path = path.resolve()
    made = manifest.read_manifest(path)
    found = Verification()
    found.failures += check_files(path, made, found)
    if found.failures:
        return found  # what the files hold is not what was written: nothing further would mean anything
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
    """Every file of the manifest is there, of its size and hash."""
    for name, entry in made["files"].items():
        file = path / name
        found.files += 1
        if not file.is_file():
            yield f"{name} is missing"
        elif file.stat().st_size != entry["bytes"]:
            yield f"{name} has {file.stat().st_size} bytes, not {entry['bytes']}"
        elif sha256(file) != entry["sha256"]:
            yield f"{name} has changed: its SHA-256 is not the manifest's"


def expected(output: OpenedOutput, made: dict[str, Any]) -> dict[str, TensorSpec]:
    """The tensors that the manifest says this form holds."""
    items = [item for entry in made["tensors"].values() for item in entry.get(output.format, [])]
    items += made["kv_cache"].get(output.format, [])
    return {item["name"]: TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in items}


def check_names(output: OpenedOutput, made: dict[str, Any]) -> Iterator[str]:
    """Every tensor of the manifest is in the files with its dtype and shape, and no other; every source tensor is there."""
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
    """Every FP8 weight has a scale of the shape that its scheme implies; these and calibrated ones are possible ones."""
    import torch

    from mptq.quantize.fp8 import SCALE_FLOOR

    for inner, entry in made["tensors"].items():
        weights = [item for item in entry.get(output.format, []) if item["dtype"] == "float8_e4m3fn"]
        if not weights:
            continue
        scheme = scheme_named(entry["scheme"][output.format])
        for spec in FORMATS[output.format].scales(inner, weights, scheme, made):
            if output.specs.get(spec.name) != spec:
                yield f"{spec.name} of {inner} is not there as {spec.dtype} {list(spec.shape)}"
            else:
                yield from _check_values(output, spec.name, scheme)
    for item in _calibrated(output.format, made):
        value = output.load(item["name"]) if item["name"] in output.specs else torch.tensor(torch.nan)
        if not (torch.isfinite(value) & (value >= SCALE_FLOOR)).all():
            yield f"{item['name']} is no finite scale of {SCALE_FLOOR:.2g} or more"


def _check_values(output: OpenedOutput, name: str, scheme: Scheme) -> Iterator[str]:
    """The scales called `name` are finite, and none is under the floor."""
    import torch

    from mptq.quantize.fp8 import SCALE_FLOOR, powers_of_two

    stored = output.load(name)
    scale = torch.where(stored == _NOT_A_NUMBER, torch.nan, powers_of_two(stored)) if scheme.exponents else stored
    if not (torch.isfinite(scale) & (scale >= SCALE_FLOOR)).all():
        yield f"{name} has scales that are not finite or less than {SCALE_FLOOR:.2g}"


_NOT_A_NUMBER = 255
"""The E8M0 byte that is no power of two."""


def _calibrated(form: str, made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tensors that calibration found."""
    yield from made["kv_cache"].get(form, [])
    end = FORMATS[form].input_scale
    for entry in made["tensors"].values():
        yield from (item for item in entry.get(form, []) if end and item["name"].endswith(end))
