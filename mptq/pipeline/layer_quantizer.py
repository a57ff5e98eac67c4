"""What is done to one layer: calibrate it, quantize its linears, and hand out what each format stores of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import torch

from mptq import report
from mptq.distributed import shares
from mptq.model import tensors as model_tensors
from mptq.quantize import quantizer
from mptq.quantize.fp8 import E4M3_MAX, dequantize
from mptq.quantize.projections import Quantized, fused_members, member_pieces, quantized_members
from mptq.quantize.quantizer import require_finite
from mptq.types import Fp8Weight, LayerOutput, TensorSpec, WeightError

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from mptq.calibration.hidden_state_pair import Calibrated, HiddenStatePair
    from mptq.model.tensors import LinearSpec
    from mptq.pipeline.layer_stream import LayerStream
    from mptq.recipes.recipe import Scheme


_FORMATS = ("hf", "megatron")


def place(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter (or buffer) `name` of a layer, frozen."""
    owner, _, attribute = name.rpartition(".")
    held = module.get_submodule(owner)
    buffer = attribute in held._buffers
    setattr(held, attribute, tensor if buffer else torch.nn.Parameter(tensor, requires_grad=False))


class LayerQuantizer:
    """One layer on its way from the checkpoint to the writers, linear by linear.

    `copies` are the tensors that keep their precision, as the checkpoint has them. Where activations go along, `live` is the
    layer of megatron-core that they go through: first as it was, then with the numbers that are stored (the Hugging Face
    form's, where it is written). Several ranks then have the same layer: each quantizes its share of the linears for all.
    """

    def __init__(self, stream: LayerStream, index: int) -> None:
        self.plan, self.record, self.progress = stream.plan, stream.record, stream.progress
        self.stream, self.index = stream, index
        self.copies: dict[str, torch.Tensor] = {}
        self.live: TransformerLayer | None = None
        self.calibrated: Calibrated | None = None
        self.waiting: dict[str, torch.Tensor] = {}
        self.amax: torch.Tensor | None = None
        self.row: dict[str, Any] = {"layer": index}
        self.ranks = stream.ranks
        sizes = {place: math.prod(linear.shape) for place, linear in enumerate(stream.plan.linears(index))}
        self.owners = {place: rank for rank, share in enumerate(shares(sizes, self.ranks.size)) for place in share}
        self.rows: list[tuple[int, dict[str, Any]]] = []

    def outputs(self) -> Iterator[LayerOutput]:
        """What the formats store of the layer: first what keeps its precision, then one linear after another."""
        yield self._copied()
        activations = self.stream.activations
        if activations:
            self.calibrate(activations)
            if self.plan.has_cache(self.index):
                yield self._cache()
        for place, linear in enumerate(self.plan.linears(self.index)):
            yield self.linear(linear, place)
        rows = chain.from_iterable(self.ranks.gather(self.rows))
        self.record.rows.extend(row for _, row in sorted(rows, key=itemgetter(0)))
        if activations:
            self.compare(activations)

    def _output(self) -> LayerOutput:
        return LayerOutput(self.index + 1, {form: {} for form in self.plan.formats})

    def _copied(self) -> LayerOutput:
        output, prefix = self._output(), model_tensors.megatron_layer(self.index)
        for copy in self.plan.copies(self.index):
            tensor = self.stream.take(prefix + copy.megatron, copy.shape)
            require_finite(tensor, prefix + copy.megatron)
            self.copies[copy.megatron] = tensor
            self.stream.copied(output, copy, tensor, self.index)
        return output

    def calibrate(self, activations: HiddenStatePair) -> None:
        """Load the layer as it is, and let the reference stream through it."""
        from mptq.layers.transformer_layer import build_layer

        plan, stream = self.plan, self.stream
        live = build_layer(plan.model, self.index)
        for copy in plan.copies(self.index):
            source = self.copies[copy.megatron].to(stream.device)
            place(live, copy.parameter, source if copy.exact else source.to(stream.compute_dtype))
        for linear in plan.linears(self.index):
            weight = stream.take(self._inner(linear), linear.shape).to(stream.device, stream.compute_dtype)
            require_finite(weight, self._inner(linear))
            place(live, f"{linear.module}.weight", weight)
        static = [linear for linear in plan.linears(self.index) if self._is_static(linear)]
        self.progress.doing("calibrating" if activations.calibration else "running the reference")
        with self.record.timed("forward"):
            self.calibrated = activations.calibrate(self.index, live, static)
        self.live = live
        self.row["experts"] = self.calibrated.experts

    def compare(self, activations: HiddenStatePair) -> None:
        """Let the quantized stream through the layer, whose live weights are those that are stored by now."""
        assert self.live is not None
        assert self.calibrated is not None
        self.progress.doing("running the quantized layer")
        with self.record.timed("forward"):
            self.row |= activations.compare(self.index, self.live, self.calibrated) or {}
        self.record.layers.append(self.row)

    def _source(self, linear: LinearSpec) -> torch.Tensor:
        """The weight of `linear`. Linears that have one scale are taken together: its largest magnitude is of all of them."""
        if linear.megatron not in self.waiting:
            group = self.plan.sharing(self.index, linear)
            self.waiting = {one.megatron: self._weight(one) for one in group}
            self.amax = self._largest(group, self.waiting)
        return self.waiting.pop(linear.megatron)

    def _weight(self, linear: LinearSpec) -> torch.Tensor:
        if self.live is None:
            return self.stream.take(self._inner(linear), linear.shape).to(self.stream.device, non_blocking=True)
        # A copy: the live weight is overwritten by what the first format stores.
        weight: torch.Tensor = self.live.get_parameter(f"{linear.module}.weight").clone()
        return weight

    def _largest(self, group: Sequence[LinearSpec], sources: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """The largest magnitude of linears that share one scale, float32 []; None where scales are of blocks or rows."""
        wanted = self.plan.wanted[self.index, group[0].megatron]
        if wanted is None or wanted.scale != "tensor":
            return None
        with self.record.timed("quantize"):
            return torch.stack([quantizer.amax_of(sources[one.megatron], self._inner(one)) for one in group]).amax()

    def linear(self, linear: LinearSpec, place: int) -> LayerOutput:
        """Quantize one linear, of that place in the layer: what each format stores of it."""
        output, self.place = self._output(), place
        source = self._source(linear)
        made = self._quantized(linear, source)
        if "megatron" in self.plan.formats:
            self._megatron(linear, source, output, made.get("megatron"))
        if "hf" in self.plan.formats:
            self._hf(linear, source, output, made.get("hf"))
        return output

    def _quantized(self, linear: LinearSpec, source: torch.Tensor) -> dict[str, Quantized]:
        """What each format that quantizes the linear stores of it: the projections, or the fused matrix alone."""
        inner, amax, found = self._inner(linear), self.amax, dict[str, Quantized]()
        split, fused = (self.plan.scheme(form, self.index, linear) if form in self.plan.formats else None for form in _FORMATS)
        if split is not None:
            pieces = member_pieces(source, linear, split)
            found["hf"] = self._shared(split, pieces, lambda: quantized_members(pieces, linear, split, inner, amax))
        if fused is not None and split is not None and self.plan.same_numbers(self.index, linear):
            with self.record.timed("quantize"):
                found["megatron"] = [fused_members(found["hf"], linear.fusion, fused)]
        elif fused is not None:
            found["megatron"] = self._shared(fused, [[source]], lambda: [quantizer.quantize(source, fused, inner, amax)])
        return found

    def _megatron(self, linear: LinearSpec, source: torch.Tensor, output: LayerOutput, made: Quantized | None) -> None:
        """The fused matrix, quantized or as it is, with the state that ModelOpt restores it by."""
        from mptq.quantize.modelopt import kept_state, linear_state

        inner, owner = self._inner(linear), f"{model_tensors.megatron_layer(self.index)}{linear.megatron}."
        scheme = self.plan.scheme("megatron", self.index, linear)
        tensors: dict[str, torch.Tensor] = {}
        if scheme is None or made is None:
            require_finite(source, inner)
            weight, blob = source.to(getattr(torch, self.plan.source.dtype(inner))), kept_state()
        else:
            ((fused, error),) = made
            input_amax = self._input_amax(linear) if scheme.static else None
            tensors, blob = linear_state(scheme, fused, getattr(torch, self.plan.model.dtype), input_amax)
            weight = fused.data
            self._row(("megatron", inner), linear, scheme, (fused, error))
            self._show(linear, lambda out: dequantize(fused, scheme, out))
        tensors |= zip(linear.keys, weight.split(linear.key_rows), strict=True)
        output.blobs[f"{owner}_extra_state/shard_0_1"] = blob
        output.tensors["megatron"] |= {owner + key: tensor.cpu() for key, tensor in tensors.items()}

    def _hf(self, linear: LinearSpec, source: torch.Tensor, output: LayerOutput, made: Quantized | None) -> None:
        """The projections, each quantized or as it is."""
        scheme = self.plan.scheme("hf", self.index, linear)
        specs = iter(self.plan.hf_linear_specs(self.index, linear))
        stored = output.tensors["hf"]
        if scheme is None or made is None:
            require_finite(source, self._inner(linear))
            for spec, part in zip(specs, linear.fusion.split(source), strict=True):
                stored[spec.name] = part.to(getattr(torch, spec.dtype)).cpu()
            self._show(linear, lambda out: out.copy_(source))
            return
        for member, error in made:
            weight, scale = next(specs), next(specs)
            stored[weight.name] = member.data.cpu()
            # Not contiguous(), for which a single element is contiguous whatever its stride: writers want bytes.
            stored[scale.name] = member.scale.expand(scale.shape).clone(memory_format=torch.contiguous_format).cpu()
            if scheme.static:
                spec = next(specs)
                stored[spec.name] = (self._input_amax(linear) / E4M3_MAX).reshape(spec.shape).cpu()
            self._row(("hf", weight.name), linear, scheme, (member, error))
        found = [member for member, _ in made]
        self._show(linear, lambda out: out.copy_(linear.fusion.merge([dequantize(member, scheme) for member in found])))

    def _shared(
        self, scheme: Scheme, sources: Sequence[Sequence[torch.Tensor]], quantize: Callable[[], Quantized]
    ) -> Quantized:
        """What `quantize` makes of `sources` on the rank that has this linear, on every rank; errors on that one alone."""
        owner = self.owners[self.place]
        with self.record.timed("quantize"):
            made = (
                quantize() if owner == self.ranks.rank else [(quantizer.unfilled(source, scheme), None) for source in sources]
            )
            for weight, _ in made:
                for tensor in (weight.data, weight.scale, weight.amax):
                    if tensor is not None:
                        self.ranks.share(tensor, owner)
        return made

    def _cache(self) -> LayerOutput:
        """The scales of the cache; the report has those that the quantized stream rounds by."""
        assert self.calibrated is not None
        output = self._output()
        amax = {form: [self.calibrated.amax[name] for name in self.plan.cached(form, self.index)] for form in self.plan.formats}
        shown = zip(("k_scale", "v_scale"), amax[self.plan.formats[0]], strict=True)
        self.row["kv_cache"] = {name: float(value / E4M3_MAX) for name, value in shown}
        if "hf" in amax:
            for spec, value in zip(self.plan.kv_specs("hf", self.index), amax["hf"], strict=True):
                output.tensors["hf"][spec.name] = (value / E4M3_MAX).reshape(spec.shape).cpu()
        if "megatron" in amax:
            from mptq.quantize.modelopt import attention_state

            owner = f"{model_tensors.megatron_layer(self.index)}{model_tensors.CORE_ATTENTION}."
            tensors, output.blobs[f"{owner}_extra_state/shard_0_1"] = attention_state(*amax["megatron"])
            output.tensors["megatron"] |= {owner + key: tensor.cpu() for key, tensor in tensors.items()}
        return output

    def _show(self, linear: LinearSpec, write: Callable[[torch.Tensor], object]) -> None:
        """Let the quantized stream see what is stored of a linear: `write` fills the live weight."""
        if self.live is not None:
            write(self.live.get_parameter(f"{linear.module}.weight").data)

    def _row(
        self, stored: tuple[str, str], linear: LinearSpec, scheme: Scheme, made: tuple[Fp8Weight, WeightError | None]
    ) -> None:
        """Add a row to the report for the tensor `stored`, a format and a name; without its error, it is another rank's to."""
        weight, error = made
        if error is None:
            return
        inner = self._inner(linear)
        before = TensorSpec(inner, self.plan.source.dtype(inner), tuple(weight.data.shape))
        row = report.tensor_row(stored, before, scheme, error)
        row["input_amax"] = float(self._input_amax(linear)) if scheme.static else None
        self.rows.append((self.place, row))
        self.progress.tensor(row)

    def _inner(self, linear: LinearSpec) -> str:
        return f"{model_tensors.megatron_layer(self.index)}{linear.megatron}.weight"

    def _is_static(self, linear: LinearSpec) -> bool:
        schemes = [self.plan.scheme(form, self.index, linear) for form in self.plan.formats]
        return any(scheme is not None and scheme.static for scheme in schemes)

    def _input_amax(self, linear: LinearSpec) -> torch.Tensor:
        assert self.calibrated is not None
        return self.calibrated.amax[linear.module]
