"""Which architecture of Hugging Face a model becomes, and what is said where there is none."""

import pytest

from mptq.arch.families import FAMILIES, PLAIN, family_of, nearest
from mptq.arch.features import WORDS
from mptq.plan import _require_family
from tests.arch.models import ARGS, FAMILY_ARGS, LATENT, MOE_ARGS, OSS_ARGS, SHARED, model


@pytest.mark.parametrize("name", FAMILY_ARGS)
def test_each_family_is_chosen_for_its_features(name):
    config = model(FAMILY_ARGS[name])
    assert family_of(config).name == nearest(config).name == name
    assert nearest(config).missing(config) == []


def test_every_family_has_an_example_and_words_of_its_own():
    assert {family.name for family in FAMILIES} == set(FAMILY_ARGS)
    assert set(PLAIN) == set(WORDS)
    for family in FAMILIES:
        assert set(family.accepts) <= set(PLAIN), family.name


@pytest.mark.parametrize(
    ("name", "fields", "missing"),
    [
        ("Llama", {"rotary_percent": 0.5}, "partial rotary embeddings: yes"),
        ("Llama", {"rotary_interleaved": True}, "interleaved rotary embeddings: yes"),
        ("Llama", {"apply_layernorm_1p": True}, "zero-centred norm weights: yes"),
        ("Llama", {"swiglu": False}, "an MLP of gelu"),
        ("Llama", {"no_rope_freq": 2}, "layers without rotary embeddings: yes"),
        ("Llama", {"fp32_residual_connection": True}, "residuals in float32 (fp32_residual_connection=True)"),
        ("Mistral", {"window_attn_skip_freq": 2}, "sliding window attention in some layers"),
        ("Mistral", {"softmax_type": "learnable"}, "attention sinks: yes"),
        ("Qwen2", {"kv_channels": 32}, "heads of another size than hidden / heads: yes"),
        ("Qwen2", {"add_bias_linear": True}, "biases of all linears: yes"),
        ("Nemotron", {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0}, "rotary scaling: yarn"),
        ("Qwen3", {"qk_l2_norm": True}, "QK normalization: L2"),
        ("Nemotron", {"use_rope_scaling": True}, "rotary scaling: llama3"),
        ("Nemotron", {"apply_layernorm_1p": False}, "zero-centred norm weights: no"),
        ("OPT", {"kv_channels": 32}, "heads of another size than hidden / heads: yes"),
        ("OPT", {"num_query_groups": 2}, "heads that share keys and values: yes"),
        ("Mixtral", {"moe_router_topk": 1}, "experts a token: one"),
        ("Mixtral", {"moe_token_dropping": True}, "token dropping (moe_token_dropping=True)"),
        ("Qwen2-MoE", {"moe_shared_expert_gate": False}, "shared experts: yes"),
        ("Qwen3-MoE", {"moe_router_score_function": "sigmoid"}, "router scores: sigmoid"),
        ("DeepSeek-V3", {"moe_router_enable_expert_bias": False}, "a bias of each expert in the router: no"),
        ("DeepSeek-V3", {"moe_router_group_topk": 1}, "group-limited routing: by the best 4 of a group"),
        ("DeepSeek-V2", {"moe_layer_freq": [1, 0]}, "experts in some layers"),
        ("Nemotron-H", {"position_embedding_type": "rope"}, "positions: rope"),
    ],
)
def test_what_is_in_the_way_is_said(name, fields, missing):
    """One feature more than a family has: that family lacks precisely it, in these words."""
    config = model(FAMILY_ARGS[name] | fields)
    (family,) = (family for family in FAMILIES if family.name == name)
    assert family.missing(config) == [missing]


@pytest.mark.parametrize(
    "args", [OSS_ARGS, MOE_ARGS | SHARED, LATENT, FAMILY_ARGS["Nemotron-H"] | {"normalization": "LayerNorm"}]
)
def test_the_nearest_stands_in_where_there_is_none(args):
    config = model(args)
    assert family_of(config) is None
    assert nearest(config).missing(config) != []
    assert all(len(nearest(config).missing(config)) <= len(family.missing(config)) for family in _with_the_names_of(config))


def _with_the_names_of(config):
    """The families that have names for the mixers of the model."""
    special = "self_attention.linear_kv_up_proj" if config.latent else "mixer.in_proj"
    hybrid = any(kind.mixer == "mamba" for kind in config.kinds)
    return [family for family in FAMILIES if (special in family.names) == bool(config.latent or hybrid)]


def test_words_have_their_features():
    class Plan:
        model = model(ARGS | {"rotary_percent": 0.5, "rotary_interleaved": True})

    from mptq.errors import UnsupportedModelError

    message = "the nearest, Llama, lacks partial rotary embeddings: yes; interleaved rotary embeddings: yes: use --format meg"
    with pytest.raises(UnsupportedModelError, match=message):
        _require_family(Plan)
