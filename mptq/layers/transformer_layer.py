"""Builds a megatron-core TransformerLayer without Transformer Engine, apex or a GPU.

`Linear` and `Norm` have the interface of megatron-core's own (megatron/core/post_training/modelopt/layers.py) and the
parameter names of its local layer spec, so checkpoints trained with either load.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from mptq.errors import UnsupportedModelError
from mptq.layers.rope import ALONE, Positions
from mptq.model.config import YARN
from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.activations import quick_gelu, squared_relu
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig, multi_latent_attention
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.moe_utils import router_gating_linear
    from megatron.core.transformer.moe.router import TopKRouter
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import L2Norm
    from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
    from megatron.core.transformer.utils import is_layer_window_attention

if TYPE_CHECKING:
    from mptq.model.config import LayerKind, ModelConfig


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


class CoreAttention(torch.nn.Module):
    """Causal attention for multi-head, grouped-query and multi-latent attention, with sliding windows and sinks.

    Uses torch's scaled_dot_product_attention except with sinks.
    """

    def __init__(
        self, config: TransformerConfig, layer_number: int = 1, softmax_scale: float | None = None, **_parallel: Any
    ) -> None:
        super().__init__()
        self.scale = config.softmax_scale if softmax_scale is None else softmax_scale
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.window = config.window_size if windowed else None
        self.sinks = config.softmax_type != "vanilla"
        self.softmax_offset: torch.nn.Parameter | None = None
        if config.softmax_type == "learnable":
            self.softmax_offset = torch.nn.Parameter(torch.empty(config.num_attention_heads, dtype=config.params_dtype))

    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_args: Any, **_kw: Any) -> torch.Tensor:
        """Returns [s, b, heads * dim] for `query` [s, b, heads, dim] and `key` and `value` of no more heads."""
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        grouped = query.shape[1] != key.shape[1]
        if self.sinks:
            out = self._with_sinks(query, key, value)
        elif self.window is not None:
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, attn_mask=self._seen(query), scale=self.scale, enable_gqa=grouped
            )
        else:
            out = torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=self.scale, enable_gqa=grouped
            )
        return out.permute(2, 0, 1, 3).flatten(2)

    def _seen(self, query: torch.Tensor) -> torch.Tensor:
        """Returns the mask, bool [length, length]: positions attend to themselves and to earlier ones in the window."""
        length = query.shape[2]
        places = torch.arange(length, device=query.device)
        behind = places[:, None] - places
        return (behind >= 0) & (behind <= (length if self.window is None else self.window[0]))

    def _with_sinks(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attention with one more score per head in the softmax, which belongs to no key (0 for "off-by-one")."""
        repeats = query.shape[1] // key.shape[1]
        key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        scale = query.shape[-1] ** -0.5 if self.scale is None else self.scale
        scores = (query @ key.transpose(2, 3)).float() * scale
        scores = scores.masked_fill(~self._seen(query), -torch.inf)
        offset = scores.new_zeros(query.shape[1]) if self.softmax_offset is None else self.softmax_offset.float()
        sinks = offset[None, :, None, None].expand(*scores.shape[:3], 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]
        return weights.to(value.dtype) @ value


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


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": partial(torch.nn.functional.gelu, approximate="tanh"),
    "relu": torch.nn.functional.relu,
    "squared_relu": squared_relu,
    "quick_gelu": quick_gelu,
}
"""Values of the setting `activation_func`."""
_PLAIN = (
    "normalization",
    "layernorm_zero_centered_gamma",
    "gated_linear_unit",
    "add_bias_linear",
    "add_qkv_bias",
    "qk_layernorm",
    "qk_l2_norm",
    "rotary_interleaved",
    "no_rope_freq",
    "window_size",
    "window_attn_skip_freq",
    "softmax_type",
    "softmax_scale",
    "apply_query_key_layer_scaling",
    "glu_linear_offset",
    "activation_func_clamp_value",
    "moe_router_topk",
    "moe_router_dtype",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_num_groups",
    "moe_router_group_topk",
    "moe_router_topk_scaling_factor",
    "moe_router_enable_expert_bias",
    "moe_shared_expert_gate",
)
"""Settings that are passed to megatron-core unchanged: those that affect the output of a layer."""
_LATENT = ("rope_type", "rotary_base", "rotary_percent", *(name for name in YARN if name != "correction_range_round_to_int"))
"""The same for multi-latent attention, which computes its own rotary embedding."""


@cache
def transformer_config(config: ModelConfig) -> TransformerConfig:
    """Returns megatron-core's config of the model, without fused kernels, dropout or random initialization.

    Raises UnsupportedModelError, with megatron-core's message, for a combination of settings that it rejects.
    """
    try:
        return _transformer_config(config)
    except (ValueError, AssertionError) as error:  # what TransformerConfig.__post_init__ raises
        reason = " ".join(str(error).split()) or "unsupported combination of settings"
        raise UnsupportedModelError(f"megatron-core cannot build this model: {reason}") from error


def _transformer_config(config: ModelConfig) -> TransformerConfig:
    dtype = getattr(torch, config.dtype)
    fields = {key: config.get(key) for key in _PLAIN if config.get(key) is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about options that mptq does not set
        made = (MLATransformerConfig if config.latent else TransformerConfig)(
            num_layers=config.num_layers,
            hidden_size=config.hidden_size,
            ffn_hidden_size=config.ffn_hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_query_groups=config.num_query_groups,
            kv_channels=config.head_dim,
            layernorm_epsilon=config.norm_epsilon,
            activation_func=ACTIVATIONS[config.get("activation_func")],
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
            transformer_impl="local",
            **fields,
            **_latent_options(config),
            **_moe_options(config),
        )
    if config.yarn and not config.latent:
        for name, value in config.yarn.items():
            setattr(made, f"yarn_{name}", value)  # read by megatron-core's attention, but not fields
    return made


def _latent_options(config: ModelConfig) -> dict[str, Any]:
    if config.latent is None:
        return {}
    sizes = config.latent
    return {key: config.get(key) for key in _LATENT} | {
        "multi_latent_attention": True,
        "q_lora_rank": sizes.q_rank or None,
        "kv_lora_rank": sizes.kv_rank,
        "qk_head_dim": sizes.qk_dim,
        "qk_pos_emb_head_dim": sizes.rotary_dim,
        "v_head_dim": sizes.v_dim,
    }


def _moe_options(config: ModelConfig) -> dict[str, Any]:
    if not config.num_experts:
        return {}
    return {
        "num_moe_experts": config.num_experts,
        "moe_ffn_hidden_size": config.moe_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": config.shared_ffn_hidden_size or None,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",  # others need CUDA streams; one process gathers nothing
    }


def _single_process() -> ProcessGroupCollection:
    """Returns the process groups of a layer that is not parallel: all None except cp, a group of one."""
    groups = ProcessGroupCollection()
    names = "tp cp pp tp_cp tp_dp_cp hcp ep expt_tp tp_ep tp_ep_pp dp dp_cp expt_dp"
    for name in names.split():
        setattr(groups, name, None)
    groups.cp = ALONE
    return groups


def _mlp(kind: LayerKind) -> Callable[..., torch.nn.Module]:
    """Returns a builder for the module after the attention: an identity, an MLP, or a router with experts."""
    linears = MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear)
    if kind.ffn == "mlp":
        return partial(MLP.as_mlp_submodule, submodules=linears)
    if not kind.ffn:
        return partial(IdentityOp)
    experts, shared = partial(SequentialMLP, submodules=linears), partial(SharedExpertMLP, submodules=linears)
    return partial(MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared, router=Router))


def _latent_attention() -> Any:
    """Returns megatron-core's MLASelfAttention, able to build with `Linear` and without a GPU.

    Its constructor accepts only the linears that its module imports by name for the down projections, and creates its
    rotary embedding on a GPU (`Positions` replaces it afterwards). So a second instance of the module is loaded, and
    these names are replaced in it; the module that the rest of the process imports is not changed.
    """
    spec = multi_latent_attention.__spec__
    assert spec is not None
    assert spec.loader is not None
    copy: Any = importlib.util.module_from_spec(spec)
    with quiet_imports():
        spec.loader.exec_module(copy)
    copy.Linear = Linear
    copy.RotaryEmbedding = copy.YarnRotaryEmbedding = lambda *_args, **_parallel: None
    return copy.MLASelfAttention


class LatentAttention(_latent_attention()):  # type: ignore[misc]
    """megatron-core's multi-latent attention with the linears and norms of the given submodules.

    The original chooses between Transformer Engine's fused ones (mla_qk_norm_config.py).
    """

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def _attention(config: ModelConfig, kind: LayerKind) -> ModuleSpec:
    norm = Norm if config.get("qk_layernorm") else IdentityOp
    params = {"attn_mask_type": AttnMaskType.causal}
    if kind.mixer == "mla":
        latent = MLASelfAttentionSubmodules(
            linear_q_proj=Linear,
            linear_q_down_proj=Linear,
            linear_q_up_proj=Linear,
            linear_kv_down_proj=Linear,
            linear_kv_up_proj=Linear,
            core_attention=CoreAttention,
            linear_proj=Linear,
            q_layernorm=norm,
            kv_layernorm=norm,
        )
        return ModuleSpec(module=LatentAttention, params=params, submodules=latent)
    norm = L2Norm if config.get("qk_l2_norm") else norm
    plain = SelfAttentionSubmodules(
        linear_qkv=Linear, core_attention=CoreAttention, linear_proj=Linear, q_layernorm=norm, k_layernorm=norm
    )
    return ModuleSpec(module=SelfAttention, params=params, submodules=plain)


def build_layer(config: ModelConfig, index: int) -> TransformerLayer:
    """Builds layer `index` (from 0) of the model on the meta device: modules and shapes, no memory for weights."""
    kind = config.kinds[index]
    assert kind.mixer != "mamba", "megatron-core builds a Mamba layer only where mamba-ssm is installed"
    spec = TransformerLayerSubmodules(
        input_layernorm=Norm if kind.mixer else IdentityOp,
        self_attention=_attention(config, kind) if kind.mixer else IdentityOp,
        self_attn_bda=get_bias_dropout_add if kind.mixer else IdentityFuncOp,
        pre_mlp_layernorm=Norm if kind.ffn else IdentityOp,
        mlp=_mlp(kind),
        mlp_bda=get_bias_dropout_add if kind.ffn else IdentityFuncOp,
    )
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about options that mptq does not set
        layer = TransformerLayer(
            transformer_config(config), spec, layer_number=index + 1, pg_collection=_single_process()
        ).eval()
    if kind.mixer == "mla":
        layer.self_attention.rotary_pos_emb = Positions(config)
    return layer
