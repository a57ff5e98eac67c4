"""Building the models of tests/support/zoo.py with megatron-core: its local layers, adapted to the CPU.

Imports nothing of mptq, and nothing of megatron-core before build_zoo.py has replaced the CUDA calls.
"""

from __future__ import annotations

import torch


class CenteredNorm(torch.nn.Module):
    """Transformer Engine's norms with zero_centered_gamma, which megatron-core's local ones refuse."""

    def __init__(self, config, hidden_size, eps=1e-5):
        super().__init__()
        self.rms, self.eps = config.normalization == "RMSNorm", eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size))
        if not self.rms:
            self.bias = torch.nn.Parameter(torch.empty(hidden_size))

    def forward(self, x):
        if self.rms:
            return torch.nn.functional.rms_norm(x, self.weight.shape, 1 + self.weight, self.eps)
        return torch.nn.functional.layer_norm(x, self.weight.shape, 1 + self.weight, self.bias, self.eps)


def float_config(args, row):
    """megatron-core's config from the arguments, in float32."""
    import megatron.core.activations
    from megatron.training.arguments import core_transformer_config_from_args

    config = core_transformer_config_from_args(args)
    config.bf16, config.params_dtype = False, torch.float32
    if row.activation:
        config.activation_func = getattr(megatron.core.activations, row.activation)
        config.gated_linear_unit = True
    return config


def attention_class():
    """megatron-core's local core attention, which supports latent attention once the width of its values is set."""
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    class Attention(DotProductAttention):
        def __init__(self, config, *args, k_channels=None, v_channels=None, **kwargs):
            super().__init__(config, *args, **kwargs)
            self.hidden_size_per_partition = self.num_attention_heads_per_partition * config.v_head_dim

    return Attention


def plain_queries():
    """Latent attention whose queries are projected directly from the hidden states, as in DeepSeek-V2-Lite.

    megatron-core 0.17 builds it this way. 0.19.2 requires a separate norm in front of that projection wherever the latent of
    keys and values has one (transformer/mla_qk_norm_config.py), as a tensor `linear_q_proj.layer_norm_weight` that does not
    exist in DeepSeek-V2; its local layers cannot build it.
    """
    from megatron.core.tensor_parallel import ColumnParallelLinear
    from megatron.core.transformer.multi_latent_attention import MLASelfAttention

    class Attention(MLASelfAttention):
        def _resolve_qk_norm_config(self, submodules):
            return {
                "linear_q_proj": ColumnParallelLinear,
                "linear_kv_up_proj": ColumnParallelLinear,
                "kv_layernorm": submodules.kv_layernorm,
            }

    return Attention


def layer_specs(config):
    """Specs of this rank's layers: megatron-core's local ones, adapted to the CPU."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
    from megatron.core.transformer.identity_op import IdentityOp

    block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, normalization=config.normalization)
    if config.multi_latent_attention:
        for spec in block.layer_specs:
            attention = spec.submodules.self_attention.submodules
            attention.core_attention = attention_class()
            if config.q_lora_rank is None:
                attention.q_layernorm = IdentityOp
                spec.submodules.self_attention.module = plain_queries()
    if config.layernorm_zero_centered_gamma:
        block.layer_norm = CenteredNorm
        for spec in block.layer_specs:
            attention = spec.submodules.self_attention.submodules
            spec.submodules.input_layernorm = spec.submodules.pre_mlp_layernorm = CenteredNorm
            if attention.q_layernorm is not IdentityOp:
                attention.q_layernorm = attention.k_layernorm = CenteredNorm
    return block


def build(args, row):
    """This rank's part of the model in float32, with uninitialized weights."""
    config = float_config(args, row)
    model = (build_hybrid if args.hybrid_layer_pattern else build_gpt)(config, args)
    if row.embedding_scale != 1 and model.pre_process:
        model.embedding.register_forward_hook(lambda _module, _inputs, out: out * row.embedding_scale)
    return model.float().eval()


def common(args):
    """The arguments that all models of megatron-core take."""
    from megatron.core import parallel_state

    return {
        "vocab_size": args.padded_vocab_size,
        "max_sequence_length": args.max_position_embeddings,
        "pre_process": parallel_state.is_pipeline_first_stage(),
        "post_process": parallel_state.is_pipeline_last_stage(),
        "parallel_output": True,
        "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
        "position_embedding_type": args.position_embedding_type,
        "rotary_percent": args.rotary_percent,
        "rotary_base": args.rotary_base,
    }


def build_gpt(config, args):
    """A GPTModel, built as in Megatron's training."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_mtp_block_spec

    specs = layer_specs(config)
    return GPTModel(
        config=config,
        transformer_layer_spec=specs,
        mtp_block_spec=get_gpt_mtp_block_spec(config, specs, False) if args.mtp_num_layers else None,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        **common(args),
    )


def build_hybrid(config, args):
    """A HybridModel: attention, Mamba, MLPs and experts, one per layer, as the pattern specifies."""
    from megatron.core.models.hybrid import hybrid_block
    from megatron.core.models.hybrid.hybrid_model import HybridModel
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from tests.support.zoo_mamba import stack_spec

    hybrid_block.TENorm = WrappedTorchNorm  # the last norm is not part of the spec
    config.use_mamba_mem_eff_path = False
    pattern = args.hybrid_layer_pattern
    return HybridModel(config=config, hybrid_stack_spec=stack_spec(), hybrid_layer_pattern=pattern, **common(args))
