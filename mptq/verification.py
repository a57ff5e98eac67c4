"""Re-read an output: files and hashes, names and shapes, scales, and every number against the source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq import report
from mptq.arch import naming
from mptq.checkpoint.index import open_checkpoint
from mptq.errors import CheckpointError, MptqError
from mptq.inspection import read_headers
from mptq.plan import Plan, open_source
from mptq.recipe import Recipe
from mptq.types import Fp8Weight, TensorSpec
from mptq.writers import manifest
from mptq.writers.dialects import DIALECTS

if TYPE_CHECKING:
    import torch

    from mptq.arch.naming import Linear

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


def verify(path: Path, against: Path | None = None) -> Verification:
    """Check the output at `path`, and with `against` its numbers against the checkpoint that it was made from.

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
        _against(found, outputs, made, against)
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
        elif manifest.sha256(file) != entry["sha256"]:
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
    """The tensors that the manifest says this form holds, as the files spell them."""
    specs = {}
    for entry in made["tensors"].values():
        for item in entry.get(output.form, []):
            for name, rows in _spelled(output.form, item["name"], item["shape"]):
                specs[name] = TensorSpec(name, item["dtype"], rows)
    return specs


def _spelled(form: str, name: str, shape: list[int]) -> list[tuple[str, tuple[int, ...]]]:
    """A gated fc1 is two tensors in the Megatron form."""
    if form == "megatron" and name.endswith("mlp.linear_fc1.weight"):
        half = (shape[0] // 2, *shape[1:])
        return [(f"{name}_w", half), (f"{name}_v", half)]
    return [(name, tuple(shape))]


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
        if not entry.get(output.form):
            yield f"{inner} of the source is not accounted for in the {output.form} output"


def check_scales(output: Output, made: dict[str, Any]) -> Iterator[str]:
    """Every FP8 weight has a scale of the shape that the recipe implies, positive and finite throughout."""
    import torch

    recipe = Recipe(**made["recipe"])
    for inner, entry in made["tensors"].items():
        items = entry.get(output.form, [])
        for weight in [item for item in items if item["dtype"] == "float8_e4m3fn"]:
            name, shape = _scale_of(output.form, weight["name"], tuple(weight["shape"]), recipe)
            if name not in output.specs or output.specs[name].shape != shape:
                yield f"{name} of {inner} is not there with shape {list(shape)}"
                continue
            scale = output.load(name)
            if not (torch.isfinite(scale) & (scale > 0)).all():
                yield f"{name} has scales that are not positive and finite"


def _scale_of(form: str, weight: str, shape: tuple[int, ...], recipe: Recipe) -> tuple[str, tuple[int, ...]]:
    owner = weight.removesuffix("weight")
    if form == "hf":
        dialect = DIALECTS[recipe.hf]
        return owner + dialect.scale_name, dialect.scale_shape(shape[0], shape[1])
    grid = () if recipe.block is None else tuple(-(-size // recipe.block) for size in shape)
    return f"{owner}weight_quantizer._scale", grid


def check_config(output: Output, made: dict[str, Any]) -> Iterator[str]:
    """The exclude list of config.json is exactly the linears that are not in FP8, and the index covers every tensor."""
    try:
        config = json.loads((output.directory / "config.json").read_text())["quantization_config"]
    except (OSError, ValueError, KeyError, TypeError):
        yield "config.json has no quantization_config"
        return
    listed = set(config.get("modules_to_not_convert") or config.get("ignore") or [])
    plain = {"lm_head"}
    for items in (entry.get("hf", []) for entry in made["tensors"].values()):
        modules = [item["name"].removesuffix(".weight") for item in items if item["dtype"] != "float8_e4m3fn"]
        plain |= {name for name in modules if name.endswith("_proj")}
    if listed != plain:
        yield f"config.json excludes {sorted(listed ^ plain)[:3]} wrongly: engines would misread them"
    index = output.directory / "model.safetensors.index.json"
    if index.is_file() and set(json.loads(index.read_text())["weight_map"]) != set(output.specs):
        yield "model.safetensors.index.json does not list the tensors of the files"


def _against(found: Verification, outputs: list[Output], made: dict[str, Any], path: Path) -> None:
    source = open_source(path)
    if source.checkpoint.fingerprint != made["source"]["metadata_sha256"]:
        raise CheckpointError(f"{source.checkpoint.directory} is not the checkpoint that this output was made from")
    plan = Plan(source, Recipe(**made["recipe"]), tuple(made["formats"]))
    missing = sorted(set(report.tensor_account(plan)) ^ set(made["tensors"]))
    found.failures += [f"{name} of the source is not accounted for" for name in missing]
    unaccounted = _keys_without_account(plan, made)
    found.failures += [f"{key} of the source is neither in the output nor listed as dropped" for key in unaccounted]
    comparison = _Comparison(plan)
    for inner, check in comparison.checks(outputs):
        found.compared += 1
        try:
            found.failures += check()
        except MptqError as error:
            found.failures.append(f"{inner}: {error}")


def _keys_without_account(plan: Plan, made: dict[str, Any]) -> list[str]:
    used = {part["key"] for entry in made["tensors"].values() for part in entry["from"]}
    every = {*plan.source.checkpoint.tensors, *plan.source.checkpoint.blobs}
    return sorted(every - used - set(made["dropped"]))


class _Comparison:
    """Numbers of outputs against the source, one inner tensor at a time."""

    def __init__(self, plan: Plan) -> None:
        from mptq.checkpoint.reader import Reader

        self.plan = plan
        self.reader = Reader(plan.source.checkpoint)

    def checks(self, outputs: list[Output]) -> Iterator[tuple[str, Callable[[], list[str]]]]:
        """An inner name and its check, for every inner tensor and output."""
        plan = self.plan
        layers = range(plan.model.num_layers)
        for output in outputs:
            copies = [(copy, None) for copy in naming.outer_copies(plan.model)]
            inside = [(copy, layer) for layer in layers for copy in naming.layer_copies(plan.model)]
            for copy, layer in [*copies, *inside]:
                inner = copy.megatron if layer is None else naming.megatron_layer(layer) + copy.megatron
                spec = plan.copy_spec(output.form, copy, layer)
                yield inner, lambda o=output, i=inner, s=spec, c=copy: self.copied(o, i, s, c.shape)  # type: ignore[misc]
            for layer in layers:
                for linear in plan.linears:
                    inner = f"{naming.megatron_layer(layer)}{linear.megatron}.weight"
                    yield inner, lambda o=output, i=inner, n=layer, m=linear: self.linear(o, i, n, m)  # type: ignore[misc]

    def source(self, inner: str, shape: tuple[int, ...]) -> torch.Tensor:
        """An inner tensor of the source, in its own dtype."""
        import torch

        out = torch.empty(shape, dtype=getattr(torch, self.plan.source.dtype(inner)))
        return self.reader.read_parts(self.plan.source.places[inner], out)

    def copied(self, output: Output, inner: str, spec: TensorSpec, shape: tuple[int, ...]) -> list[str]:
        """A copy equals its source bit for bit."""
        import torch

        kept = self.source(inner, shape)[: spec.shape[0]]
        same = torch.equal(_bits(output.load(spec.name)), _bits(kept))
        return [] if same else [f"{spec.name} is not the same as {inner} of the source"]

    def linear(self, output: Output, inner: str, layer: int, linear: Linear) -> list[str]:
        """A quantized linear has the scales of its source, and every element within half a step of E4M3."""
        import torch

        source = self.source(inner, linear.shape)
        block = self.plan.recipe.block
        if output.form == "megatron":
            names = [name for name, _ in _spelled("megatron", inner, list(linear.shape))]
            data = torch.cat([output.load(name).view(torch.uint8) for name in names]).view(torch.float8_e4m3fn)
            scale = output.load(f"{inner.removesuffix('weight')}weight_quantizer._scale")
            return quantized_failures(inner, source, Fp8Weight(data, scale), block, source)
        failures = []
        specs = list(self.plan.hf_linear_specs(layer, linear))
        parts = linear.fusion.split(source)
        if not self.plan.in_hf(linear):
            pairs = zip(specs, parts, strict=True)
            wrong = [spec.name for spec, part in pairs if not torch.equal(_bits(output.load(spec.name)), _bits(part))]
            return [f"{name} is not the same as {inner} of the source" for name in wrong]
        for weight, scale_spec, part in zip(specs[::2], specs[1::2], parts, strict=True):
            found = Fp8Weight(output.load(weight.name), output.load(scale_spec.name))
            # One scale a tensor is shared by the group; blocks are the projection's own.
            failures += quantized_failures(weight.name, part, found, block, source if block is None else part)
        return failures


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return tensor.contiguous().view(torch.uint8)


def quantized_failures(name: str, source: torch.Tensor, weight: Fp8Weight, block: int | None, group: torch.Tensor) -> list[str]:
    """What is wrong with one quantized weight; its scale belongs to `group`, which contains `source`."""
    import torch

    from mptq.quantize.fp8 import first_out_of_bound, reference_scale

    scale = reference_scale(group, block)
    if not torch.equal(weight.scale, scale.expand(weight.scale.shape)):
        return [f"{name}: its scales are not amax / 448 of the source"]
    place = first_out_of_bound(source, weight, block)
    return [] if place is None else [f"{name}: element {list(place)} is further from the source than E4M3 rounds"]
