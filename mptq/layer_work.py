"""What is done to one layer: calibrate it, quantize its linears, and hand out what each format stores of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from mptq import report
from mptq.arch import naming
from mptq.arch.forward import weigh_output
from mptq.arch.layer import build_layer
from mptq.quantize.fp8 import E4M3_MAX, dequantize, require_finite, weight_error
from mptq.quantize.logical import to_members
from mptq.quantize.modelopt import attention_state, compress_linear, keep_linear, megatron_state
from mptq.types import TensorSpec

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_layer import TransformerLayer

    from mptq.arch.naming import Linear
    from mptq.recipe import Scheme
    from mptq.stream import LayerStream
    from mptq.streams import Calibrated, Streams
    from mptq.types import Fp8Weight, LayerOutput


def place(module: torch.nn.Module, name: str, tensor: torch.Tensor) -> None:
    """Make `tensor` the parameter (or buffer) `name` of a layer, frozen."""
    owner, _, attribute = name.rpartition(".")
    held = module.get_submodule(owner)
    buffer = attribute in held._buffers
    setattr(held, attribute, tensor if buffer else torch.nn.Parameter(tensor, requires_grad=False))


class LayerWork:
    """One layer on its way from the checkpoint to the writers.

    `module` is the layer that is quantized for good, `copies` are the tensors of it that are not, as the
    checkpoint has them. Where activations go along, `live` is the layer that they go through:
    first as it was, then with the numbers that are stored (the Hugging Face form's, where it is written).
    """

    def __init__(self, stream: LayerStream, index: int, module: TransformerLayer, output: LayerOutput) -> None:
        self.plan, self.record, self.progress = stream.plan, stream.record, stream.progress
        self.stream, self.index, self.module, self.output = stream, index, module, output
        self.copies: dict[str, torch.Tensor] = {}
        self.live: TransformerLayer | None = None
        self.calibrated: Calibrated | None = None
        self.row: dict[str, Any] = {"layer": index}

    def calibrate(self, activations: Streams) -> None:
        """Load the layer as it is, and let the reference stream through it."""
        plan, stream = self.plan, self.stream
        live = build_layer(plan.model, self.index)
        for copy in plan.copies(self.index):
            source = self.copies[copy.megatron].to(stream.device)
            place(live, copy.parameter, source if copy.exact else source.to(stream.compute_dtype))
        for linear in plan.linears(self.index):
            weight = stream.read(self._inner(linear), linear.shape, stream.compute_dtype)
            require_finite(weight, self._inner(linear))
            place(live, f"{linear.module}.weight", weight)
        static = [linear for linear in plan.linears(self.index) if self._is_static(linear)]
        for expert in {linear.module.rpartition(".")[0] for linear in static if linear.expert is not None}:
            weigh_output(live.get_submodule(expert))
        self.progress.doing("calibrating" if activations.calibration else "running the reference")
        with self.record.timed("forward"):
            self.calibrated = activations.calibrate(self.index, live, static)
        self.live = live
        self.row["experts"] = self.calibrated.experts
        if plan.has_cache(self.index):
            self._cache(self.calibrated.cache())

    def compare(self, activations: Streams) -> None:
        """Let the quantized stream through the layer, whose live weights are those that are stored by now."""
        assert self.live is not None
        assert self.calibrated is not None
        self.progress.doing("running the quantized layer")
        with self.record.timed("forward"):
            self.row |= activations.compare(self.index, self.live, self.calibrated) or {}
        self.record.layers.append(self.row)

    def linear(self, linear: Linear) -> None:
        """Quantize one linear of the layer in place, and add what each format stores of it."""
        inner = self._inner(linear)
        if self.live is None:
            source = self.stream.read(inner, linear.shape, torch.float32)
        else:
            # A copy of a float32 weight too: the live one is overwritten by what the first format stores.
            source = self.live.get_parameter(f"{linear.module}.weight").to(torch.float32, copy=True)
        fused = self._quantize(linear, source)
        if "megatron" in self.plan.formats:
            self._megatron(linear, fused, source)
        if "hf" in self.plan.formats:
            self._hf(linear, fused, source)

    def _quantize(self, linear: Linear, source: torch.Tensor) -> Fp8Weight | None:
        """Quantize the fused matrix, as Megatron's form has it where it is written; None for one that keeps its precision."""
        inner = self._inner(linear)
        target = self.module.get_submodule(linear.module)
        scheme = self.plan.scheme(self.plan.formats[-1], self.index, linear)
        with self.record.timed("quantize"):
            if scheme is not None:
                return compress_linear(target, source, scheme, inner, self._input_amax(linear) if scheme.static else None)
            keep_linear(target, source.to(getattr(torch, self.plan.source.dtype(inner))))
            return None

    def _megatron(self, linear: Linear, fused: Fp8Weight | None, source: torch.Tensor) -> None:
        owner = f"{naming.megatron_layer(self.index)}{linear.megatron}."
        target = self.module.get_submodule(linear.module)
        tensors, self.output.blobs[f"{owner}_extra_state/shard_0_1"] = megatron_state(target)
        weight = target.get_parameter("weight").data if fused is None else fused.data
        tensors |= zip(linear.keys, weight.split(linear.key_rows), strict=True)
        self.output.tensors["megatron"] |= {owner + key: tensor.cpu() for key, tensor in tensors.items()}
        scheme = self.plan.scheme("megatron", self.index, linear)
        if fused is not None and scheme is not None:
            self._measure(("megatron", self._inner(linear)), linear, fused, source, scheme)
            self._show(linear, lambda out: dequantize(fused, scheme, out))

    def _hf(self, linear: Linear, fused: Fp8Weight | None, source: torch.Tensor) -> None:
        scheme = self.plan.scheme("hf", self.index, linear)
        specs = iter(self.plan.hf_linear_specs(self.index, linear))
        stored = self.output.tensors["hf"]
        parts = linear.fusion.split(source)
        if scheme is None:
            for spec, part in zip(specs, parts, strict=True):
                stored[spec.name] = part.to(getattr(torch, spec.dtype)).cpu()
            self._show(linear, lambda out: out.copy_(source))
            return
        same = self.plan.formats == ("hf",) or self.plan.same_numbers(self.index, linear)
        with self.record.timed("quantize"):
            members = to_members(fused if same else None, source, linear, scheme, self._inner(linear))
        for part, member in zip(parts, members, strict=True):
            weight, scale = next(specs), next(specs)
            stored[weight.name] = member.data.cpu()
            # Not contiguous(), for which a single element is contiguous whatever its stride: writers want bytes.
            stored[scale.name] = member.scale.expand(scale.shape).clone(memory_format=torch.contiguous_format).cpu()
            if scheme.static:
                spec = next(specs)
                stored[spec.name] = (self._input_amax(linear) / E4M3_MAX).reshape(spec.shape).cpu()
            self._measure(("hf", weight.name), linear, member, part, scheme)
        self._show(linear, lambda out: out.copy_(linear.fusion.merge([dequantize(member, scheme) for member in members])))

    def _cache(self, amax: dict[str, torch.Tensor]) -> None:
        """Add the scales of K and V to what is stored."""
        values = amax["key"], amax["value"]
        scales = [value / E4M3_MAX for value in values]
        self.row["kv_cache"] = {name: float(scale) for name, scale in zip(("k_scale", "v_scale"), scales, strict=True)}
        if "hf" in self.plan.formats:
            for spec, scale in zip(self.plan.kv_specs("hf", self.index), scales, strict=True):
                self.output.tensors["hf"][spec.name] = scale.reshape(spec.shape).cpu()
        if "megatron" in self.plan.formats:
            owner = f"{naming.megatron_layer(self.index)}{naming.CORE_ATTENTION}."
            attention = self.module.get_submodule(naming.CORE_ATTENTION)
            tensors, self.output.blobs[f"{owner}_extra_state/shard_0_1"] = attention_state(attention, *values)
            self.output.tensors["megatron"] |= {owner + key: tensor.cpu() for key, tensor in tensors.items()}

    def _show(self, linear: Linear, write: Callable[[torch.Tensor], object]) -> None:
        """Let the quantized stream see what is stored of a linear: `write` fills the live weight."""
        if self.live is not None:
            write(self.live.get_parameter(f"{linear.module}.weight").data)

    def _measure(
        self, stored: tuple[str, str], linear: Linear, weight: Fp8Weight, source: torch.Tensor, scheme: Scheme
    ) -> None:
        """Add a row to the report for the tensor `stored`, a format and a name."""
        inner = self._inner(linear)
        with self.record.timed("measure"):
            error = weight_error(source, weight, scheme)
        before = TensorSpec(inner, self.plan.source.dtype(inner), tuple(source.shape))
        row = report.tensor_row(stored, before, scheme, error)
        row["input_amax"] = float(self._input_amax(linear)) if scheme.static else None
        self.record.rows.append(row)
        self.progress.tensor(row)

    def _inner(self, linear: Linear) -> str:
        return f"{naming.megatron_layer(self.index)}{linear.megatron}.weight"

    def _is_static(self, linear: Linear) -> bool:
        schemes = [self.plan.scheme(form, self.index, linear) for form in self.plan.formats]
        return any(scheme is not None and scheme.static for scheme in schemes)

    def _input_amax(self, linear: Linear) -> torch.Tensor:
        assert self.calibrated is not None
        return self.calibrated.amax[linear.module]
