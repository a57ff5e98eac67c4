"""Split Megatron's fused matrices into logical projections and merge them back: pure, exact inverses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Fusion:
    """How the rows of a fused matrix belong to its members: `repeat` times, `widths[i]` rows of member i.

    QKV of grouped-query attention repeats (heads per group * head_dim, head_dim, head_dim) for each query group; gate and
    up are (ffn, ffn) once; a plain linear is (rows,) once. Source: megatron/core/transformer/attention.py, mlp.py.
    """

    repeat: int
    widths: tuple[int, ...]

    @property
    def rows(self) -> tuple[int, ...]:
        """Rows of each member."""
        return tuple(self.repeat * width for width in self.widths)

    def aligned(self, block: int) -> bool:
        """Whether blocks of `block` rows of the fused matrix never cross from one member into another.

        A plain linear has nothing to cross, whatever its size.
        """
        return self.plain or all(width % block == 0 for width in self.widths)

    @property
    def plain(self) -> bool:
        """One member only."""
        return self.repeat == len(self.widths) == 1

    def coarsen(self, block: int) -> Fusion:
        """The fusion of the grid of block scales, of a matrix that is `aligned` to `block` rows."""
        assert self.aligned(block)
        return Fusion(self.repeat, tuple(-(-width // block) for width in self.widths))

    def runs(self, fused: torch.Tensor) -> list[list[torch.Tensor]]:
        """The rows of each member where they are in `fused`: views, which one above the other are the member."""
        rows = fused.split(self.widths * self.repeat)
        return [list(rows[member :: len(self.widths)]) for member in range(len(self.widths))]

    def split(self, fused: torch.Tensor) -> list[torch.Tensor]:
        """The members of `fused` [sum of rows, ...], each [its rows, ...], contiguous."""
        if self.plain:
            return [fused.contiguous()]
        grouped = fused.unflatten(0, (self.repeat, sum(self.widths)))
        return [part.flatten(0, 1).contiguous() for part in grouped.split(self.widths, dim=1)]

    def merge(self, members: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `split`."""
        import torch

        grouped = [member.unflatten(0, (self.repeat, width)) for member, width in zip(members, self.widths, strict=True)]
        return torch.cat(grouped, dim=1).flatten(0, 1)
