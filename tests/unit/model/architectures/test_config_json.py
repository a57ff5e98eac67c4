"""The config.json of every family, as read by the classes in transformers."""

import copy
import math

import pytest
import transformers

from mptq.model.architectures.config_json import config_fields
from mptq.model.architectures.registry import family_of
from mptq.model.tensors import hf_layer, layer_copies, layer_linears, outer_copies
from tests.support.models import ARGS, FAMILY_ARGS, MOE_ARGS, SHARED, model


def parsed(args):
    """Returns the model's config as an object of its family's class, and the fields passed to it."""
    config = model(args)
    family = family_of(config)
    fields = config_fields(config, family)
    return getattr(transformers, family.config_class)(**copy.deepcopy(fields)), fields


@pytest.mark.parametrize("name", FAMILY_ARGS)
def test_transformers_knows_the_fields(name):
    """The class keeps all values that are written: no field is ignored, renamed or overridden."""
    found, fields = parsed(FAMILY_ARGS[name])
    assert found.architectures == fields["architectures"]
    assert hasattr(transformers, found.architectures[0])
    # Except older names for fields of `rope_parameters`, the dtype (converted to torch's), and renamed kinds of layers.
    others = {"rope_scaling", "rope_theta", "partial_rotary_factor", "rope_parameters", "dtype", "layers_block_type"}
    for key in set(fields) - others:
        assert (getattr(found, key) or None) == (fields[key] or None), key
    assert str(found.dtype).removeprefix("torch.") == "bfloat16"
    for key, value in fields.get("rope_parameters", {}).items():
        assert found.rope_parameters[key] == value, key
    assert type(found).from_dict(found.to_dict()).to_dict() == found.to_dict()


@pytest.mark.parametrize("name", [name for name in FAMILY_ARGS if name != "Nemotron-H"])
def test_tensors_match_those_of_transformers(name):
    """The model that transformers builds has the shapes of the output, and as many parameters in all."""
    import torch

    config = model(FAMILY_ARGS[name])
    hf, _ = parsed(FAMILY_ARGS[name])
    with torch.device("meta"):
        built = getattr(transformers, hf.architectures[0])(hf)
    before, after = outer_copies(config)
    ours = {name: shape for part in (*before, *after) for name, shape in zip(part.hf, part.hf_shapes, strict=True)}
    for layer in range(config.num_layers):
        prefix = hf_layer(config, layer)
        for linear in layer_linears(config, layer):
            ours |= {f"{prefix}{module}.weight": shape for module, shape in linear.members}
        for part in layer_copies(config, layer):
            ours |= {prefix + name: shape for name, shape in zip(part.hf, part.hf_shapes, strict=True)}
    theirs = {name: tuple(weight.shape) for name, weight in built.state_dict().items()}
    # transformers 5 stacks experts, and converts the names in files when it loads them.
    assert {name: shape for name, shape in theirs.items() if "experts." not in name and ".mlp.gate." not in name} == {
        name: shape for name, shape in ours.items() if not any(word in name for word in ("experts.", ".gate.", "moe.gate"))
    }
    assert sum(map(math.prod, theirs.values())) == sum(map(math.prod, ours.values()))


@pytest.mark.parametrize(
    ("name", "fields", "expected"),
    [
        ("Llama", {}, {"rope_theta": 5000, "rms_norm_eps": 1e-5, "vocab_size": 100, "head_dim": 16, "num_key_value_heads": 2}),
        ("Llama", {"untie_embeddings_and_output_weights": False}, {"tie_word_embeddings": True}),
        ("Mistral", {}, {"sliding_window": 8}),
        ("Qwen2", {}, {"use_sliding_window": False, "hidden_act": "silu"}),
        ("Nemotron", {}, {"partial_rotary_factor": 0.5, "hidden_act": "relu2", "norm_eps": 1e-5}),
        ("OPT", {}, {"ffn_dim": 96, "activation_function": "gelu_pytorch_tanh", "max_position_embeddings": 512}),
        ("OPT", {"bias_gelu_fusion": False}, {"activation_function": "gelu"}),
        ("StarCoder2", {}, {"hidden_act": "gelu_pytorch_tanh", "use_bias": True, "sliding_window": None}),
        ("StarCoder2", {"window_size": (7, 0)}, {"sliding_window": 8}),
        ("Mixtral", {}, {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 48}),
        ("Qwen2-MoE", {}, {"norm_topk_prob": False, "shared_expert_intermediate_size": 96, "mlp_only_layers": []}),
        ("Qwen2-MoE", {"moe_router_pre_softmax": False}, {"norm_topk_prob": True, "qkv_bias": True}),
        ("Qwen2-MoE", {"add_qkv_bias": False}, {"qkv_bias": False}),
        ("Qwen3-MoE", {"moe_layer_freq": [0, 1]}, {"mlp_only_layers": [0], "intermediate_size": 96}),
        ("Qwen3-MoE", {"num_layers": 4, "moe_layer_freq": 2}, {"mlp_only_layers": [1, 3], "decoder_sparse_step": 1}),
        ("DeepSeek-V3", {}, {"q_lora_rank": 24, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}),
        ("DeepSeek-V3", {"moe_router_num_groups": None}, {"n_group": 1, "topk_group": 1, "norm_topk_prob": True}),
        ("DeepSeek-V2", {}, {"topk_method": "greedy", "n_shared_experts": 2, "first_k_dense_replace": 1, "q_lora_rank": None}),
        ("DeepSeek-V3", {"moe_router_num_groups": 1, "moe_router_group_topk": 1}, {"n_group": 1, "topk_group": 1}),
        ("DeepSeek-V2", {"moe_router_num_groups": 1, "moe_router_group_topk": 1}, {"topk_method": "greedy", "n_group": 1}),
        ("DeepSeek-V2", {"moe_router_num_groups": 8, "moe_router_group_topk": 4}, {"topk_method": "group_limited_greedy"}),
        ("Nemotron-H", {"moe_router_num_groups": 1, "moe_router_group_topk": 1}, {"n_group": 1, "topk_group": 1}),
        ("Nemotron-H", {}, {"ssm_state_size": 8, "mamba_num_heads": 8, "n_groups": 2, "mlp_hidden_act": "relu2"}),
        ("Nemotron-H", {}, {"layers_block_type": ["mamba", "attention", "mlp", "mamba", "moe"], "n_routed_experts": 4}),
    ],
)
def test_fields_against_hand_written_ones(name, fields, expected):
    _, found = parsed(FAMILY_ARGS[name] | fields)
    assert found["architectures"] == [family_of(model(FAMILY_ARGS[name])).architecture]
    assert {key: found[key] for key in expected} == expected


def test_rotary_scaling_under_the_new_and_the_old_names():
    _, fields = parsed(ARGS | {"use_rope_scaling": True, "rope_scaling_factor": 32.0})
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    assert fields["rope_parameters"] == scaling | {"rope_theta": 5000}
    assert fields["rope_scaling"] == scaling | {"type": "llama3"}
    _, fields = parsed(ARGS | {"rotary_seq_len_interpolation_factor": 2})
    assert fields["rope_scaling"] == {"rope_type": "linear", "factor": 2.0, "type": "linear"}
    _, fields = parsed(ARGS)
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000}
    assert "rope_scaling" not in fields


YARN = {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0, "yarn_original_max_position_embeddings": 32768}


def test_yarn_without_latent_attention():
    """As in published configs: the original length and the factor, with the default factor on cosine and sine."""
    _, fields = parsed(ARGS | YARN)
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "beta_fast": 32, "beta_slow": 1}
    assert fields["rope_parameters"] == scaling | {"rope_theta": 5000}
    assert fields["rope_scaling"] == scaling | {"type": "yarn"}
    assert fields["max_position_embeddings"] == 131072
    _, fields = parsed(ARGS | YARN | {"yarn_correction_range_round_to_int": False})
    assert fields["rope_parameters"]["truncate"] is False


@pytest.mark.parametrize("name", ["Llama", "DeepSeek-V2"])
def test_yarn_by_a_factor_of_1_is_plain(name):
    config, fields = parsed(
        FAMILY_ARGS[name] | YARN | {"rope_type": "yarn", "rotary_scaling_factor": 1.0, "mscale_all_dim": 1.0}
    )
    assert fields["rope_parameters"] == {"rope_type": "default", "rope_theta": 5000}
    assert "rope_scaling" not in fields
    assert config.max_position_embeddings == 512


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "DeepSeek-V3"])
@pytest.mark.parametrize("factor", [1.5, 4.0, 40.0])
@pytest.mark.parametrize("scales", [(1.0, 0.0), (1.0, 1.0), (0.707, 0.707), (0.707, 0.0), (0.0, 0.707), (1.0, 0.707)])
def test_the_factor_on_cosine_and_sine_is_megatron_cores(name, factor, scales):
    """Bit for bit, both as computed by transformers from the config and by vLLM (its default times `attn_factor`)."""
    from megatron.core.models.common.embeddings.yarn_rotary_pos_embedding import (
        _yarn_get_concentration_factor,
        _yarn_get_mscale,
    )
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    args = FAMILY_ARGS[name] | YARN | {"rotary_scaling_factor": factor, "mscale": scales[0], "mscale_all_dim": scales[1]}
    config, fields = parsed(args)
    expected = _yarn_get_concentration_factor(factor, *scales)
    assert ROPE_INIT_FUNCTIONS["yarn"](config, "cpu")[1] == expected
    if name != "DeepSeek-V3":  # its class in vLLM reads mscale and mscale_all_dim
        assert _yarn_get_mscale(factor) * fields["rope_parameters"].get("attn_factor", 1.0) == pytest.approx(
            expected, rel=1e-15
        )


def test_no_family_has_shared_experts_without_a_gate():
    assert family_of(model(MOE_ARGS | SHARED)) is None
