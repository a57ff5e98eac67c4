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


def member_pieces(source: torch.Tensor, linear: Linear, scheme: Scheme) -> list[list[torch.Tensor]]:
    """The rows of each projection of `linear`, whose fused matrix is `source`: where they are, or copied."""
    if strips.in_place(linear.fusion, scheme, source):
        return linear.fusion.runs(source)
    return [[part] for part in linear.fusion.split(source)]


def quantized_members(
    source: torch.Tensor, pieces: Sequence[Sequence[torch.Tensor]], linear: Linear, scheme: Scheme, name: str
) -> list[tuple[Fp8Weight, WeightError]]:
    """The projections of `linear`, whose fused matrix is `source` and their own rows `pieces`: quantized, and their error.

    Blocks and rows belong to the projections; one scale a tensor to the fused matrix, because engines fuse it again. Raises
    CheckpointError naming `name` for a weight that is not finite.
    """
    amax = strips.amax_of(source, name) if scheme.scale == "tensor" else None
    named = zip(pieces, linear.members, strict=True)
    return [strips.quantize(rows, scheme, f"{name} ({member})", amax) for rows, (member, _) in named]
