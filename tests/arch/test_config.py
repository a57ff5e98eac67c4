import pytest

from mptq.arch.config import FEATURES, from_args
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


@pytest.mark.parametrize("name", sorted(FEATURES))
def test_every_feature_that_is_not_quantized_is_named(name):
    with pytest.raises(UnsupportedModelError, match=rf"\({name}=surprise\)"):
        from_args(ARGS | {name: "surprise"}, "args", TENSORS)


def test_all_features_are_named_together():
    with pytest.raises(UnsupportedModelError, match=r"a mixture of experts.*QK normalization"):
        from_args(ARGS | {"num_experts": 8, "qk_layernorm": True}, "args", TENSORS)


def test_missing_arguments():
    with pytest.raises(CheckpointError, match="does not say its architecture"):
        from_args({}, "nowhere", TENSORS)
    with pytest.raises(CheckpointError, match="ffn_hidden_size"):
        from_args({key: value for key, value in ARGS.items() if key != "ffn_hidden_size"}, "args", TENSORS)
