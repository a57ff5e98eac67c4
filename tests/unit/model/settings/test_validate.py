"""Invalid settings are reported before anything is derived from them."""

from contextlib import suppress

import pytest

from mptq.errors import CheckpointError, MptqError
from mptq.model.settings.validate import WORDS
from tests.support.models import ARGS, MOE_ARGS, model

COUNT, POSITIVE = "a whole number above 0", "a number above 0"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"vocab_size": -3}, f"vocab_size is -3 (from told), but must be {COUNT}"),
        ({"num_query_groups": 0}, f"num_query_groups is 0 (from told), but must be {COUNT}"),
        ({"num_layers": True}, "num_layers is True (from told), but must be a whole number from 1 to 16384"),
        ({"num_layers": 1 << 70}, "but must be a whole number from 1 to 16384"),
        ({"hidden_size": 1 << 70}, f"but must be {COUNT}"),
        ({"num_moe_experts": -1}, "num_moe_experts is -1 (from told), but must be a whole number up to 16384"),
        ({"layernorm_epsilon": -1}, f"layernorm_epsilon is -1 (from told), but must be {POSITIVE}"),
        ({"layernorm_epsilon": float("nan")}, f"layernorm_epsilon is nan (from told), but must be {POSITIVE}"),
        ({"rotary_base": float("inf")}, f"rotary_base is inf (from told), but must be {POSITIVE}"),
        ({"rotary_percent": 1.5}, "rotary_percent is 1.5 (from told), but must be above 0 and at most 1"),
        ({"window_size": 5}, "window_size is 5 (from told), but must be [tokens to the left, 0]"),
        ({"window_size": [-1, 0]}, "window_size is [-1, 0] (from told), but must be [tokens to the left, 0]"),
        (
            {"moe_layer_freq": 0},
            "moe_layer_freq is 0 (from told), but must be a whole number above 0, or 0 or 1 for each layer",
        ),
        ({"no_rope_freq": [0, 2]}, "no_rope_freq is [0, 2] (from told), but must be a whole number above 0, or 0 or 1"),
        ({"num_query_groups": 3}, "but must be a multiple of num_query_groups (3)"),
        ({"moe_router_num_groups": 3}, "num_moe_experts is 8 (from args), but must be a multiple of moe_router_num_groups (3)"),
        ({"moe_router_topk": 9}, "moe_router_topk is 9 (from told), but must be at most num_moe_experts (8)"),
        ({"window_attn_skip_freq": [1, 0, 1]}, "_skip_freq is [1, 0, 1] (from told), but has 3 entries for 2 layers"),
    ],
)
def test_invalid_values_are_named_with_their_source(told, message):
    with pytest.raises(CheckpointError) as caught:
        model(MOE_ARGS, **told)
    assert message in str(caught.value)
    assert str(caught.value).endswith(": correct it with --config key=value")


@pytest.mark.parametrize(("key", "words"), WORDS.items(), ids=WORDS)
def test_words_unknown_to_megatron_core_are_named(key, words):
    with pytest.raises(CheckpointError, match=rf"{key} is 'Foo' \(from told\), but must be {' or '.join(words)}"):
        model(ARGS, **{key: "Foo"})
    for word in words:
        assert model(ARGS, **{key: word}).get(key) == word


@pytest.mark.parametrize(
    "told",
    [
        {"q_lora_rank": None, "kv_lora_rank": None, "softmax_scale": None},
        {"moe_router_topk": 16, "num_moe_experts": None},  # megatron-core ignores the router of a dense model
        {"window_size": [7, 0], "window_attn_skip_freq": 2},
        {"rotary_base": 1_000_000, "rotary_percent": 0.5},
    ],
)
def test_valid_values_are_accepted(told):
    assert model(ARGS, **told).num_layers == 2


@pytest.mark.parametrize("value", [0, -1, 1.5, "word", [], [3], [0, 1], float("nan"), True, 1 << 70])
def test_no_value_of_a_setting_raises_another_exception(value):
    """Any value is either refused with an MptqError or describes a model."""
    for key in MOE_ARGS:
        with suppress(MptqError):
            assert model(MOE_ARGS | {key: value}).features
