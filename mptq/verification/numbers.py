"""Every number of an output against the checkpoint that it was made from, one tensor of the source at a time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mptq import report
from mptq.checkpoint.reader import Reader
from mptq.errors import CheckpointError
from mptq.formats import FORMATS
from mptq.formats.layout import canonical_weight
from mptq.model.tensors import megatron_layer, outer_copies
from mptq.plan.plan import Plan
from mptq.quantize.fp8 import first_out_of_bound, reference_scale
from mptq.recipes.recipe import recipe_from
from mptq.recipes.schemes import Scheme
from mptq.report import manifest
from mptq.types import Fp8Weight

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mptq.formats.protocol import OpenedOutput
    from mptq.model.source import Source
    from mptq.model.tensors import LinearSpec, UnquantizedTensor


def compare(outputs: list[OpenedOutput], made: dict[str, Any], source: Source) -> tuple[int, list[str]]:
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
        for tensor, layer in _unquantized(plan):
            failures += comparison.unquantized(output, tensor, layer)
            compared += 1
        for layer in range(plan.model.num_layers):
            for linear in plan.linears(layer):
                failures += comparison.linear(output, linear, layer)
                compared += 1
    return compared, failures


def _check_account(plan: Plan, made: dict[str, Any]) -> Iterator[str]:
    """The manifest says of every tensor of the source what the recipe implies, and leaves none out."""
    account = report.tensor_manifest(plan)
    for name in sorted(account.keys() | made["tensors"].keys()):
        if account.get(name) != made["tensors"].get(name):
            yield f"{name} of the source is not in the output as the recipe implies"
    used = {part["key"] for entry in account.values() for part in entry["from"]}
    for key in sorted({*plan.source.checkpoint.tensors, *plan.source.checkpoint.blobs} - used - set(made["dropped"])):
        yield f"{key} of the source is neither in the output nor listed as dropped"


def _unquantized(plan: Plan) -> Iterator[tuple[UnquantizedTensor, int | None]]:
    before, after = outer_copies(plan.model)
    for tensor in (*before, *after, *plan.passthrough):
        yield tensor, None
    for layer in plan.layers:
        for tensor in plan.unquantized(layer):
            yield tensor, layer


class _Comparison:
    """One tensor of the source against what an output has of it; every method returns failures as lines."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.reader = Reader(plan.source.checkpoint)

    def source(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A tensor of the source by its canonical name, in its own dtype."""
        out = torch.empty(shape, dtype=getattr(torch, self.plan.source.dtype(name)))
        return self.reader.read_parts(self.plan.source.places[name], out)

    def unquantized(self, output: OpenedOutput, tensor: UnquantizedTensor, layer: int | None) -> list[str]:
        """One that keeps its precision equals its source bit for bit."""
        name = tensor.megatron if layer is None else megatron_layer(layer) + tensor.megatron
        specs = self.plan.layouts[output.format].unquantized(tensor, layer)
        if not specs:
            return []
        wanted = FORMATS[output.format].store_unquantized(tensor, specs, self.source(name, tensor.shape), 0).tensors
        return [line for key, part in wanted.items() for line in _same(key, output.load(key), part, name)]

    def linear(self, output: OpenedOutput, linear: LinearSpec, layer: int) -> list[str]:
        """A linear has the scales of its source and every element within half a step of E4M3, or is a copy."""
        name, layout = canonical_weight(layer, linear), self.plan.layouts[output.format]
        source, scheme = self.source(name, linear.shape), layout.scheme(layer, linear)
        parts = linear.fusion.split(source) if layout.splits else [source]
        stored = FORMATS[output.format].load_linear(layout, output, layer, linear)
        failures = []
        for found, part in zip(stored, parts, strict=True):
            if scheme is None or found.scale is None:
                failures += _same(found.name, found.data, part, name)
                continue
            # One scale a tensor is shared by the group; blocks and rows are the projection's own.
            group = self._group(linear, layer, source) if scheme.shared else part
            failures += quantized_failures(found.name, part, Fp8Weight(found.data, found.scale), scheme, group)
        return failures

    def _group(self, linear: LinearSpec, layer: int, source: torch.Tensor) -> torch.Tensor:
        """The rows of all linears that have one scale with `linear`, whose own are `source`."""
        others = [one for one in self.plan.assignment.sharing(layer, linear) if one != linear]
        return torch.cat([source, *(self.source(canonical_weight(layer, one), one.shape) for one in others)])


def _same(name: str, found: torch.Tensor, source: torch.Tensor, inner: str) -> list[str]:
    same = torch.equal(found.contiguous().view(torch.uint8), source.contiguous().view(torch.uint8))
    return [] if same else [f"{name} is not the same as {inner} of the source"]


def quantized_failures(name: str, source: torch.Tensor, weight: Fp8Weight, scheme: Scheme, group: torch.Tensor) -> list[str]:
    """What is wrong with one quantized weight; its scale belongs to `group`, which contains `source`."""
    scale = reference_scale(group, scheme)
    if not torch.equal(weight.scale, scale.expand(weight.scale.shape)):
        return [f"{name}: its scales are not {'powers of two for' if scheme.exponents else 'amax / 448 of'} the source"]
    place = first_out_of_bound(source, weight, scheme)
    return [] if place is None else [f"{name}: element {list(place)} is further from the source than E4M3 rounds"]
