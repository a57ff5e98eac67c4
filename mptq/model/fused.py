"""Splits Megatron's fused matrices into logical projections and merges them back; the two are exact inverses."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Fusion:
    """Row layout of a fused matrix: `repeat` times, `widths[i]` rows of each member i in turn.

    QKV of grouped-query attention repeats (heads per group * head_dim, head_dim, head_dim) for each query group; gate and
    up are (ffn, ffn) once; a plain linear is (rows,) once. Source: megatron/core/transformer/attention.py, mlp.py.
    """

    repeat: int
    widths: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Number of rows of each member."""
        return tuple(self.repeat * width for width in self.widths)

    def aligned(self, block: int) -> bool:
        """Whether no block of `block` rows of the fused matrix spans two members; always true for a plain linear."""
        return self.plain or all(width % block == 0 for width in self.widths)

    @property
    def plain(self) -> bool:
        """Whether there is only one member."""
        return self.repeat == len(self.widths) == 1

    def split(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """Returns the members of `fused` [sum of rows, ...], each contiguous and of shape [its rows, ...]."""
        return list(self.members(fused))

    def members(self, fused: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yields the members as `split` returns them; those that are not rows in sequence are copied one at a time."""
        grouped = fused.unflatten(0, (self.repeat, sum(self.widths)))
        return (part.flatten(0, 1).contiguous() for part in grouped.split(self.widths, dim=1))

    def merge(self, members: list[torch.Tensor]) -> torch.Tensor:
        """Merges the members into the fused matrix; the inverse of `split`."""
        import torch

        grouped = [member.unflatten(0, (self.repeat, width)) for member, width in zip(members, self.widths, strict=True)]
        return torch.cat(grouped, dim=1).flatten(0, 1)
