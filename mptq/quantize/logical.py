"""From a fused matrix of Megatron to the quantized logical projections that Hugging Face stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mptq.quantize import strips

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from mptq.arch.naming import Linear
    from mptq.recipe import Scheme
    from mptq.types import Fp8Weight, WeightError


def quantized_members(
    source: torch.Tensor, parts: Sequence[torch.Tensor], linear: Linear, scheme: Scheme, name: str
) -> list[tuple[Fp8Weight, WeightError]]:
    """The projections of `linear`, whose fused matrix is `source` and their own rows `parts`: quantized, and their error.

    Blocks and rows belong to the projections; one scale a tensor to the fused matrix, because engines fuse it again. Raises
    CheckpointError naming `name` for a weight that is not finite.
    """
    amax = strips.amax_of(source, name) if scheme.scale == "tensor" else None
    named = zip(parts, linear.members, strict=True)
    return [strips.quantize(part, scheme, f"{name} ({member})", amax) for part, (member, _) in named]
