"""The attention of a layer: megatron-core's, with torch's scaled_dot_product_attention at its core."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from mptq.layers.linear import Linear
from mptq.layers.norm import Norm
from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.transformer import TransformerConfig, multi_latent_attention
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.multi_latent_attention import MLASelfAttentionSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import L2Norm
    from megatron.core.transformer.utils import is_layer_window_attention

if TYPE_CHECKING:
    from mptq.model.config import LayerKind, ModelConfig


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


def attention_spec(config: ModelConfig, kind: LayerKind) -> ModuleSpec:
    """The spec from which megatron-core builds the attention of a layer."""
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
