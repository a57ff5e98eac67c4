"""What is known of the inputs of a linear: their second moments, and a sample of them that is withheld."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Sample:
    """Weighted inputs of a linear, float32 [tokens, in], as they are in the quantized stream.

    `shift` [tokens, in] are those of the reference minus these, and `residual` [tokens, out] is the same of the residual
    stream to which the outputs are added; None where only one stream is known.
    """

    rows: torch.Tensor
    shift: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    @property
    def parts(self) -> list[torch.Tensor]:
        """The tensors that there are, in order: those that are None come last."""
        return [part for part in (self.rows, self.shift, self.residual) if part is not None]


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over the `tokens` that codes are fitted to, float32, and a `withheld` sample of others.

    With inputs x of the quantized stream and x0 of the reference, weighted by token: `fitted` [in, in] is the sum of
    x x', `shift` [in, in] that of (x0 - x) x', and `residual` [out, in] that of (h0 - h) x', where h is the residual
    stream that the outputs are added to. The last two are None where only one stream is known. `withheld` is a sample of
    the same tokens if there is a single batch.
    """

    fitted: torch.Tensor
    tokens: int
    withheld: Sample
    shift: torch.Tensor | None = None
    residual: torch.Tensor | None = None
