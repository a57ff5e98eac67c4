"""Compares every value of an output with the source checkpoint, one source tensor at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from mptq import report
from mptq.checkpoint.reader import Reader
from mptq.errors import CheckpointError
from mptq.formats import FORMATS
from mptq.formats.layout import canonical_weight
from mptq.model.tensors import megatron_layer, outer_copies
from mptq.plan.plan import Plan
from mptq.quantize.fp8 import E4M3_MAX, first_out_of_bound, reference_scale, strips
from mptq.recipes.algorithms import ALGORITHMS, SEARCHED
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
    """Compares `outputs` with `source` and returns the number of compared tensors and the failures, one line each.

    `made` is the manifest of the outputs. Raises CheckpointError if `source` is not the checkpoint that the manifest names.
    Memory: one linear of the source (with those that share its scale) and of the output, and its scales.
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
    """Checks that the manifest lists every source tensor, and stores it as the recipe specifies."""
    account = report.tensor_manifest(plan)
    for name in sorted(account.keys() | made["tensors"].keys()):
        if account.get(name) != made["tensors"].get(name):
            yield f"{name} of the source is not stored in the output as the recipe specifies"
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
    """Compares source tensors with their tensors in an output; methods return failures, one line each."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.choice = Choice(plan.recipe.algorithm, plan.recipe.rounding)
        self.reader = Reader(plan.source.checkpoint)

    def source(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Reads a source tensor by its canonical name, in its stored dtype."""
        out = torch.empty(shape, dtype=getattr(torch, self.plan.source.dtype(name)))
        return self.reader.read_parts(self.plan.source.places[name], out)

    def unquantized(self, output: OpenedOutput, tensor: UnquantizedTensor, layer: int | None) -> list[str]:
        """Checks that an unquantized tensor equals its source bit for bit."""
        name = tensor.megatron if layer is None else megatron_layer(layer) + tensor.megatron
        specs = self.plan.layouts[output.format].unquantized(tensor, layer)
        if not specs:
            return []
        wanted = FORMATS[output.format].store_unquantized(tensor, specs, self.source(name, tensor.shape), 0).tensors
        return [line for key, part in wanted.items() for line in _same(key, output.load(key), part, name)]

    def linear(self, output: OpenedOutput, linear: LinearSpec, layer: int) -> list[str]:
        """Checks that a linear is a copy, or has the scales of its source and elements within E4M3 rounding error."""
        name, layout = canonical_weight(layer, linear), self.plan.layouts[output.format]
        source, scheme = self.source(name, linear.shape), layout.scheme(layer, linear)
        parts = linear.fusion.split(source) if layout.splits else [source]
        stored = FORMATS[output.format].load_linear(layout, output, layer, linear)
        failures = []
        for found, part in zip(stored, parts, strict=True):
            if scheme is None or found.scale is None:
                failures += _same(found.name, found.data, part, name)
                continue
            # A per-tensor scale is shared by the group; scales of blocks and rows belong to the projection.
            group = self._group(linear, layer, source) if scheme.shared else part
            weight = Fp8Weight(found.data, found.scale)
            failures += quantized_failures(found.name, part, weight, scheme, group, self.choice)
        return failures

    def _group(self, linear: LinearSpec, layer: int, source: torch.Tensor) -> torch.Tensor:
        """Returns the rows of all linears that share a scale with `linear`; `source` are its own rows."""
        others = [one for one in self.plan.assignment.sharing(layer, linear) if one != linear]
        return torch.cat([source, *(self.source(canonical_weight(layer, one), one.shape) for one in others)])


def _same(name: str, found: torch.Tensor, source: torch.Tensor, inner: str) -> list[str]:
    same = torch.equal(found.contiguous().view(torch.uint8), source.contiguous().view(torch.uint8))
    return [] if same else [f"{name} differs from {inner} of the source"]


@dataclass(frozen=True, slots=True)
class Choice:
    """The scales and codes that a recipe may choose: by ModelOpt's `algorithm`, and by its `rounding`."""

    algorithm: str = "max"
    rounding: str = "nearest"

    @property
    def multiples(self) -> torch.Tensor:
        """The multiples of the largest magnitude that a cell may be scaled for, float32."""
        if self.rounding != "nearest":
            return torch.tensor(SEARCHED)  # with 1, where rounding to nearest is kept
        return torch.linspace(*ALGORITHMS[self.algorithm])


def quantized_failures(
    name: str, source: torch.Tensor, weight: Fp8Weight, scheme: Scheme, group: torch.Tensor, choice: Choice = Choice()
) -> list[str]:
    """Returns failures of one quantized weight; its scale is computed from `group`, which contains `source`.

    Each scale must be one of those among which the recipe chooses; which of them is best is not computed again. Codes
    must be the nearest, but for GPTQ's, whose error as a whole is bounded instead (`_BOUNDS`).
    """
    multiples = torch.ones(1) if scheme.exponents else choice.multiples
    allowed = torch.zeros(weight.scale.shape, dtype=torch.bool)
    for multiple in multiples:
        allowed |= weight.scale == reference_scale(group, scheme, multiple)
    if not allowed.all():
        wanted = "the powers of two for" if scheme.exponents or scheme.powers else "amax / 448 of"
        searched = f", times one of the {len(multiples)} factors that the recipe tries" if len(multiples) > 1 else ""
        return [f"{name}: scales differ from {wanted} the source{searched}"]
    if choice.rounding in _BOUNDS:
        excess = _excess(source, weight, scheme)
        if math.isnan(excess):
            return [f"{name}: some of its codes are NaN"]
        return (
            [] if excess <= _BOUNDS[choice.rounding] else [f"{name}: the error is {excess:.1f} times that of the nearest codes"]
        )
    place = first_out_of_bound(source, weight, scheme)
    return [] if place is None else [f"{name}: element {list(place)} differs from the source by more than E4M3 rounding error"]


_BOUNDS = {"gptq": 1.5, "qep": 3.0}
"""How many times the error of the nearest codes, as a norm, that of others may be; docs/rounding.md has what was measured."""


def _excess(source: torch.Tensor, weight: Fp8Weight, scheme: Scheme) -> float:
    """Returns the norm of the error divided by that of the nearest codes with the same scales."""
    found = nearest = 0.0
    for rows, values, scale in strips(weight, scheme):
        original = source[rows].float()
        best = (original / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).float() * scale
        found += float((values - original).double().square().sum())
        nearest += float((best - original).double().square().sum())
    if not nearest:
        return 1.0 if not found else math.inf
    return math.sqrt(found / nearest)
