"""`Router`, megatron-core's router without a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.moe.moe_utils import router_gating_linear
    from megatron.core.transformer.moe.router import TopKRouter


class Router(TopKRouter):  # type: ignore[misc]
    """megatron-core's router, computing on the device of its weight; the original moves a CPU weight to a GPU."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        # megatron-core creates the expert biases on a GPU.
        super().__init__(replace(config, moe_router_enable_expert_bias=False), *args, **kwargs)
        self.config = config
        self.enable_expert_bias = config.moe_router_enable_expert_bias
        if self.enable_expert_bias:
            del self.expert_bias, self.local_tokens_per_expert
            self.register_buffer("local_tokens_per_expert", torch.zeros(config.num_moe_experts), persistent=False)
            self.register_buffer("expert_bias", torch.zeros(config.num_moe_experts))

    def gating(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the logits [sequence, batch, experts] of hidden states `x` [sequence, batch, hidden]."""
        dtypes = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = dtypes.get(self.config.moe_router_dtype, x.dtype)
        logits: torch.Tensor = router_gating_linear(x, self.weight, self.bias, dtype)
        return logits
