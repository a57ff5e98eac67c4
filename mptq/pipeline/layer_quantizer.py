"""Processes one layer: calibrates it, quantizes it linear by linear for each format, and measures the error."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

from mptq import report
from mptq.calibration.linear_inputs import is_added
from mptq.calibration.moments import Batches, moments
from mptq.distributed import shares
from mptq.errors import CheckpointError
from mptq.formats import FORMATS
from mptq.formats.layout import canonical_weight
from mptq.formats.protocol import QuantizedCache, QuantizedLinear
from mptq.model.tensors import CORE_ATTENTION, groups, megatron_layer, stages
from mptq.pipeline.stored import add, empty, store_unquantized
from mptq.quantize import quantizer
from mptq.quantize.compressed_linears import Compressed, CompressedLinears, calibrated_amax, drop, release
from mptq.quantize.fp8 import dequantize, encoded, scale_of
from mptq.quantize.quantizer import require_finite
from mptq.quantize.rounding.rounder import Rounded, Rounder, Shared
from mptq.quantize.served import as_served, served_error
from mptq.types import LayerOutput, TensorSpec

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from mptq.calibration.hidden_state_pair import Calibrated, Collected, HiddenStatePair
    from mptq.formats.layout import Layout
    from mptq.model.tensors import LinearSpec
    from mptq.pipeline.context import PlannedReader, RunContext
    from mptq.plan.units import Unit
    from mptq.recipes.schemes import Scheme


def place(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Sets the parameter (frozen) or buffer `name` of a layer to `tensor`."""
    owner, _, attribute = name.rpartition(".")
    held = module.get_submodule(owner)
    buffer = attribute in held._buffers
    setattr(held, attribute, tensor if buffer else torch.nn.Parameter(tensor, requires_grad=False))


def _matrices(layout: Layout, layer: int, linear: LinearSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yields name and shape [out, in] of the projections of a linear, or of the fused matrix, as an output stores them."""
    shapes = [shape for _, shape in linear.members] if layout.splits else [linear.shape]
    names = (name.removesuffix(".weight") for name in layout.weights(layer, linear))
    return zip(names, shapes, strict=True)


def _outcome_row(found: Rounded | None) -> dict[str, Any]:
    """Returns the fields of the report about the rounding of a matrix; empty if all are rounded to nearest."""
    if found is None:
        return {}
    return {"rounding": found.method, "output_error": found.error, "output_error_nearest": found.nearest}


class LayerQuantizer:
    """Quantizes one layer, linear by linear.

    With hidden states, `live` is megatron-core's layer that they pass through: first with the original weights, then
    with those that the first format stores. All ranks then have the same layer, and each quantizes its share of the
    linears.
    """

    def __init__(self, context: RunContext, reader: PlannedReader, unit: Unit) -> None:
        assert unit.layer is not None
        self.context, self.plan, self.reader, self.unit, self.layer = context, context.plan, reader, unit, unit.layer
        self.unquantized: dict[str, torch.Tensor] = {}
        self.live: TransformerLayer | None = None
        self.calibrated: Calibrated | None = None
        self.waiting: dict[str, torch.Tensor] = {}
        self.amax: torch.Tensor | None = None
        self.row: dict[str, Any] = {"layer": self.layer}
        sizes = {number: math.prod(linear.shape) for number, linear in enumerate(self.plan.linears(self.layer))}
        ranks = enumerate(shares(sizes, context.ranks.size))
        self.owners = {number: rank for rank, share in ranks for number in share}
        self.rows: list[tuple[int, dict[str, Any]]] = []
        self.linears: dict[str, CompressedLinears] = {}
        self.inputs: Collected = {}
        self.reference: Collected = {}
        self.rounder: Rounder | None = None
        self.outcomes: dict[str, Rounded] = {}
        self.scales: dict[str, list[torch.Tensor]] = {}
        self.best: torch.Tensor | None = None

    def outputs(self) -> Iterator[LayerOutput]:
        """Yields what the formats store of the layer: first the tensors that keep their precision, then each linear."""
        yield self._unquantized()
        with self.context.log.timed("convert"):
            self.linears = {form: self._converted(layout) for form, layout in self.plan.layouts.items()}
        states = self.context.hidden_states
        if states:
            self._calibrate(states)
            if self.plan.assignment.has_cache(self.layer):
                yield self._kv_cache()
        numbers = {linear.megatron: number for number, linear in enumerate(self.plan.linears(self.layer))}
        for linear in self._measured(states, self._ordered(states)):
            yield self._linear(linear, numbers[linear.megatron])
        rows = chain.from_iterable(self.context.ranks.all_gather(self.rows))
        self.context.log.rows.extend(row for _, row in sorted(rows, key=itemgetter(0)))
        if states:
            self._compare(states)

    def _ordered(self, states: HiddenStatePair | None) -> Iterator[LinearSpec]:
        """Yields the linears; for rounding by their inputs, each group once these are known."""
        linears = self.plan.linears(self.layer)
        if self.plan.recipe.rounding == "nearest":
            yield from linears
            return
        assert states is not None
        assert self.live is not None
        left = stages(linears)
        while left:
            group, *left = left
            wanted = [linear for linear in group if self._schemes(linear)]
            if wanted:
                self.context.progress.doing("collecting inputs")
                later = [linear.module for linear in chain.from_iterable(left)]
                with self.context.log.timed("forward"):
                    self.inputs = states.inputs(self.live, wanted, later)
            yield from group

    def _measured(self, states: HiddenStatePair | None, linears: Iterator[LinearSpec]) -> Iterator[LinearSpec]:
        """Yields `linears`; with `sensitivity`, measures what each group has done to the output once it is quantized."""
        if not self.context.sensitivity or states is None or self.live is None:
            yield from linears
            return
        found: dict[str, float] = {}
        left = {name: {linear.megatron for linear in group} for name, group in groups(self.plan.linears(self.layer)).items()}
        before = states.outputs(self.live)
        for linear in linears:
            yield linear
            name = next(name for name, waiting in left.items() if linear.megatron in waiting)
            left[name].remove(linear.megatron)
            if not left[name]:
                with self.context.log.timed("forward"):
                    after = states.outputs(self.live)
                found[name], before = states.change(before, after), after
        self.row["sensitivity"] = found

    def _rounder(self, linear: LinearSpec) -> Rounder | None:
        """Returns what rounds the linears of the group of `linear`, whose first is asked for; None to round to nearest.

        All ranks call it at once.
        """
        rows, states = self.inputs.pop(linear.module, None), self.context.hidden_states
        if rows is None or states is None:
            return None
        reference, added = self.reference.pop(linear.module, None), linear.shape[0] if is_added(linear) else 0
        given = Batches(states.calibration_batches, linear.in_features, rows, reference, added)
        with self.context.log.timed("moments"):
            found = moments(given, self.context.device, self.context.ranks)
        if not torch.isfinite(found.fitted.diagonal()).all():
            name = f"{megatron_layer(self.layer)}{linear.megatron}"
            raise CheckpointError(f"{name}: the calibration data produces activations that are not finite")
        return Rounder(found, self.plan.recipe.rounding)

    def _converted(self, layout: Layout) -> CompressedLinears:
        """Returns the layer's linears as an output stores them, converted by ModelOpt and without weights."""
        shapes: dict[str, tuple[int, int]] = {}
        schemes: dict[str, Scheme | None] = {}
        for linear in self.plan.linears(self.layer):
            matrices = dict(_matrices(layout, self.layer, linear))
            shapes |= matrices
            schemes |= dict.fromkeys(matrices, layout.scheme(self.layer, linear))
        return CompressedLinears(shapes, schemes, self.context.dtype, self.plan.recipe.algorithm)

    def _unquantized(self) -> LayerOutput:
        output, prefix = empty(self.plan, self.unit), megatron_layer(self.layer)
        for tensor in self.plan.unquantized(self.layer):
            values = self.reader.take(prefix + tensor.megatron, tensor.shape)
            require_finite(values, prefix + tensor.megatron)
            self.unquantized[tensor.megatron] = values
            store_unquantized(self.plan, output, tensor, values, self.layer)
        return output

    def _calibrate(self, states: HiddenStatePair) -> None:
        """Loads the layer with its original weights, and runs the reference through it."""
        from mptq.layers.transformer_layer import build_layer

        device, dtype, live = self.context.device, self.context.dtype, build_layer(self.plan.model, self.layer)
        for tensor in self.plan.unquantized(self.layer):
            source = self.unquantized[tensor.megatron].to(device)
            place(live, tensor.parameter, source if tensor.exact else source.to(dtype))
        for linear in self.plan.linears(self.layer):
            name = canonical_weight(self.layer, linear)
            weight = self.reader.take(name, linear.shape).to(device, dtype)
            require_finite(weight, name)
            place(live, f"{linear.module}.weight", weight)
        static = [linear for linear in self.plan.linears(self.layer) if self._is_static(linear)]
        self.context.progress.doing("calibrating" if states.calibration else "running the reference")
        with self.context.log.timed("forward"):
            self.calibrated = states.calibrate(self.layer, live, static)
            if self.plan.recipe.compares_streams:
                # The tokens of an expert differ between the streams.
                wanted = [one for one in self.plan.linears(self.layer) if one.expert is None and self._schemes(one)]
                self.reference = states.reference_inputs(live, wanted)
        self.live = live
        self.row["experts"] = self.calibrated.experts

    def _compare(self, states: HiddenStatePair) -> None:
        """Runs the quantized hidden states through the layer, whose live weights are now the stored ones."""
        assert self.live is not None
        assert self.calibrated is not None
        self.context.progress.doing("running the quantized layer")
        with self.context.log.timed("forward"):
            self.row |= states.compare(self.layer, self.live, self.calibrated) or {}
            if states.served is not None:
                self._serve(self.live)
                states.serve(self.live)
        release(self.live)
        self.context.log.layers.append(self.row)

    def _linear(self, linear: LinearSpec, number: int) -> LayerOutput:
        """Quantizes the linear with that number in the layer; returns what each format stores of it."""
        output, source = empty(self.plan, self.unit), self._source(linear)
        made: dict[str, list[Compressed]] = {}
        for form in reversed(self.plan.formats):  # the order of rows in the report
            layout = self.plan.layouts[form]
            scheme, weights = layout.scheme(self.layer, linear), None
            if scheme is not None:
                weights = made[form] = self._compressed(form, linear, source, self.owners[number])
                self._report(number, form, linear, weights)
            input_amax = self._input_amax(linear) if scheme is not None and scheme.static else None
            modules = [self.linears[form].linear(name) for name, _ in _matrices(layout, self.layer, linear)]
            given = QuantizedLinear(self.layer, linear, source, weights, modules, input_amax)
            add(output, form, FORMATS[form].store_linear(layout, given))
        self._show(linear, source, made)
        for weights in made.values():
            drop(weights)
        return output

    def _source(self, linear: LinearSpec) -> torch.Tensor:
        """Returns the weight of `linear`. Linears that share a scale are read together, for their common amax."""
        if linear.megatron not in self.waiting:
            group = self.plan.assignment.sharing(self.layer, linear)
            self.waiting = {one.megatron: self._weight(one) for one in group}
            self.amax = self._shared_amax(group, self.waiting)
            self.best = None
        self.rounder = self._rounder(linear)
        if self.rounder is not None and self.amax is not None and self.best is None:
            with self.context.log.timed("quantize"):
                scheme = self.plan.assignment.scheme(self.layer, linear)
                assert scheme is not None
                self.best = self.rounder.shared_amax(self.waiting.values(), scheme, self.amax)
        return self.waiting.pop(linear.megatron)

    def _weight(self, linear: LinearSpec) -> torch.Tensor:
        if self.live is None:
            weight = self.reader.take(canonical_weight(self.layer, linear), linear.shape)
            return weight.to(self.context.device, non_blocking=True)
        # Copied, because the live weight is overwritten with what the first format stores.
        copied: torch.Tensor = self.live.get_parameter(f"{linear.module}.weight").clone()
        return copied

    def _shared_amax(self, group: Sequence[LinearSpec], sources: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Returns the amax of linears that share one scale, float32 []; None if scales are per block or row."""
        scheme, algorithm = self.plan.assignment.scheme(self.layer, group[0]), self.plan.recipe.algorithm
        if scheme is None or not scheme.shared:
            return None
        with self.context.log.timed("quantize"):
            if algorithm != "max":
                return calibrated_amax([sources[one.megatron] for one in group], scheme, algorithm)
            found = [quantizer.amax_of(sources[one.megatron], canonical_weight(self.layer, one)) for one in group]
            return torch.stack(found).amax()

    def _compressed(self, form: str, linear: LinearSpec, source: torch.Tensor, owner: int) -> list[Compressed]:
        """Returns what a format stores of the linear: its compressed projections, or the single fused matrix.

        Rank `owner` rounds them, and the others receive them.
        """
        layout, linears, ranks = self.plan.layouts[form], self.linears[form], self.context.ranks
        label, found = canonical_weight(self.layer, linear), []
        with self.context.log.timed("quantize"):
            parts = linear.fusion.members(source) if layout.splits else iter([source])
            for (name, _), part in zip(_matrices(layout, self.layer, linear), parts, strict=True):
                if owner == ranks.rank:
                    found.append(self._rounded(linears, name, part, f"{label} ({name})" if layout.splits else label))
                else:
                    found.append(linears.receive(name, self.context.device))
            for tensor in (part for made in found for part in (made.weight.data, made.weight.scale, made.weight.amax)):
                if tensor is not None:
                    ranks.broadcast(tensor, owner)
        return found

    def _rounded(self, linears: CompressedLinears, name: str, source: torch.Tensor, label: str) -> Compressed:
        """Returns a compressed matrix, rounded to nearest or by its inputs."""
        scheme = linears.schemes[name]
        assert scheme is not None
        made = self._compress(linears, name, source, label)
        served = served_error(source, made.weight, scheme) if scheme.is_requantized else None
        return replace(made, served=served)

    def _compress(self, linears: CompressedLinears, name: str, source: torch.Tensor, label: str) -> Compressed:
        if self.rounder is None:
            return linears.compress(name, source, label, self.amax)
        scheme = linears.schemes[name]
        assert scheme is not None
        # A weight that does not fit the recipe's scheme may have another one in an output, which is not shared.
        shared = None if self.amax is None or self.best is None or not scheme.shared else Shared(self.amax, self.best)
        found = self.rounder.round(source, scheme, label, shared)
        made = linears.compress(name, found.weight, label, found.amax)
        self.outcomes[name] = found
        return replace(made, error=quantizer.measured(source, made.weight, scheme))

    def _kv_cache(self) -> LayerOutput:
        """Returns the scales of the KV cache; the report has those of the first format, as in the quantized stream."""
        assert self.calibrated is not None
        assert self.live is not None
        output, found = empty(self.plan, self.unit), dict[str, list[torch.Tensor]]()
        attention = self.live.get_submodule(CORE_ATTENTION)
        for form, layout in self.plan.layouts.items():
            found[form] = [self.calibrated.amax[name] for name in layout.cached(self.layer)]
            add(output, form, FORMATS[form].store_kv_cache(layout, QuantizedCache(self.layer, found[form], attention)))
        shown = zip(("k_scale", "v_scale"), found[self.plan.formats[0]], strict=True)
        self.row["kv_cache"] = {name: float(scale_of(value)) for name, value in shown}
        return output

    def _show(self, linear: LinearSpec, source: torch.Tensor, made: Mapping[str, Sequence[Compressed]]) -> None:
        """Replaces the live weight of a linear with what the first format stores, for the quantized hidden states."""
        if self.live is None:
            return
        out, first = self.live.get_parameter(f"{linear.module}.weight").data, self.plan.formats[0]
        layout, weights = self.plan.layouts[first], made.get(first)
        scheme = layout.scheme(self.layer, linear)
        if scheme is not None and weights is not None and scheme.is_requantized:
            self.scales[linear.module] = [made.weight.scale for made in weights]
        if scheme is None or weights is None:
            out.copy_(source)
        elif layout.splits:
            out.copy_(linear.fusion.merge([dequantize(made.weight, scheme) for made in weights]))
        else:
            (fused,) = weights
            dequantize(fused.weight, scheme, out)

    def _serve(self, live: TransformerLayer) -> None:
        """Replaces the live weights, which the first format stores, with what Blackwell's loaders make of them.

        Codes can be read off the weights, because the model's dtype is finer than E4M3.
        """
        layout = self.plan.layouts[self.plan.formats[0]]
        for linear in self.plan.linears(self.layer):
            scales, scheme = self.scales.pop(linear.module, None), layout.scheme(self.layer, linear)
            if scales is None or scheme is None:
                continue
            out = live.get_parameter(f"{linear.module}.weight").data
            parts = linear.fusion.split(out) if layout.splits else [out]
            codes = (encoded(part, scale, scheme) for part, scale in zip(parts, scales, strict=True))
            found = [dequantize(as_served(made, scheme), scheme) for made in codes]
            out.copy_(linear.fusion.merge(found) if layout.splits else found[0])

    def _report(self, number: int, form: str, linear: LinearSpec, weights: Sequence[Compressed]) -> None:
        """Adds a row to the report for each stored weight; weights without an error are reported by another rank."""
        layout = self.plan.layouts[form]
        scheme, source = layout.scheme(self.layer, linear), canonical_weight(self.layer, linear)
        assert scheme is not None
        for name, made in zip(layout.weights(self.layer, linear), weights, strict=True):
            if made.error is None:
                continue
            before = TensorSpec(source, self.plan.source.dtype(source), tuple(made.weight.data.shape))
            row = report.tensor_row(form, name, before, scheme, made.error)
            row |= _outcome_row(self.outcomes.pop(name.removesuffix(".weight"), None))
            row["served_error"] = made.served
            row["input_amax"] = float(self._input_amax(linear)) if scheme.static else None
            self.rows.append((number, row))
            self.context.progress.tensor(row)

    def _schemes(self, linear: LinearSpec) -> list[Scheme]:
        """Returns the schemes of the outputs that quantize a linear."""
        schemes = (layout.scheme(self.layer, linear) for layout in self.plan.layouts.values())
        return [scheme for scheme in schemes if scheme is not None]

    def _is_static(self, linear: LinearSpec) -> bool:
        return any(scheme.static for scheme in self._schemes(linear))

    def _input_amax(self, linear: LinearSpec) -> torch.Tensor:
        assert self.calibrated is not None
        return self.calibrated.amax[linear.module]
