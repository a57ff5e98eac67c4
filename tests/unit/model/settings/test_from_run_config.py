"""Run configs of Megatron-Bridge and NeMo 2; megatron-core's own are in test_from_megatron_args.py."""

import pytest

from mptq.model.settings.from_run_config import from_document, unread
from mptq.model.settings.values import Unknown, activation, plain

SILU = {"_target_": "torch.nn.functional.silu", "_call_": False}
GELU = {"_target_": "torch._C._nn.gelu", "_call_": False}
MODEL = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_query_groups": None, "seq_length": 512}


def model(**fields):
    return from_document({"model": MODEL | fields})


def test_a_provider():
    found = model(_target_="megatron.bridge.models.llama.llama_provider.Llama3ModelProvider", activation_func=SILU)
    assert (found["activation_func"], found["num_query_groups"], found["seq_length"]) == ("silu", 4, 512)
    assert "max_position_embeddings" not in found
    assert found["provider"] == "Llama3ModelProvider"
    assert "hidden_dropout" not in found


def test_a_config_with_a_nested_transformer():
    transformer = {"_target_": "megatron.core.transformer.transformer_config.TransformerConfig", **MODEL, "seq_length": None}
    outer = {"_target_": "megatron.bridge.models.gpt.model_config.BridgeGPTModelConfig", "seq_length": 512}
    found = from_document({"model": outer | {"transformer": transformer | {"activation_func": "silu"}}})
    assert (found["num_layers"], found["seq_length"], found["activation_func"]) == (2, 512, "silu")
    assert found["provider"] == "BridgeGPTModelConfig"


def test_a_model_of_nemo():
    config = {"_target_": "nemo.collections.llm.gpt.model.llama.Llama31Config8B", **MODEL, "activation_func": SILU}
    scaling = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    target = "nemo.collections.llm.gpt.model.llama.LlamaModel"
    found = from_document({"model": {"_target_": target, "config": config | scaling}})
    assert (found["rope_scaling"], found["rope_scaling_factor"]) == (True, 8.0)
    assert (found["rope_low_freq_factor"], found["rope_original_max_position_embeddings"]) == (1.0, 8192)
    assert (found["num_layers"], found["provider"]) == (2, "LlamaModel")


def test_the_length_before_yarn_of_megatron_core_0_13():
    mla = {"multi_latent_attention": True, "max_position_embeddings": 4096}
    old = model(**mla)
    assert old["original_max_position_embeddings"] == 4096
    assert "max_position_embeddings" not in old
    new = model(**mla | {"original_max_position_embeddings": 1024})
    assert (new["original_max_position_embeddings"], new["max_position_embeddings"]) == (1024, 4096)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({}, "gelu"),
        ({"bias_activation_fusion": True}, "gelu_tanh"),
        ({"bias_activation_fusion": True, "add_bias_linear": False}, "gelu"),
        ({"bias_activation_fusion": True, "add_bias_linear": False, "gated_linear_unit": True}, "gelu_tanh"),
        ({"use_te_activation_func": True}, "gelu_tanh"),
    ],
)
def test_fused_kernels_approximate_gelu(fields, word):
    assert model(activation_func=GELU, **fields)["activation_func"] == word


@pytest.mark.parametrize(
    ("spec", "word"),
    [
        ({"_target_": "megatron.bridge.models.gpt_provider.default_layer_spec", "_call_": False}, "default_layer_spec"),
        ({"_target_": "megatron.bridge.models.olmoe.olmoe_provider.olmoe_layer_spec", "_call_": False}, "olmoe_layer_spec"),
        ({"_target_": "x.MambaModelProvider.<lambda>", "_call_": False}, "<lambda>"),
        ({"_target_": "megatron.core.transformer.spec_utils.ModuleSpec", "_call_": True}, "ModuleSpec"),
        (
            {"_target_": "x.get_gpt_decoder_block_spec", "_partial_": True, "_args_": [], "use_transformer_engine": True},
            "get_gpt_decoder_block_spec",
        ),
        (
            {"_target_": "x.get_gpt_decoder_block_spec", "_partial_": True, "_args_": [1], "qk_l2_norm": True},
            "get_gpt_decoder_block_spec(1, qk_l2_norm=True)",
        ),
        ({"_call_": True}, "an object without a name"),
        ("default_layer_spec", "default_layer_spec"),
        (None, None),
    ],
)
@pytest.mark.parametrize("key", ["transformer_layer_spec", "hybrid_stack_spec", "mamba_stack_spec"])
def test_a_layer_spec_becomes_a_name(key, spec, word):
    assert model(**{key: spec})[key] == word


def test_unknown_fields_are_listed_if_they_may_have_an_effect():
    transformer = MODEL | {"hidden_dropout": 0.1, "scale_embeddings": True, "new_loss": None, "new_list": [], "new": 0.0}
    outer = {"_target_": "x.GPTModelConfig", "transformer": transformer, "seq_length": 512, "embedding_multiplier": 12.0}
    outer |= {"blocks": [{"heads": number} for number in range(100)]}
    found = unread({"model": outer})
    assert found[:2] == ["scale_embeddings=True", "embedding_multiplier=12.0"]
    assert found[2].startswith("blocks=[{'heads': 0}, {'heads': 1}")
    assert (len(found), len(found[2])) == (3, len("blocks=") + 60)
    assert unread({}) == unread({"model": None}) == unread({"model": MODEL}) == []


def test_the_tokenizer():
    tokenizer = {"_target_": "x.TokenizerConfig", "tokenizer_model": "/tok", "tokenizer_type": "HuggingFaceTokenizer"}
    found = from_document({"model": MODEL, "tokenizer": tokenizer})
    assert (found["tokenizer_model"], found["tokenizer_type"]) == ("/tok", "HuggingFaceTokenizer")
    assert "tokenizer_model" not in from_document({"model": MODEL, "tokenizer": {"tokenizer_model": None}})


@pytest.mark.parametrize("document", [{}, {"model": None}, {"model": [1]}, {"model": {}}, {"train": {"num_layers": 2}}])
def test_a_document_without_a_model_gives_no_settings(document):
    assert from_document(document) == {}


@pytest.mark.parametrize(
    ("value", "word"),
    [
        (SILU, "silu"),
        ({"_target_": "megatron.core.activations.squared_relu", "_call_": False}, "squared_relu"),
        ({"_target_": "megatron.core.activations.fast_gelu"}, "gelu_tanh"),
        ({"_target_": "megatron.core.fusions.fused_bias_geglu.quick_gelu"}, "quick_gelu"),
        ({"_target_": "torch.nn.functional.gelu", "_partial_": True, "_args_": [], "approximate": "tanh"}, "gelu_tanh"),
        ({"_target_": "torch.nn.functional.gelu", "_partial_": True, "_args_": [], "approximate": "none"}, "gelu"),
        ("relu2", "squared_relu"),
        ({"_target_": "my.own.function"}, "my.own.function"),
    ],
)
def test_names_of_activations(value, word):
    assert activation(value) == word


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"_target_": "torch.bfloat16", "_call_": False}, "bfloat16"),
        ({"_target_": "x.AttnBackend", "_call_": True, "_args_": [5], "_name_": "auto"}, "auto"),
        ({"_target_": "x.Timers", "_call_": True}, Unknown),
        ({"a": 1}, Unknown),
        ((1, -1), [1, -1]),
        ([[1], 2], Unknown),
        (object(), Unknown),
        (None, None),
    ],
)
def test_plain_values(value, expected):
    assert plain(value) == expected


def test_unknown_values_give_no_setting():
    assert "params_dtype" not in model(params_dtype={"_target_": "torch.dtype", "_call_": True})
    looped = []
    looped.append(looped)
    assert "moe_layer_freq" not in model(moe_layer_freq=looped)
