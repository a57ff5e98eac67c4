"""Rounding by the inputs as ModelOpt's calibration algorithms, by name: `mptq_scales`, `mptq_gptq` and `mptq_qep`.

    mtq.quantize(layer, {"quant_cfg": [...], "algorithm": {"method": "mptq_gptq"}}, forward_loop)
    mtq.compress(layer)

They round the weights of a transformer layer in place, to numbers that `mtq.compress` then stores. A run of mptq does the
same with the same functions, but rounds the matrices that each output stores, ends a pass where nothing more is wanted,
and has a reference stream that no earlier layer has changed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch

from mptq.calibration.linear_inputs import Inputs, LinearInputs, is_added
from mptq.calibration.moments import Batches, moments
from mptq.distributed import Ranks
from mptq.errors import CheckpointError
from mptq.model.fused import Fusion
from mptq.model.tensors import LinearSpec, stages
from mptq.quantize.modelopt import Loop, quantizers_off, register_algorithm
from mptq.quantize.rounding.rounder import Rounder
from mptq.quantize.weight_quantizer import WeightQuantizer

_EXPERTS = ".experts.local_experts."
"""What precedes the number of an expert in megatron-core's names."""


def _quantized(layer: torch.nn.Module) -> list[LinearSpec]:
    """Returns the linears of a layer whose weights ModelOpt quantizes."""
    found = []
    for name, module in layer.named_modules():
        quantizer: Any = getattr(module, "weight_quantizer", None)
        if isinstance(quantizer, WeightQuantizer) and quantizer.is_enabled:
            rows, columns = module.weight.shape
            _, routed, inner = name.partition(_EXPERTS)
            expert = int(inner.partition(".")[0]) if routed else None
            found.append(LinearSpec(name, (), Fusion(1, (rows,)), columns, expert=expert))
    return found


class _Rounding:
    """Rounds the quantized weights of `layer` by `method`, in the order in which their inputs depend on each other."""

    def __init__(self, layer: torch.nn.Module, forward_loop: Loop | None, method: str) -> None:
        if forward_loop is None:
            raise CheckpointError(f"{method} needs a forward_loop: pass one that calls the layer, once for each batch")
        self.layer, self.forward_loop, self.method = layer, forward_loop, method
        self.linears, self.batches = _quantized(layer), 0

    def run(self) -> None:
        """Rounds them all."""
        linears, reference = self.linears, dict[str, dict[int, Inputs]]()
        if self.method == "mptq_qep":
            # The tokens of an expert change with what is rounded before it.
            reference = self._collected([linear for linear in linears if linear.expert is None])
        for group in stages(linears):
            rows = self._collected(group)
            for linear in group:
                self._round(linear, rows[linear.module], reference.get(linear.module))

    def _collected(self, wanted: Sequence[LinearSpec]) -> dict[str, dict[int, Inputs]]:
        """Runs the loop, and returns inputs by module and number of the batch, which is that of the layer's call."""
        found = LinearInputs(wanted, residuals=True, number=-1)

        def next_batch(_module: torch.nn.Module, _given: Any) -> None:
            found.number += 1

        hook = self.layer.register_forward_pre_hook(next_batch)
        try:
            with found.collecting(self.layer):
                self.forward_loop(self.layer)
        finally:
            hook.remove()
        self.batches = found.number + 1
        return found.rows

    def _round(self, linear: LinearSpec, rows: Mapping[int, Inputs], reference: Mapping[int, Inputs] | None) -> None:
        module: Any = self.layer.get_submodule(linear.module)
        scheme, weight = module.weight_quantizer.scheme, module.weight
        if scheme is None:
            raise CheckpointError(f"{linear.module}: {self.method} does not support the format of its weight")
        added = linear.shape[0] if is_added(linear) else 0
        found = moments(Batches(self.batches, linear.in_features, rows, reference, added), weight.device, Ranks())
        made = Rounder(found, self.method.removeprefix("mptq_")).round(weight.detach(), scheme, linear.module)
        weight.data.copy_(made.weight)
        module.weight_quantizer.scale_for(made.amax, scheme)


def _calibrate(method: str, layer: torch.nn.Module, forward_loop: Loop | None) -> None:
    rounding = _Rounding(layer, forward_loop, method)
    with torch.no_grad(), quantizers_off(layer):  # weights that are not rounded yet are used as they are
        rounding.run()


for _method in ("mptq_scales", "mptq_gptq", "mptq_qep"):
    register_algorithm(_method, partial(_calibrate, _method))
