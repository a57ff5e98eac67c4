"""Which Hugging Face architecture a model becomes, and the messages if there is none."""

import re

import pytest

from mptq.formats.hf.format import _require_family
from mptq.model.architectures.family import PLAIN
from mptq.model.architectures.registry import FAMILIES, family_of, nearest_family
from mptq.model.features import WORDS
from tests.support.models import ARGS, FAMILY_ARGS, LATENT, MOE_ARGS, OSS_ARGS, SHARED, model


@pytest.mark.parametrize("name", FAMILY_ARGS)
def test_each_family_is_chosen_for_its_features(name):
    config = model(FAMILY_ARGS[name])
    assert family_of(config).name == nearest_family(config).name == name
    assert nearest_family(config).missing(config) == []


def test_every_family_has_an_example_and_every_feature_has_words():
    assert {family.name for family in FAMILIES} == set(FAMILY_ARGS)
    assert set(PLAIN) == set(WORDS)
    for family in FAMILIES:
        assert set(family.accepts) <= set(PLAIN), family.name


@pytest.mark.parametrize(
    ("name", "fields", "words", "expressed"),
    [
        ("Llama", {"rotary_percent": 0.5}, "partial rotary embeddings: yes", "no"),
        ("Llama", {"rotary_interleaved": True}, "interleaved rotary embeddings: yes", "no"),
        ("Llama", {"apply_layernorm_1p": True}, "zero-centered norm weights: yes", "no"),
        ("Llama", {"swiglu": False}, "an MLP of gelu", "gated silu"),
        ("Llama", {"no_rope_freq": 2}, "layers without rotary embeddings: yes", "no"),
        ("Llama", {"fp32_residual_connection": True}, "residuals in float32 (fp32_residual_connection=True)", None),
        ("Mistral", {"window_attn_skip_freq": 2}, "sliding window attention in some layers", "every layer"),
        ("Mistral", {"softmax_type": "learnable"}, "attention sinks: yes", "no"),
        ("Qwen2", {"kv_channels": 32}, "a head size other than hidden size / heads: yes", "no"),
        ("Qwen2", {"add_bias_linear": True}, "biases in all linears: yes", "no"),
        (
            "Nemotron",
            {"position_embedding_type": "yarn", "rotary_scaling_factor": 4.0},
            "rotary scaling: yarn",
            "none or linear",
        ),
        ("Qwen3", {"qk_l2_norm": True}, "QK normalization: L2", "yes"),
        ("Nemotron", {"use_rope_scaling": True}, "rotary scaling: llama3", "none or linear"),
        ("Nemotron", {"apply_layernorm_1p": False}, "zero-centered norm weights: no", "yes"),
        ("OPT", {"kv_channels": 32}, "a head size other than hidden size / heads: yes", "no"),
        ("OPT", {"num_query_groups": 2}, "attention: grouped-query", "multi-head"),
        ("Mixtral", {"moe_router_topk": 1}, "experts per token: one", "several"),
        ("Mixtral", {"moe_token_dropping": True}, "token dropping (moe_token_dropping=True)", None),
        ("Qwen2-MoE", {"moe_shared_expert_gate": False}, "shared experts: yes", "gated"),
        (
            "Qwen3-MoE",
            {"moe_router_score_function": "sigmoid"},
            "router scores: sigmoid",
            "softmax of all or softmax of the chosen",
        ),
        ("DeepSeek-V3", {"moe_router_enable_expert_bias": False}, "a router bias per expert: no", "yes"),
        (
            "DeepSeek-V3",
            {"moe_router_group_topk": 1},
            "group-limited routing: by the best 4 of a group",
            "none or by the best 2 of a group",
        ),
        ("DeepSeek-V2", {"moe_layer_freq": [1, 0]}, "experts in some layers", "every layer or all but the first layers"),
        ("Nemotron-H", {"position_embedding_type": "rope"}, "positions: rope", "none"),
    ],
)
def test_missing_features_are_named(name, fields, words, expressed):
    """With one unsupported feature, a family lacks exactly that one, and the text names the supported values."""
    config = model(FAMILY_ARGS[name] | fields)
    (family,) = (family for family in FAMILIES if family.name == name)
    assert family.missing(config) == [words if expressed is None else f"{words} ({name}: {expressed})"]


def test_deepseek_v2_is_written_although_megatron_core_chooses_its_groups_differently():
    """The published model uses 6 experts of 3 groups, chosen by their best 2 in megatron-core, else by the best."""
    published = FAMILY_ARGS["DeepSeek-V2"] | {"moe_router_num_groups": 4, "moe_router_group_topk": 2}
    found, exact = (
        model(published),
        model(published | {"num_experts": 8, "moe_router_num_groups": 8, "moe_router_group_topk": 4}),
    )
    assert [family_of(config).name for config in (found, exact)] == ["DeepSeek-V2"] * 2
    (note,) = family_of(found).deviations(found)
    assert "by the best expert of each" in note
    assert family_of(exact).deviations(exact) == family_of(model(FAMILY_ARGS["DeepSeek-V2"])).deviations(found)[1:] == []


@pytest.mark.parametrize(
    "args", [OSS_ARGS, MOE_ARGS | SHARED, LATENT, FAMILY_ARGS["Nemotron-H"] | {"normalization": "LayerNorm"}]
)
def test_the_nearest_family_is_used_if_none_fits(args):
    config = model(args)
    assert family_of(config) is None
    assert nearest_family(config).missing(config) != []
    assert all(
        len(nearest_family(config).missing(config)) <= len(family.missing(config)) for family in _with_the_names_of(config)
    )


def _with_the_names_of(config):
    """Returns the families that have names for the mixers of the model."""
    special = "self_attention.linear_kv_up_proj" if config.latent else "mixer.in_proj"
    hybrid = any(kind.mixer == "mamba" for kind in config.kinds)
    return [family for family in FAMILIES if (special in family.names) == bool(config.latent or hybrid)]


def test_the_message_if_no_family_fits():
    class Layout:
        model = model(ARGS | {"rotary_percent": 0.5, "rotary_interleaved": True})

    from mptq.errors import UnsupportedModelError

    message = (
        "the nearest, Llama, differs in partial rotary embeddings: yes (Llama: no); interleaved rotary embeddings: yes "
        "(Llama: no): use --format megatron"
    )
    with pytest.raises(UnsupportedModelError, match=re.escape(message)):
        _require_family(Layout)
