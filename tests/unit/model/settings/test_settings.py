"""Merging sources: precedence, conflicts, and values derived for missing settings."""

from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptq.checkpoint.index import open_checkpoint
from mptq.errors import OptionError
from mptq.model.settings.from_megatron_args import NEGATED, RENAMED, TRANSLATED
from mptq.model.settings.resolve import resolve
from mptq.model.settings.settings import KINDS, SettingsSource, agree, completed, merge
from mptq.types import TensorSpec

ENTRIES = st.dictionaries(st.sampled_from([key for key, kinds in KINDS.items() if int in kinds][:8]), st.integers(1, 3))


def test_the_first_source_takes_precedence_and_the_others_are_conflicts():
    found = merge(
        [
            SettingsSource("yaml", {"num_layers": 2}),
            SettingsSource("args", {"num_layers": 3, "hidden_size": 64}),
            SettingsSource("shapes", {}),
        ]
    )
    assert dict(found) == {"num_layers": 2, "hidden_size": 64}
    assert found.sources == {"num_layers": "yaml", "hidden_size": "args"}
    (conflict,) = found.conflicts
    assert str(conflict) == "num_layers: yaml has 2, args has 3: using yaml"


def test_user_options_are_not_conflicts():
    found = merge([SettingsSource("--config", {"num_layers": 2}, overrides=True), SettingsSource("args", {"num_layers": 3})])
    assert (found["num_layers"], found.conflicts) == (2, ())


@given(st.lists(ENTRIES, max_size=4))
def test_every_key_has_the_value_of_its_source(rungs):
    found = merge([SettingsSource(str(number), entries) for number, entries in enumerate(rungs)])
    assert set(found) == set().union(*rungs)
    for key, value in found.items():
        first = next(number for number, entries in enumerate(rungs) if key in entries)
        assert (found.sources[key], value) == (str(first), rungs[first][key])
        others = [entries[key] for entries in rungs[first + 1 :] if key in entries and entries[key] != value]
        assert [conflict.other for conflict in found.conflicts if conflict.key == key] == others


@pytest.mark.parametrize(
    ("key", "one", "other", "same"),
    [
        ("mtp_num_layers", None, 0, True),
        ("qk_layernorm", None, False, True),
        ("rotary_base", 10000, 10000.0, True),
        ("moe_layer_freq", 1, [1, 1, 1], True),
        ("moe_layer_freq", 2, [1, 0, 1], True),
        ("moe_layer_freq", 2, [0, 1, 1], False),
        ("moe_router_num_groups", 1, None, True),
        ("moe_router_num_groups", 1, 2, False),
        ("hybrid_layer_pattern", "M*|M-/MM/MM", "M*M-", True),
        ("hybrid_layer_pattern", "M*M-", "M*MM", False),
        ("hybrid_layer_pattern", None, "M*", False),
        ("add_bias_linear", True, False, False),
    ],
)
def test_values_that_mean_the_same_agree(key, one, other, same):
    assert agree(key, one, other) is same
    assert agree(key, other, one) is same


def test_what_megatron_core_computes_for_none():
    entries = {"hidden_size": 64, "num_attention_heads": 4, "ffn_hidden_size": None, "kv_channels": None}
    found = completed(entries | {"num_query_groups": None, "num_moe_experts": 2, "moe_ffn_hidden_size": None})
    assert (found["ffn_hidden_size"], found["kv_channels"], found["num_query_groups"]) == (256, 16, 4)
    assert found["moe_ffn_hidden_size"] == 256


@pytest.mark.parametrize(
    ("layers", "experts"),
    [
        ({"hybrid_layer_pattern": "M*-"}, None),  # as Megatron-Bridge writes a dense Nemotron-H, with its default
        ({"hybrid_layer_pattern": "M*-/ME"}, None),
        ({"hybrid_layer_pattern": "ME*"}, 8),
        ({"moe_layer_freq": [0, 0]}, None),
        ({"moe_layer_freq": [0, 1]}, 8),
        ({"moe_layer_freq": 2}, 8),
        ({"hybrid_layer_pattern": None}, 8),
        ({}, 8),
    ],
)
def test_experts_are_those_of_layers(layers, experts):
    assert completed({"num_moe_experts": 8} | layers)["num_moe_experts"] == experts


def test_a_conflict_is_one_line_whatever_the_values():
    found = merge(
        [SettingsSource("one", {"moe_layer_freq": [0] * 1000}), SettingsSource("other", {"moe_layer_freq": [1] * 1000})]
    )
    assert len(str(found.conflicts[0])) < 200


@pytest.mark.parametrize("value", ["x", -1, 10**30, [2], 2.5, True])
def test_values_that_are_not_sizes_are_left_unchanged(value):
    keys = ("hidden_size", "num_attention_heads", "num_layers", "num_moe_experts", "kv_channels", "no_rope_freq")
    entries = dict.fromkeys(keys, value) | {"use_mup": True, "mup_base_head_dim": value, "mup_attn_scale_power": value}
    assert {key: completed(entries)[key] for key in keys[:5]} == dict.fromkeys(keys[:5], value)
    sound = {"hidden_size": 64, "num_attention_heads": 4, "kv_channels": 16, "use_mup": True, "mup_base_hidden_size": 32}
    assert completed(sound | {"mup_attn_scale_power": value})["mup_width_mult"] == 2


def test_an_absent_key_stays_absent():
    assert completed({"hidden_size": 64, "num_attention_heads": 4}) == {"hidden_size": 64, "num_attention_heads": 4}


def described(**fields):
    plain = {"config": {}, "config_source": "no run config", "args": {}, "args_source": "no args", "specs": {}}
    return SimpleNamespace(**plain | fields)


EMBEDDING = TensorSpec("embedding.word_embeddings.weight", "bfloat16", (128, 64))
SPECS = {
    spec.name: spec
    for spec in (EMBEDDING, TensorSpec("decoder.layers.mlp.linear_fc2.weight", "bfloat16", (2, 64, 96)))
}  # fmt: skip


def test_the_order_of_the_sources(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "vocab_size": 4, "rms_norm_eps": 4, "num_hidden_layers": 4, "head_dim": 4}'
    )
    checkpoint = described(
        config={"model": {"vocab_size": 3, "layernorm_epsilon": 3, "num_layers": 3, "seq_length": 3}},
        config_source="run_config.yaml",
        args={"vocab_size": 2, "norm_epsilon": 2, "num_layers": 2, "seq_length": 2, "rotary_base": 2},
        args_source="args in common.pt",
        specs=SPECS,
    )
    found = resolve(checkpoint, ["vocab_size=5"], tmp_path)
    assert [found[key] for key in ("vocab_size", "layernorm_epsilon", "seq_length", "rotary_base")] == [5, 4, 3, 2]
    assert (found["hidden_size"], found.sources["hidden_size"]) == (64, "the tensors' shapes")
    assert found.sources["vocab_size"] == "--config"
    assert found.sources["layernorm_epsilon"] == str(tmp_path / "config.json")
    assert found.sources["rotary_base"] == "args in common.pt"
    assert {conflict.key for conflict in found.conflicts} == {"layernorm_epsilon", "num_layers", "seq_length"}


@pytest.mark.parametrize(
    ("length", "expected"),
    [("131072", 131072), ("1e30", None), (str(int(1e30)), None), ('"long"', None), ("true", None), ("0", None)],
)
def test_model_max_length_is_read_from_the_tokenizer(tmp_path, length, expected):
    (tmp_path / "tokenizer_config.json").write_text(f'{{"model_max_length": {length}}}')
    (tmp_path / "tokenizer.json").touch()
    named = [{"tokenizer_model": str(path)} for path in (tmp_path, tmp_path / "tokenizer.json", tmp_path / "gone")]
    found = [resolve(described(args=args)).get("model_max_length") for args in named]
    assert found == [expected, expected, None]
    assert resolve(described(args=named[2]), tokenizer=tmp_path).get("model_max_length") == expected


def test_settings_from_shapes_alone():
    found = resolve(described(specs=SPECS))
    assert (found["num_layers"], found["ffn_hidden_size"], found["padded_vocab_size"]) == (2, 96, 128)
    assert not {"num_attention_heads", "rotary_base", "layernorm_epsilon"} & set(found)


def test_a_checkpoint_of_megatron_core_has_no_conflicts(aligned, mixtral):
    for path in (aligned, mixtral):
        found = resolve(open_checkpoint(path))
        assert found.conflicts == ()
        assert set(found) <= set(KINDS)
        assert all(value is None or isinstance(value, KINDS[key]) for key, value in found.items())


ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["_target_", "_name_", "factor"]), inner),
    max_leaves=4,
)
NAMES = sorted({*KINDS, *RENAMED, *NEGATED, *TRANSLATED, "bias_gelu_fusion", "transformer", "scale_factor", "old_context_len"})


@given(st.dictionaries(st.sampled_from(NAMES), ANY), st.sampled_from(["args", "model"]))
def test_no_content_of_a_source_raises_an_exception(content, where):
    checkpoint = described(args=content) if where == "args" else described(config={"model": content})
    found = resolve(checkpoint)
    assert set(found) <= set(KINDS)


def test_a_bad_option_is_an_option_error():
    with pytest.raises(OptionError) as error:
        resolve(described(), ["num_layer=3"])
    assert error.value.exit_code == 2
