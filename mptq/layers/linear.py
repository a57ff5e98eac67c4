"""`Linear`, a whole linear in place of megatron-core's parallel ones."""

from __future__ import annotations

from typing import Any

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.transformer import TransformerConfig


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Applies the linear `weight` [out, in] to `x` [..., in], in the dtype of `x`.

    On a CPU, products of 16-bit tensors are computed in float32 and rounded once: the same precision, and four times as
    fast as torch's 16-bit product on CPUs without instructions for it (scripts/bench_quantize.py).
    """
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class Linear(torch.nn.Linear):
    """An unsharded linear for megatron-core's parallel ones; weight [out, in]. Returns (output, bias or None)."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool = False, **parallel: Any
    ) -> None:
        self.skip_bias_add = bool(parallel.get("skip_bias_add"))
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        """Maps `x` [..., in] to [..., out]; the bias is returned separately where megatron-core fuses its addition."""
        if self.skip_bias_add:
            return project(x, self.weight), self.bias
        return project(x, self.weight, self.bias), None
