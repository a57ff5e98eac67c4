"""Hybrid models without a GPU: a local spec of their layers, and the parts of mamba-ssm that megatron-core imports.

Installing mamba-ssm requires CUDA. Its replacement computes the same in torch, one token after another.
"""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from types import ModuleType

import torch


class RMSNormGated(torch.nn.Module):
    """RMSNorm of groups of channels of `x` times silu of `z`, like that of mamba_ssm.ops.triton.layernorm_gated."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        assert not norm_before_gate
        self.eps, self.group_size = eps, group_size or hidden_size
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, device=device, dtype=dtype))

    def forward(self, x, z):
        groups = (x * torch.nn.functional.silu(z)).unflatten(-1, (-1, self.group_size))
        return torch.nn.functional.rms_norm(groups, (self.group_size,), eps=self.eps).flatten(-2) * self.weight


def mamba_chunk_scan_combined(x, dt, a, b, c, _chunk_size, D=None, dt_bias=None, dt_softplus=False, **others):  # noqa: N803
    """Run the selective scan of Mamba 2: `x` [batch, length, heads, dim], `dt` [batch, length, heads], `a` [heads], `b` and `c`
    [batch, length, groups, state], to the shape of `x`."""
    assert dt_softplus
    assert not any(value is not None and value is not False for value in others.values()), others
    heads = x.shape[2]
    dt = torch.nn.functional.softplus(dt + dt_bias)
    b, c = (part.repeat_interleave(heads // part.shape[2], dim=2) for part in (b, c))
    state = x.new_zeros(x.shape[0], heads, x.shape[3], b.shape[3])
    out = []
    for step in range(x.shape[1]):
        decay = (dt[:, step] * a).exp()[..., None, None]
        state = state * decay + torch.einsum("zh,zhp,zhn->zhpn", dt[:, step], x[:, step], b[:, step])
        out.append(torch.einsum("zhpn,zhn->zhp", state, c[:, step]))
    return torch.stack(out, dim=1) + D[:, None] * x


def mamba_split_conv1d_scan_combined(*_args, **_kwargs):
    """The fused function for training, which is not called if `use_mamba_mem_eff_path` is off."""
    raise NotImplementedError


@contextlib.contextmanager
def installed():
    """Inside, megatron-core imports this module's replacements as mamba-ssm: what it finds at its own import is what it has."""
    contents = {
        "layernorm_gated": {"RMSNorm": RMSNormGated},
        "ssd_combined": {
            "mamba_chunk_scan_combined": mamba_chunk_scan_combined,
            "mamba_split_conv1d_scan_combined": mamba_split_conv1d_scan_combined,
        },
    }
    modules = {name: ModuleType(name) for name in ("mamba_ssm", "mamba_ssm.ops", "mamba_ssm.ops.triton")}
    for name, members in contents.items():
        module = modules[f"mamba_ssm.ops.triton.{name}"] = ModuleType(f"mamba_ssm.ops.triton.{name}")
        vars(module).update(members)
    sys.modules.update(modules)
    yield
    for name in modules:
        del sys.modules[name]


def stack_spec():
    """megatron-core's spec of hybrid layers (models/hybrid/hybrid_layer_specs.py) with local linears and norms.

    As there, the norms are saved under the names of Transformer Engine's layers.
    """
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
    from megatron.core.ssm.mamba_mixer import MambaMixer, MambaMixerSubmodules
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.dot_product_attention import DotProductAttention
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.identity_op import IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import MoETransformerLayer, TransformerLayer, TransformerLayerSubmodules

    mixer = ModuleSpec(
        module=MambaMixer, submodules=MambaMixerSubmodules(in_proj=ColumnParallelLinear, out_proj=RowParallelLinear)
    )
    attention = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=DotProductAttention,
        linear_proj=RowParallelLinear,
        q_layernorm=IdentityOp,
        k_layernorm=IdentityOp,
    )
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    layers = {
        "mamba_layer": (
            MambaLayer,
            MambaLayerSubmodules(
                norm=WrappedTorchNorm,
                mixer=mixer,
                mamba_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"norm.": "mixer.in_proj.layer_norm_"},
            ),
        ),
        "attention_layer": (
            TransformerLayer,
            TransformerLayerSubmodules(
                input_layernorm=WrappedTorchNorm,
                self_attention=ModuleSpec(
                    module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
                ),
                self_attn_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"input_layernorm.": "self_attention.linear_qkv.layer_norm_"},
            ),
        ),
        "mlp_layer": (
            MLPLayer,
            TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=partial(MLP.as_mlp_submodule, submodules=linears),
                mlp_bda=get_bias_dropout_add,
                sharded_state_dict_keys_map={"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"},
            ),
        ),
        "moe_layer": (
            MoETransformerLayer,
            TransformerLayerSubmodules(
                pre_mlp_layernorm=WrappedTorchNorm,
                mlp=get_moe_module_spec(use_te=False, num_experts=8, moe_grouped_gemm=False),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
    }
    specs = {name: ModuleSpec(module=module, submodules=parts) for name, (module, parts) in layers.items()}
    return ModuleSpec(module=HybridStack, submodules=HybridStackSubmodules(**specs))
