"""Features of architectures: every row of the tables is detected by name, and every feature has a text."""

import json

import pytest

from mptq.errors import UnsupportedModelError
from mptq.model.features import WORDS
from mptq.model.settings.from_megatron_args import NEGATED, RENAMED
from mptq.model.settings.settings import KINDS
from mptq.model.settings.supported import DEFAULTS, NOT_RUN, REFUSED, obstacles
from tests.support.models import ARGS, FAMILY_ARGS, LATENT, MOE_ARGS, OSS_ARGS, model

LLAMA = dict(model(ARGS).features)


def changed(args):
    """Returns the features in which a model differs from Llama."""
    return {name: value for name, value in model(args).features.items() if LLAMA.get(name) != value}


def test_all_settings_in_the_tables_exist():
    assert set(REFUSED) | set(NOT_RUN) | set(DEFAULTS) <= set(KINDS)


@pytest.mark.parametrize("name", REFUSED)
def test_every_unsupported_feature_is_named(name):
    meaning = REFUSED[name][1]
    with pytest.raises(UnsupportedModelError, match=rf"has {meaning} \({name}=surprise\), which mptq does not quantize"):
        model(MOE_ARGS | {name: "surprise"})


@pytest.mark.parametrize("name", [*REFUSED, *NOT_RUN])
def test_a_value_that_is_a_whole_document_is_truncated_in_the_message(name):
    """Llama-Nemotron has its Hugging Face config as JSON among its settings."""
    value = json.dumps({"block_configs": [{"n_heads_in_group": 8}] * 80}, indent=1)
    (text,) = obstacles({name: (REFUSED | NOT_RUN)[name]}, {name: value})
    assert text.startswith((REFUSED | NOT_RUN)[name][1])
    assert len(text) < 200
    assert "\n" not in text


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("value", [None, "left out"])
def test_a_feature_that_is_off_is_accepted(name, value):
    assert model(MOE_ARGS | ({} if value else {name: value})).num_experts == 8


ODD = {
    "activation_func": "sinh",
    "hybrid_layer_pattern": "M*",
    "moe_router_load_balancing_type": "sinkhorn",
    "position_embedding_type": "mrope",
}


@pytest.mark.parametrize("name", NOT_RUN)
def test_every_feature_that_is_not_run_is_named(name):
    value = ODD.get(name, 7)
    assert model(MOE_ARGS, **{name: value}).not_run == [f"{NOT_RUN[name][1]} ({name}={value})"]


@pytest.mark.parametrize("args", FAMILY_ARGS.values(), ids=FAMILY_ARGS)
def test_all_models_but_hybrid_ones_can_be_run(args):
    assert len(model(args).not_run) == ("hybrid_layer_pattern" in args)


def test_one_of_several_kinds_of_load_balancing_is_enough():
    config = model(MOE_ARGS | {"moe_router_load_balancing_type": ["aux_loss", "sinkhorn"]})
    assert config.not_run == [
        "load balancing that is part of the routing (moe_router_load_balancing_type=['aux_loss', 'sinkhorn'])"
    ]


@pytest.mark.parametrize("args", [*FAMILY_ARGS.values(), OSS_ARGS], ids=[*FAMILY_ARGS, "gpt-oss"])
def test_every_feature_has_words(args):
    found = model(args).features
    assert set(found) <= set(WORDS)
    assert (len(found) == len(WORDS)) == bool(args.get("num_experts"))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"normalization": "LayerNorm"}, {"norm": "LayerNorm"}),
        ({"apply_layernorm_1p": True}, {"zero centred": True}),
        ({"swiglu": False, "squared_relu": True}, {"mlp": "squared_relu"}),
        ({"swiglu": False, "bias_gelu_fusion": True}, {"mlp": "gelu"}),
        ({"add_bias_linear": True}, {"bias": True, "qkv bias": True}),
        ({"add_qkv_bias": True}, {"qkv bias": True}),
        ({"qk_layernorm": True}, {"qk norm": True}),
        ({"qk_l2_norm": True}, {"qk norm": "L2"}),
        ({"window_size": (7, 0)}, {"window": "every layer"}),
        ({"window_size": (7, 0), "window_attn_skip_freq": 2}, {"window": "some layers"}),
        ({"softmax_type": "off-by-one"}, {"sinks": True}),
        ({"kv_channels": 32}, {"head_dim": True}),
        ({"group_query_attention": False}, {"attention": "multi-head"}),
        ({"untie_embeddings_and_output_weights": False}, {"tied": True}),
        ({"position_embedding_type": "learned_absolute"}, {"position": "learned_absolute"}),
        ({"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0}, {"rope scaling": "yarn"}),
        ({"position_embedding_type": "yarn", "rotary_scaling_factor": 1.0}, {}),
        ({"use_rope_scaling": True}, {"rope scaling": "llama3"}),
        ({"rotary_seq_len_interpolation_factor": 4}, {"rope scaling": "linear"}),
        ({"rotary_percent": 0.5}, {"partial rotary": True}),
        ({"rotary_interleaved": True}, {"interleaved rotary": True}),
        ({"no_rope_freq": 2}, {"no rope": True}),
        ({"activation_func_clamp_value": 7.0}, {"glu clamp": True}),
        ({"glu_linear_offset": 1.0}, {"glu clamp": True}),
        ({"hybrid_layer_pattern": "*-"}, {"hybrid": True}),
        ({"use_mup": True}, {"not mapped": "maximal update parametrization (use_mup=True)"}),
    ],
)
def test_features_of_dense_models(fields, expected):
    assert changed(ARGS | fields) == expected


MIXTURE = {
    "experts": "every layer",
    "router": "softmax of the chosen",
    "topk": "several",
    "groups": "none",
    "router scale": False,
    "expert bias": False,
    "shared": "none",
}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {}),
        ({"moe_layer_freq": [0, 1]}, {"experts": "all but the first layers"}),
        ({"moe_layer_freq": [1, 0]}, {"experts": "some layers"}),
        ({"moe_layer_freq": 2}, {"experts": "some layers"}),
        ({"moe_router_pre_softmax": True}, {"router": "softmax of all"}),
        ({"moe_router_score_function": "sigmoid"}, {"router": "sigmoid"}),
        ({"moe_router_topk": 1}, {"topk": "one"}),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 2}, {"groups": "by the best 1 of a group"}),
        ({"moe_router_num_groups": 4, "moe_router_group_topk": 1}, {"groups": "by the best 2 of a group"}),
        # As Megatron-Bridge writes models without groups, and with all groups chosen.
        ({"moe_router_num_groups": 1, "moe_router_group_topk": 1}, {}),
        ({"moe_router_num_groups": 2, "moe_router_group_topk": 2}, {}),
        ({"moe_router_num_groups": 4}, {}),
        ({"moe_router_topk_scaling_factor": 2.5}, {"router scale": True}),
        ({"moe_router_topk_scaling_factor": 1.0}, {}),
        ({"moe_router_enable_expert_bias": True}, {"expert bias": True}),
        ({"moe_shared_expert_intermediate_size": 96}, {"shared": "yes"}),
        ({"moe_shared_expert_intermediate_size": 96, "moe_shared_expert_gate": True}, {"shared": "gated"}),
    ],
)
def test_features_of_mixtures(fields, expected):
    assert changed(MOE_ARGS | fields) == MIXTURE | expected


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"qk_layernorm": False}, "multi-latent attention without norms of its latents"),
        ({"rope_type": "rope"}, "a scale of the attention scores without yarn (mscale_all_dim)"),
        ({"rope_type": "rope", "mscale_all_dim": 0.0}, "nothing"),
        ({"rope_type": "rope", "rotary_scaling_factor": 1.0}, "nothing"),
        ({"rotary_scaling_factor": 1.0}, "nothing"),
        ({}, "nothing"),
    ],
)
def test_features_that_no_architecture_has(fields, words):
    assert model(LATENT | fields).features["not mapped"] == words


def test_arguments_with_different_names_become_settings():
    assert set(RENAMED.values()) | set(NEGATED.values()) <= set(KINDS)
