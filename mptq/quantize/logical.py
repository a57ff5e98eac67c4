"""From a quantized fused matrix of Megatron to the quantized logical projections that Hugging Face stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mptq.quantize.modelopt import quantize_weight
from mptq.types import Fp8Weight

if TYPE_CHECKING:
    import torch

    from mptq.arch.naming import Linear
    from mptq.recipe import Scheme


def to_members(fused: Fp8Weight | None, source: torch.Tensor, linear: Linear, scheme: Scheme, name: str) -> list[Fp8Weight]:
    """The projections of `linear`, quantized: the same bytes where the grid allows, quantized anew where it crosses.

    `source` is the float32 weight that `fused` was made from; None for `fused` where that has another scheme.
    """
    if fused is None or linear.crosses(scheme.block):
        parts = linear.fusion.split(source)
        return [
            quantize_weight(part, scheme, f"{name} ({member})") for part, (member, _) in zip(parts, linear.members, strict=True)
        ]
    data = linear.fusion.split(fused.data)
    if scheme.scale == "tensor":
        return [Fp8Weight(part, fused.scale) for part in data]
    fusion = linear.fusion if scheme.block is None else linear.fusion.coarsen(scheme.block)
    scales = fusion.split(fused.scale)
    return [Fp8Weight(part, scale) for part, scale in zip(data, scales, strict=True)]
