"""Builds megatron-core's layers without Transformer Engine, apex or a GPU.

Its parts have the interface of megatron-core's own (megatron/core/post_training/modelopt/layers.py) and the parameter
names of its local layer spec, so checkpoints trained with either load.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch

from mptq.layers.attention import attention_spec
from mptq.layers.linear import Linear
from mptq.layers.norm import Norm
from mptq.layers.real_quant import RealQuantTransformerLayer
from mptq.layers.rope import ALONE, Positions
from mptq.layers.router import Router
from mptq.layers.transformer_config import transformer_config
from mptq.quiet import quiet_imports

with quiet_imports():
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.identity_op import IdentityFuncOp, IdentityOp
    from megatron.core.transformer.mlp import MLP, MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

if TYPE_CHECKING:
    from mptq.model.config import LayerKind, ModelConfig


def submodules(config: ModelConfig, index: int) -> TransformerLayerSubmodules:
    """Returns what layer `index` (from 0) of the model consists of, for a megatron-core layer spec."""
    kind = config.kinds[index]
    assert kind.mixer != "mamba", "megatron-core builds a Mamba layer only where mamba-ssm is installed"
    return TransformerLayerSubmodules(
        input_layernorm=Norm if kind.mixer else IdentityOp,
        self_attention=attention_spec(config, kind) if kind.mixer else IdentityOp,
        self_attn_bda=get_bias_dropout_add if kind.mixer else IdentityFuncOp,
        pre_mlp_layernorm=Norm if kind.ffn else IdentityOp,
        mlp=_mlp(kind),
        mlp_bda=get_bias_dropout_add if kind.ffn else IdentityFuncOp,
    )


def build_layer(config: ModelConfig, index: int) -> RealQuantTransformerLayer:
    """Builds layer `index` (from 0) of the model on the meta device: modules and shapes, no memory for weights."""
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about options that mptq does not set
        layer = RealQuantTransformerLayer(
            transformer_config(config), submodules(config, index), layer_number=index + 1, pg_collection=_single_process()
        )
    layer.eval()
    if config.kinds[index].mixer == "mla":
        layer.self_attention.rotary_pos_emb = Positions(config)
    return layer


def _mlp(kind: LayerKind) -> Callable[..., torch.nn.Module]:
    """Returns a builder for the module after the attention: an identity, an MLP, or a router with experts."""
    linears = MLPSubmodules(linear_fc1=Linear, linear_fc2=Linear)
    if kind.ffn == "mlp":
        return partial(MLP.as_mlp_submodule, submodules=linears)
    if not kind.ffn:
        return partial(IdentityOp)
    experts, shared = partial(SequentialMLP, submodules=linears), partial(SharedExpertMLP, submodules=linears)
    return partial(MoELayer, submodules=MoESubmodules(experts=experts, shared_experts=shared, router=Router))


def _single_process() -> ProcessGroupCollection:
    """Returns the process groups of a layer that is not parallel: all None except cp, a group of one."""
    groups = ProcessGroupCollection()
    names = "tp cp pp tp_cp tp_dp_cp hcp ep expt_tp tp_ep tp_ep_pp dp dp_cp expt_dp"
    for name in names.split():
        setattr(groups, name, None)
    groups.cp = ALONE
    return groups
