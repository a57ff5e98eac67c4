"""Re-read an output: files and hashes, names and shapes, scales, configs; then, in comparison.py, every number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.checkpoint.index import open_checkpoint
from mptq.formats.hf.quantization_config import DIALECTS
from mptq.hashing import sha256
from mptq.inspection import read_headers
from mptq.model.checkpoint_keys import MTP
from mptq.output import manifest
from mptq.recipes.recipe import Scheme, scheme_named
from mptq.types import TensorSpec

if TYPE_CHECKING:
    import torch

    from mptq.plan.plan import SourceOptions

Load = Callable[[str], "torch.Tensor"]


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


@dataclass(frozen=True)
class Output:
    """One form of an output: what its files hold, and how to load a tensor of it."""

    form: str
    directory: Path
    specs: dict[str, TensorSpec]
    load: Load


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
    outputs = [_open(path, form, len(made["formats"]) > 1) for form in made["formats"]]
    for output in outputs:
        found.tensors += len(output.specs)
        found.failures += check_names(output, made)
        found.failures += check_scales(output, made)
        if output.form == "hf":
            found.failures += check_config(output, made)
    if against is not None and not found.failures:
        from mptq.plan.plan import open_source
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


def _open(path: Path, form: str, nested: bool) -> Output:
    directory = path / form if nested else path
    if form == "hf":
        return Output(form, directory, read_headers(directory), _hf_loader(directory))
    from mptq.checkpoint.reader import Reader

    checkpoint = open_checkpoint(directory)
    reader = Reader(checkpoint)

    def load(name: str) -> torch.Tensor:
        import torch

        spec = checkpoint.tensors[name].spec
        return reader.read(name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))

    return Output(form, directory, checkpoint.specs, load)


def _hf_loader(directory: Path) -> Load:
    from safetensors import safe_open

    place: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            place |= dict.fromkeys(tensors.keys(), file)

    def load(name: str) -> torch.Tensor:
        with safe_open(place[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    return load


def expected(output: Output, made: dict[str, Any]) -> dict[str, TensorSpec]:
    """The tensors that the manifest says this form holds."""
    items = [item for entry in made["tensors"].values() for item in entry.get(output.form, [])]
    items += made["kv_cache"].get(output.form, [])
    return {item["name"]: TensorSpec(item["name"], item["dtype"], tuple(item["shape"])) for item in items}


def check_names(output: Output, made: dict[str, Any]) -> Iterator[str]:
    """Every tensor of the manifest is in the files with its dtype and shape, and no other; every source tensor is there."""
    wanted = expected(output, made)
    for name in sorted(wanted.keys() | output.specs.keys()):
        want, have = wanted.get(name), output.specs.get(name)
        if have is None:
            yield f"{name} is missing from the {output.form} output"
        elif want is None:
            yield f"{name} is in the {output.form} output but not in the manifest"
        elif want != have:
            yield f"{name} is {have.dtype} {list(have.shape)}, not {want.dtype} {list(want.shape)}"
    for inner, entry in made["tensors"].items():
        if not entry.get(output.form) and not (output.form == "hf" and inner.startswith(MTP)):
            yield f"{inner} of the source is not accounted for in the {output.form} output"


def check_scales(output: Output, made: dict[str, Any]) -> Iterator[str]:
    """Every FP8 weight has a scale of the shape that its scheme implies; these and calibrated ones are possible ones."""
    import torch

    from mptq.quantize.fp8 import SCALE_FLOOR

    for inner, entry in made["tensors"].items():
        weights = [item for item in entry.get(output.form, []) if item["dtype"] == "float8_e4m3fn"]
        if not weights:
            continue
        scheme = scheme_named(entry["scheme"][output.form])
        for spec in _scales_of(output.form, inner, weights, scheme, made["dialect"]):
            if output.specs.get(spec.name) != spec:
                yield f"{spec.name} of {inner} is not there as {spec.dtype} {list(spec.shape)}"
            else:
                yield from _check_values(output, spec.name, scheme)
    for item in _calibrated(output.form, made):
        value = output.load(item["name"]) if item["name"] in output.specs else torch.tensor(torch.nan)
        if not (torch.isfinite(value) & (value >= SCALE_FLOOR)).all():
            yield f"{item['name']} is no finite scale of {SCALE_FLOOR:.2g} or more"


def _check_values(output: Output, name: str, scheme: Scheme) -> Iterator[str]:
    """The scales called `name` are finite, none is under the floor, and ModelOpt's magnitudes beside them are theirs."""
    import torch

    from mptq.quantize.fp8 import E4M3_MAX, SCALE_FLOOR, powers_of_two

    stored = output.load(name)
    scale = torch.where(stored == _NOT_A_NUMBER, torch.nan, powers_of_two(stored)) if scheme.scale == "mx" else stored
    if not (torch.isfinite(scale) & (scale >= SCALE_FLOOR)).all():
        yield f"{name} has scales that are not finite or less than {SCALE_FLOOR:.2g}"
    amax = name.removesuffix("_scale") + "_amax"
    given = output.form == "megatron" and amax in output.specs  # MX has none
    if given and not torch.equal((output.load(amax) / E4M3_MAX).flatten(), stored.flatten()):
        yield f"{amax} is not 448 times {name}: ModelOpt would restore other numbers by one than by the other"


_NOT_A_NUMBER = 255
"""The E8M0 byte that is no power of two."""


def _calibrated(form: str, made: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The tensors that calibration found."""
    yield from made["kv_cache"].get(form, [])
    for entry in made["tensors"].values():
        yield from (item for item in entry.get(form, []) if item["name"].endswith((".input_scale", "input_quantizer._amax")))


def _scales_of(form: str, inner: str, weights: list[dict[str, Any]], scheme: Scheme, dialect: str) -> Iterator[TensorSpec]:
    """The scales of one linear's quantized weights: one tensor each, or one for all in the Megatron form."""
    if form == "hf":
        for weight in weights:
            yield DIALECTS[dialect].scale(weight["name"].removesuffix(".weight"), scheme, *weight["shape"])
    else:
        grid = scheme.grid(sum(weight["shape"][0] for weight in weights), weights[0]["shape"][1])
        yield TensorSpec(f"{inner.removesuffix('weight')}weight_quantizer._scale", scheme.scale_dtype, grid)


def check_config(output: Output, made: dict[str, Any]) -> Iterator[str]:
    """The exclude list of config.json is exactly the matrices of layers that are not in FP8, and the index covers all."""
    index = output.directory / "model.safetensors.index.json"
    if index.is_file() and _indexed(index) != set(output.specs):
        yield f"{index.name} does not list the tensors of the files"
    if made["dialect"] == "plain":
        return
    listed = _excluded(output.directory / "config.json")
    if listed is None:
        yield "config.json has no quantization_config that engines read"
        return
    plain = {"lm_head"}
    for items in (entry.get("hf", []) for inner, entry in made["tensors"].items() if inner.startswith("decoder.layers.")):
        weights = [item for item in items if item["name"].endswith(".weight") and len(item["shape"]) == 2]
        plain |= {item["name"].removesuffix(".weight") for item in weights if item["dtype"] != "float8_e4m3fn"}
    if listed != plain:
        yield f"config.json excludes {sorted(listed ^ plain)[:3]} wrongly: engines would misread them"


def _excluded(path: Path) -> set[str] | None:
    """The modules that a config.json excludes from quantization, or None where it does not say."""
    try:
        config = json.loads(path.read_text())["quantization_config"]
        listed = set(config.get("modules_to_not_convert") or config.get("ignore") or [])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return listed if all(isinstance(name, str) for name in listed) else None


def _indexed(path: Path) -> set[str] | None:
    """The tensors that an index lists, or None where it is none."""
    try:
        return set(json.loads(path.read_text())["weight_map"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
