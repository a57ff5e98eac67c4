"""`Norm`, which builds the norms of megatron-core's configs without Transformer Engine or apex."""

from __future__ import annotations

from typing import Any

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.transformer import TransformerConfig


class Norm:
    """Builds the norm that the config selects, with the constructor arguments that megatron-core passes to norms."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_parallel: Any) -> Any:
        """Returns an RMSNorm or LayerNorm over the last dimension: torch's, or the zero-centered variant."""
        kinds = {
            ("RMSNorm", False): torch.nn.RMSNorm,
            ("LayerNorm", False): torch.nn.LayerNorm,
            ("RMSNorm", True): ZeroCenteredRMSNorm,
            ("LayerNorm", True): ZeroCenteredLayerNorm,
        }
        kind = kinds[config.normalization, config.layernorm_zero_centered_gamma]
        return kind(hidden_size, eps=eps, dtype=config.params_dtype)


class ZeroCenteredRMSNorm(torch.nn.RMSNorm):
    """RMSNorm with the weight stored minus 1 (zero-centered), computed in float32 as Transformer Engine does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., hidden] normalized."""
        out = torch.nn.functional.rms_norm(x.float(), self.normalized_shape, self.weight.float() + 1, self.eps)
        return out.to(x.dtype)


class ZeroCenteredLayerNorm(torch.nn.LayerNorm):
    """LayerNorm with the weight stored minus 1 ("LayerNorm1P"), computed in float32 as Transformer Engine does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`x` [..., hidden] normalized."""
        weight, bias = self.weight.float() + 1, self.bias.float()
        return torch.nn.functional.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
