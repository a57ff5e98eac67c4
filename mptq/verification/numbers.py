"""Every number of an output against the checkpoint that it was made from, one tensor of the source at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mptq import report
from mptq.checkpoint.reader import Reader
from mptq.errors import CheckpointError
from mptq.model import tensors
from mptq.output import manifest
from mptq.plan.plan import Plan, Source
from mptq.quantize.fp8 import first_out_of_bound, reference_scale
from mptq.recipes.recipe import Scheme, recipe_from
from mptq.types import Fp8Weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mptq.model.tensors import LinearSpec, UnquantizedTensor
    from mptq.verification.structure import Output


def compare(outputs: list[Output], made: dict[str, Any], source: Source) -> tuple[int, list[str]]:
    """Compare `outputs`, whose manifest is `made`, with the checkpoint `source`: tensors compared, and failures.

    Raises CheckpointError when that is another checkpoint than the manifest's. Memory: one linear of the source (those that
    share one scale together) and of the output, and its scales.
    """
    if source.checkpoint.fingerprint != made["source"]["metadata_sha256"]:
        raise CheckpointError(f"{source.checkpoint.directory} is not the checkpoint that this output was made from")
    plan = Plan(source, recipe_from(made["recipe"], manifest.NAME), tuple(made["formats"]))
    failures = list(_check_account(plan, made))
    if failures:
        return 0, failures
    comparison = _Comparison(plan)
    compared = 0
    for output in outputs:
        for copy, layer in _copies(plan):
            failures += comparison.copied(output, copy, layer)
            compared += 1
        for layer in range(plan.model.num_layers):
            for linear in plan.linears(layer):
                failures += comparison.linear(output, linear, layer)
                compared += 1
    return compared, failures


def _check_account(plan: Plan, made: dict[str, Any]) -> Iterator[str]:
    """The manifest says of every tensor of the source what the recipe implies, and leaves none out."""
    account = report.tensor_account(plan)
    for name in sorted(account.keys() | made["tensors"].keys()):
        if account.get(name) != made["tensors"].get(name):
            yield f"{name} of the source is not in the output as the recipe implies"
    used = {part["key"] for entry in account.values() for part in entry["from"]}
    for key in sorted({*plan.source.checkpoint.tensors, *plan.source.checkpoint.blobs} - used - set(made["dropped"])):
        yield f"{key} of the source is neither in the output nor listed as dropped"


def _copies(plan: Plan) -> Iterator[tuple[UnquantizedTensor, int | None]]:
    before, after = tensors.outer_copies(plan.model)
    for copy in (*before, *after, *plan.carried):
        yield copy, None
    for layer in plan.layers:
        for copy in plan.copies(layer):
            yield copy, layer


class _Comparison:
    """One tensor of the source against what an output has of it; every method returns failures as lines."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.reader = Reader(plan.source.checkpoint)

    def source(self, inner: str, shape: tuple[int, ...]) -> torch.Tensor:
        """An inner tensor of the source, in its own dtype."""
        out = torch.empty(shape, dtype=getattr(torch, self.plan.source.dtype(inner)))
        return self.reader.read_parts(self.plan.source.places[inner], out)

    def copied(self, output: Output, copy: UnquantizedTensor, layer: int | None) -> list[str]:
        """A copy equals its source bit for bit."""
        inner = copy.megatron if layer is None else tensors.megatron_layer(layer) + copy.megatron
        specs = self.plan.copy_specs(output.form, copy, layer)
        if not specs:
            return []
        source = self.source(inner, copy.shape)
        parts = copy.for_hf(source) if output.form == "hf" else source.split([spec.shape[0] for spec in specs])
        pairs = zip(specs, parts, strict=True)
        return [line for spec, part in pairs for line in _same(spec.name, output.load(spec.name), part, inner)]

    def linear(self, output: Output, linear: LinearSpec, layer: int) -> list[str]:
        """A linear has the scales of its source and every element within half a step of E4M3, or is a copy."""
        inner = f"{tensors.megatron_layer(layer)}{linear.megatron}.weight"
        source = self.source(inner, linear.shape)
        if output.form == "megatron":
            return self._fused(output, linear, layer, source)
        scheme = self.plan.scheme("hf", layer, linear)
        specs = list(self.plan.hf_linear_specs(layer, linear))
        parts = linear.fusion.split(source)
        if scheme is None:
            pairs = zip(specs, parts, strict=True)
            return [line for spec, part in pairs for line in _same(spec.name, output.load(spec.name), part, inner)]
        failures = []
        each = len(specs) // len(parts)
        for weight, scale, part in zip(specs[::each], specs[1::each], parts, strict=True):
            found = Fp8Weight(output.load(weight.name), output.load(scale.name))
            # One scale a tensor is shared by the group; blocks and rows are the projection's own.
            group = self._group(linear, layer, source) if scheme.scale == "tensor" else part
            failures += quantized_failures(weight.name, part, found, scheme, group)
        return failures

    def _group(self, linear: LinearSpec, layer: int, source: torch.Tensor) -> torch.Tensor:
        """The rows of all linears that have one scale with `linear`, whose own are `source`."""
        prefix, others = tensors.megatron_layer(layer), [one for one in self.plan.sharing(layer, linear) if one != linear]
        return torch.cat([source, *(self.source(f"{prefix}{one.megatron}.weight", one.shape) for one in others)])

    def _fused(self, output: Output, linear: LinearSpec, layer: int, source: torch.Tensor) -> list[str]:
        inner = f"{tensors.megatron_layer(layer)}{linear.megatron}.weight"
        owner = inner.removesuffix("weight")
        scheme = self.plan.scheme("megatron", layer, linear)
        data = torch.cat([output.load(owner + key).view(torch.uint8) for key in linear.keys])
        if scheme is None:
            return _same(inner, data.view(source.dtype), source, inner)
        weight = Fp8Weight(data.view(torch.float8_e4m3fn), output.load(f"{owner}weight_quantizer._scale"))
        group = self._group(linear, layer, source) if scheme.scale == "tensor" else source
        return quantized_failures(inner, source, weight, scheme, group)


def _same(name: str, found: torch.Tensor, source: torch.Tensor, inner: str) -> list[str]:
    same = torch.equal(found.contiguous().view(torch.uint8), source.contiguous().view(torch.uint8))
    return [] if same else [f"{name} is not the same as {inner} of the source"]


def quantized_failures(name: str, source: torch.Tensor, weight: Fp8Weight, scheme: Scheme, group: torch.Tensor) -> list[str]:
    """What is wrong with one quantized weight; its scale belongs to `group`, which contains `source`."""
    scale = reference_scale(group, scheme)
    if not torch.equal(weight.scale, scale.expand(weight.scale.shape)):
        return [f"{name}: its scales are not {'powers of two for' if scheme.scale == 'mx' else 'amax / 448 of'} the source"]
    place = first_out_of_bound(source, weight, scheme)
    return [] if place is None else [f"{name}: element {list(place)} is further from the source than E4M3 rounds"]
