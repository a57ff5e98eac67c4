import itertools
import re

import pytest

from mptq.errors import CheckpointError, UnsupportedModelError
from mptq.model.build import model_config
from mptq.model.config import Context, LayerKind, MLAConfig
from mptq.model.settings.from_megatron_args import from_args
from mptq.model.settings.settings import KINDS, OPTIONS, SettingsSource, merge
from mptq.types import TensorSpec
from tests.support.models import ARGS, FAMILY_ARGS, HYBRID, LATENT, MOE_ARGS, TENSORS, model

ATTENTION_MLP, ATTENTION_MOE = LayerKind("attention", "mlp"), LayerKind("attention", "moe")


def without(args, *names):
    return {key: value for key, value in args.items() if key not in names}


def test_reads_a_llama():
    config = model(ARGS)
    assert (config.num_query_groups, config.head_dim, config.vocab_size, config.padded_vocab_size) == (2, 16, 100, 128)
    assert (config.norm_epsilon, config.get("rotary_base"), config.tied_embeddings) == (1e-5, 5000, False)
    assert (config.dtype, config.source("rotary_base"), config.tokenizer) == ("bfloat16", "args", "/x/tok")
    assert (config.gated, config.bias, config.latent) == (True, False, None)
    assert config.kinds == (ATTENTION_MLP,) * 2


def test_a_missing_setting_has_megatron_cores_default():
    config = model(without(ARGS, "rotary_base"))
    assert (config.get("rotary_base"), config.source("rotary_base")) == (10000, "megatron-core's default")
    assert config.get("window_size") is None


def test_without_grouped_query_attention_the_group_count_is_ignored():
    args = ARGS | {"group_query_attention": False, "num_query_groups": 1}
    assert model(args).num_query_groups == 4


def test_newer_name_of_epsilon_and_missing_sizes():
    args = without(ARGS, "norm_epsilon", "kv_channels", "ffn_hidden_size")
    config = model(args | {"layernorm_epsilon": 1e-6})
    assert (config.norm_epsilon, config.head_dim, config.ffn_hidden_size) == (1e-6, 16, 256)


def test_unknown_vocabulary_keeps_the_padding():
    assert model(ARGS | {"vocab_size": None}).vocab_size == 128


def test_the_optimizers_copy_of_the_embedding_is_ignored():
    name = "optimizer.state.exp_avg.embedding.word_embeddings.weight"
    config = model(ARGS, {name: TensorSpec(name, "float32", (128 * 64,))} | TENSORS)
    assert (config.dtype, config.padded_vocab_size) == ("bfloat16", 128)


def test_reads_a_mixture_of_experts():
    config = model(MOE_ARGS)
    assert (config.num_experts, config.moe_topk, config.moe_ffn_hidden_size) == (8, 2, 48)
    assert (config.get("moe_router_dtype"), config.shared_ffn_hidden_size) == ("fp32", 0)
    assert config.kinds == (ATTENTION_MOE,) * 2
    config = model(without(MOE_ARGS, "moe_ffn_hidden_size", "moe_router_dtype", "moe_router_topk"))
    assert (config.moe_ffn_hidden_size, config.get("moe_router_dtype"), config.moe_topk) == (96, None, 2)


def test_a_dense_model_has_no_experts_whatever_the_arguments():
    config = model(MOE_ARGS | {"num_experts": None, "moe_router_pre_softmax": True, "moe_layer_freq": [0, 1]})
    assert (config.num_experts, config.moe_topk, config.moe_ffn_hidden_size) == (0, 0, 0)
    assert config.kinds == (ATTENTION_MLP,) * 2
    assert "router" not in config.features


@pytest.mark.parametrize(
    ("frequency", "sparse"),
    [(1, [1, 1, 1, 1, 1]), (2, [1, 0, 1, 0, 1]), (3, [1, 0, 0, 1, 0]), ([0, 1, 1, 0, 1], [0, 1, 1, 0, 1]), (None, [1] * 5)],
)
def test_which_layers_have_experts(frequency, sparse):
    """A number N means the first of every N layers, as in megatron-core's gpt_layer_specs.py."""
    config = model(MOE_ARGS | {"num_layers": 5, "moe_layer_freq": frequency})
    assert [kind.ffn == "moe" for kind in config.kinds] == list(map(bool, sparse))
    assert {kind.mixer for kind in config.kinds} == {"attention"}


def test_reads_multi_latent_attention():
    assert model(LATENT).latent == MLAConfig(q_rank=0, kv_rank=32, qk_dim=16, rotary_dim=8, v_dim=16)
    assert model(LATENT | {"q_lora_rank": 24}).latent.q_rank == 24
    assert model(LATENT).kinds == (LayerKind("mla", "mlp"),) * 2


@pytest.mark.parametrize("pattern", ["M*-ME", "M|*-|ME", "M*-ME/*E"])
def test_reads_the_layers_of_a_hybrid_model(pattern):
    """Bars separate pipeline stages, and prediction layers follow the slash."""
    kinds = model(HYBRID | {"hybrid_layer_pattern": pattern}).kinds
    assert kinds == (
        LayerKind("mamba", ""),
        LayerKind("attention", ""),
        LayerKind("", "mlp"),
        LayerKind("mamba", ""),
        LayerKind("", "moe"),
    )


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
def test_settings_that_do_not_affect_the_forward_pass_are_accepted(fields):
    config = model(MOE_ARGS | fields)
    assert (config.num_experts, config.not_run) == (8, [])
    assert dict(config.features) == dict(model(MOE_ARGS).features)


def test_all_unsupported_features_are_named_together():
    with pytest.raises(UnsupportedModelError, match=r"an attention output gate .*; latent projections around the experts"):
        model(MOE_ARGS | {"moe_latent_size": 96, "attention_output_gate": True})


BRIDGE = {key: value for key, value in ARGS.items() if key != "max_position_embeddings"} | {"seq_length": 4096}
LONG = {"rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 32768, "position_embedding_type": "yarn"}
MLA = LATENT | {"seq_length": 4096, "original_max_position_embeddings": 4096}


@pytest.mark.parametrize(
    ("args", "more", "context"),
    [
        (ARGS, {}, (512, "settings")),
        (ARGS | {"seq_length": 256}, {"model_max_length": 131072}, (512, "settings")),
        (BRIDGE, {}, (4096, "training")),
        (BRIDGE, {"model_max_length": 131072}, (131072, "tokenizer")),
        (BRIDGE, {"model_max_length": 1024}, (4096, "training")),
        (BRIDGE | LONG, {}, (131072, "yarn")),
        (ARGS | LONG, {"model_max_length": 1 << 20}, (131072, "yarn")),
        (ARGS | LONG | {"rotary_scaling_factor": 1.0}, {}, (512, "settings")),
        (MLA, {}, (163840, "yarn")),
        (MLA | {"rotary_scaling_factor": 1.0}, {}, (512, "settings")),
        (MLA | {"rope_type": "rope"}, {}, (512, "settings")),
    ],
)
def test_the_number_of_positions_and_its_source(args, more, context):
    config = model(args, **more)
    assert (config.context.length, config.context.known_from) == context
    assert config.max_position_embeddings == context[0]


def test_the_users_number_of_positions_takes_precedence_over_yarn():
    rungs = [
        SettingsSource(OPTIONS, {"max_position_embeddings": 8192}, overrides=True),
        SettingsSource("args", from_args(ARGS | LONG)),
    ]
    assert model_config(merge(rungs), TENSORS).context == Context(8192, "settings")


def test_missing_arguments():
    with pytest.raises(CheckpointError, match="does not specify its architecture"):
        model({})
    with pytest.raises(CheckpointError, match="no usable value for 'num_attention_heads'"):
        model(without(ARGS, "num_attention_heads"))
    with pytest.raises(CheckpointError, match="no usable value for 'max_position_embeddings'"):
        model(without(ARGS, "max_position_embeddings"))
    with pytest.raises(CheckpointError, match="no usable value for 'v_head_dim'"):
        model(without(LATENT, "v_head_dim"))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"moe_layer_freq": [0, 1, 1]}, "moe_layer_freq.* 3 entries for 2 layers"),
        ({"hybrid_layer_pattern": "M*-"}, r"hybrid_layer_pattern \('M\*-' for 2 layers"),
        ({"hybrid_layer_pattern": "MX"}, r"hybrid_layer_pattern \('MX' for 2 layers of M, \*, \+, -, E\)"),
        ({"hybrid_layer_pattern": "M" * 9000}, r"hybrid_layer_pattern \('M{50,60}\.\.\. for 2 layers"),
        ({"window_size": [9] * 9000}, r"window_size is \[9, [9, ]{40,60}\.\.\. \(from args\), but must be"),
        ({"num_attention_heads": 0, "kv_channels": None}, "num_attention_heads is 0 .* correct it with --config"),
        ({"hidden_size": "wide"}, "'wide'"),
    ],
)
def test_unusable_values_are_named(fields, message):
    with pytest.raises(CheckpointError, match=message):
        model(MOE_ARGS | fields)


ODD_VALUES = (7, -1, 1.5, "x", "", [], {}, [1, "a"], [None], True, None, 0, float("nan"), 2**70, {"a": 1})


@pytest.mark.parametrize("args", FAMILY_ARGS.values(), ids=FAMILY_ARGS)
def test_any_invalid_value_gives_a_message_about_its_setting(args):
    """Also for values of the wrong type: no message is that of a Python exception."""
    messages = []
    for key, value in itertools.product(KINDS, ODD_VALUES):
        try:
            model(args, **{key: value})
        except (CheckpointError, UnsupportedModelError) as error:
            messages.append(str(error))
    assert len(messages) > len(KINDS)
    assert [text for text in messages if re.search("argument|convert|operand|object|attribute", text)] == []
