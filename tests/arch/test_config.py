import pytest

from mptq.arch.config import FEATURES, MOE_FEATURES, from_args
from mptq.errors import CheckpointError, UnsupportedModelError
from mptq.types import TensorSpec

ARGS = {
    "num_layers": 2,
    "hidden_size": 64,
    "ffn_hidden_size": 96,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "group_query_attention": True,
    "kv_channels": 16,
    "vocab_size": 100,
    "padded_vocab_size": 128,
    "norm_epsilon": 1e-5,
    "rotary_base": 5000,
    "max_position_embeddings": 512,
    "normalization": "RMSNorm",
    "swiglu": True,
    "position_embedding_type": "rope",
    "add_bias_linear": False,
    "untie_embeddings_and_output_weights": True,
    "tokenizer_model": "/x/tok",
}
MOE_ARGS = ARGS | {"num_experts": 8, "moe_router_topk": 2, "moe_ffn_hidden_size": 48, "moe_router_dtype": "fp32"}
EMBEDDING = {"m": TensorSpec("embedding.word_embeddings.weight", "bfloat16", (128, 64))}
TENSORS = {spec.name: spec for spec in EMBEDDING.values()}


def test_reads_a_llama():
    config = from_args(ARGS, "args in common.pt", TENSORS)
    assert (config.num_query_groups, config.head_dim, config.vocab_size, config.padded_vocab_size) == (2, 16, 100, 128)
    assert (config.norm_epsilon, config.rotary_base, config.tied_embeddings) == (1e-5, 5000.0, False)
    assert (config.dtype, config.source, config.tokenizer) == ("bfloat16", "args in common.pt", "/x/tok")


def test_without_grouped_query_attention_the_group_count_means_nothing():
    args = ARGS | {"group_query_attention": False, "num_query_groups": 1}
    assert from_args(args, "args", TENSORS).num_query_groups == 4


def test_newer_name_of_epsilon_and_missing_head_dim():
    args = {key: value for key, value in ARGS.items() if key not in ("norm_epsilon", "kv_channels")}
    config = from_args(args | {"layernorm_epsilon": 1e-6}, "args", TENSORS)
    assert (config.norm_epsilon, config.head_dim) == (1e-6, 16)


def test_unknown_vocabulary_keeps_the_padding():
    assert from_args(ARGS | {"vocab_size": None}, "args", TENSORS).vocab_size == 128


def test_the_optimizers_copy_of_the_embedding_says_nothing():
    name = "optimizer.state.exp_avg.embedding.word_embeddings.weight"
    config = from_args(ARGS, "args", {name: TensorSpec(name, "float32", (128 * 64,))} | TENSORS)
    assert (config.dtype, config.padded_vocab_size) == ("bfloat16", 128)


def test_reads_a_mixture_of_experts():
    config = from_args(MOE_ARGS, "args", TENSORS)
    assert (config.num_experts, config.moe_topk, config.moe_ffn_hidden_size, config.router_dtype) == (8, 2, 48, "fp32")
    assert config.family.architecture == "MixtralForCausalLM"
    without = {key: value for key, value in MOE_ARGS.items() if key not in ("moe_ffn_hidden_size", "moe_router_dtype")}
    config = from_args(without, "args", TENSORS)
    assert (config.moe_ffn_hidden_size, config.router_dtype) == (96, None)


def test_a_dense_model_has_no_experts_whatever_their_arguments():
    config = from_args(MOE_ARGS | {"num_experts": None, "moe_router_pre_softmax": True}, "args", TENSORS)
    assert (config.num_experts, config.moe_topk, config.moe_ffn_hidden_size, config.router_dtype) == (0, 0, 0, None)
    assert config.family.architecture == "LlamaForCausalLM"


@pytest.mark.parametrize(
    "fields",
    [
        {"moe_layer_freq": [1, 1]},
        {"moe_router_load_balancing_type": ["seq_aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.1, 0.1]},
        {"moe_expert_capacity_factor": -1.0},
        {"moe_input_jitter_eps": 0.01, "moe_z_loss_coeff": 0.001, "moe_token_dispatcher_type": "alltoall"},
        {"moe_grouped_gemm": True, "moe_router_fusion": True, "moe_permute_fusion": True},
    ],
)
def test_what_changes_nothing_of_the_forward_pass_is_accepted(fields):
    assert from_args(MOE_ARGS | fields, "args", TENSORS).num_experts == 8


@pytest.mark.parametrize(
    ("name", "value", "meaning"),
    [
        ("moe_layer_freq", [0, 1], "dense layers between those with experts"),
        ("moe_layer_freq", 2, "dense layers"),
        ("moe_shared_expert_intermediate_size", 96, "shared experts"),
        ("moe_router_pre_softmax", True, "a softmax over all experts"),
        ("moe_router_score_function", "sigmoid", "a router score other than softmax"),
        ("moe_router_load_balancing_type", "sinkhorn", "load balancing"),
        ("moe_router_topk", 1, "fewer than two experts"),
        ("moe_router_topk", None, "fewer than two experts"),
        ("moe_expert_capacity_factor", 1.0, "a capacity limit"),
        ("moe_router_enable_expert_bias", True, "a bias of each expert"),
        ("moe_router_num_groups", 4, "group-limited routing"),
        ("moe_latent_size", 32, "latent projections"),
    ],
)
def test_other_mixtures_are_refused_by_name(name, value, meaning):
    with pytest.raises(UnsupportedModelError, match=meaning):
        from_args(MOE_ARGS | {name: value}, "args", TENSORS)


@pytest.mark.parametrize("name", sorted(FEATURES | MOE_FEATURES))
def test_every_feature_that_is_not_quantized_is_named(name):
    with pytest.raises(UnsupportedModelError, match=rf"\({name}=surprise\)"):
        from_args(MOE_ARGS | {name: "surprise"}, "args", TENSORS)


def test_all_features_are_named_together():
    with pytest.raises(UnsupportedModelError, match=r"QK normalization.*shared experts"):
        from_args(MOE_ARGS | {"moe_shared_expert_intermediate_size": 96, "qk_layernorm": True}, "args", TENSORS)


def test_missing_arguments():
    with pytest.raises(CheckpointError, match="does not say its architecture"):
        from_args({}, "nowhere", TENSORS)
    with pytest.raises(CheckpointError, match="ffn_hidden_size"):
        from_args({key: value for key, value in ARGS.items() if key != "ffn_hidden_size"}, "args", TENSORS)
