"""One megatron-core TransformerLayer that needs neither Transformer Engine nor apex nor a GPU.

`Linear` and `Norm` have the interface of megatron-core's own (megatron/core/post_training/modelopt/layers.py) and the
parameter names of its local layer spec, so that a checkpoint trained with either loads.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

# torch logs, at import, that a machine with a CUDA toolkit has no GPU; megatron-core warns of every optional package.
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.moe_utils import router_gating_linear
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

if TYPE_CHECKING:
    from mptq.arch.config import ModelConfig


def project(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x` [..., in] times `weight` [out, in], in the dtype of `x`.

    On a CPU the sums of 16-bit factors are made in float32 and rounded once: the same precision, and four times as fast as
    torch's 16-bit product where the CPU has no instructions for it (scripts/bench_quantize.py).
    """
    if x.device.type != "cpu" or x.dtype == torch.float32:
        return torch.nn.functional.linear(x, weight, bias)
    return torch.nn.functional.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)


class Linear(torch.nn.Linear):
    """A whole linear in place of megatron-core's parallel ones: weight [out, in], returns (output, bias or None)."""

    def __init__(
        self, input_size: int, output_size: int, *, config: TransformerConfig, bias: bool = False, **parallel: Any
    ) -> None:
        self.skip_bias_add = bool(parallel.get("skip_bias_add"))
        super().__init__(input_size, output_size, bias=bias, dtype=config.params_dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:  # type: ignore[override]
        """`x` [..., in] to [..., out]; the bias is handed back unadded where megatron-core fuses its addition."""
        if self.skip_bias_add:
            return project(x, self.weight), self.bias
        return project(x, self.weight, self.bias), None


class Norm:
    """Builds the norm that the config names; called as megatron-core calls its norms."""

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> Any:
        """A torch.nn.RMSNorm or torch.nn.LayerNorm over the last dimension."""
        kinds = {"RMSNorm": torch.nn.RMSNorm, "LayerNorm": torch.nn.LayerNorm}
        return kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)


class CoreAttention(torch.nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, for equal or grouped heads."""

    def __init__(self, config: TransformerConfig, **_parallel: Any) -> None:
        super().__init__()
        self.scale = config.softmax_scale

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kw: Any) -> torch.Tensor:
        """`query` [sequence, batch, heads, dim], `key` and `value` with as many or fewer heads, to [s, b, heads * dim]."""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class Router(TopKRouter):  # type: ignore[misc]
    """megatron-core's router, which computes where its weight is; its own moves a weight on the CPU to a GPU."""

    def gating(self, x: torch.Tensor) -> torch.Tensor:
        """Logits [sequence, batch, experts] of the hidden states `x` [sequence, batch, hidden]."""
        dtypes = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = dtypes.get(self.config.moe_router_dtype, x.dtype)
        logits: torch.Tensor = router_gating_linear(x, self.weight, self.bias, dtype)
        return logits


@cache
def transformer_config(config: ModelConfig) -> TransformerConfig:
    """megatron-core's config of the model, every fused kernel and every random number off."""
    dtype = getattr(torch, config.dtype)
    return TransformerConfig(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        ffn_hidden_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        num_query_groups=config.num_query_groups,
        kv_channels=config.head_dim,
        layernorm_epsilon=config.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        perform_initialization=False,
        use_cpu_initialization=True,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **_moe_options(config),
    )


def rotary_embedding(config: ModelConfig) -> RotaryEmbedding:
    """megatron-core's rotary embedding of the model, on the CPU."""
    return RotaryEmbedding(config.head_dim, 1.0, rotary_base=config.rotary_base, use_cpu_initialization=True)


class _Alone:
    """A process group of one, for code that asks for the default group where it is given none (rotary embedding)."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def _moe_options(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_router_topk": config.moe_topk,
        "moe_router_dtype": config.router_dtype,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",  # the others need CUDA streams; in a single process it gathers nothing
    }


def _single_process() -> ProcessGroupCollection:
    """The process groups of a layer that is not parallel: none."""
    groups = ProcessGroupCollection()
    names = "tp cp pp tp_cp tp_dp_cp hcp ep expt_tp tp_ep tp_ep_pp dp dp_cp expt_dp"
    for name in names.split():
        setattr(groups, name, None)
    groups.cp = _Alone()
    return groups


def _mlp(config: ModelConfig) -> Callable[..., torch.nn.Module]:
    """Builds what stands after the attention: an MLP, or a router and experts."""
    linears = MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear)
    if not config.num_experts:
        return partial(MLP.as_mlp_submodule, submodules=linears)
    return partial(MoELayer, submodules=MoESubmodules(experts=partial(SequentialMLP, submodules=linears), router=Router))


def build_layer(config: ModelConfig, index: int) -> TransformerLayer:
    """Layer `index` (from 0) of the model, on the meta device: shapes and modules, no memory for weights."""
    spec = TransformerLayerSubmodules(
        input_layernorm=Norm,
        self_attention=ModuleSpec(
            module=SelfAttention,
            params={"attn_mask_type": AttnMaskType.causal},
            submodules=SelfAttentionSubmodules(
                linear_qkv=Linear,
                core_attention=CoreAttention,
                linear_proj=Linear,
                q_layernorm=IdentityOp,
                k_layernorm=IdentityOp,
            ),
        ),
        self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=Norm,
        mlp=_mlp(config),
        mlp_bda=get_bias_dropout_add,
    )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of options that mptq does not set
        return TransformerLayer(
            transformer_config(config), spec, layer_number=index + 1, pg_collection=_single_process()
        ).eval()
