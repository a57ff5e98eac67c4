"""A Hugging Face config gives the same settings as the training arguments of its model."""

import functools
import json
import math
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest
import transformers
from hypothesis import given
from hypothesis import strategies as st

from mptq.checkpoint.index import open_checkpoint
from mptq.errors import CheckpointError, MptqError
from mptq.model.architectures.config_json import config_fields
from mptq.model.architectures.registry import family_of
from mptq.model.build import model_config
from mptq.model.settings.from_hf_config import from_fields, from_hf_config
from mptq.model.settings.from_megatron_args import from_args
from mptq.model.settings.hf_config_fields import CONFIG_TYPES, Fields, Rope
from mptq.model.settings.settings import SettingsSource, merge
from mptq.model.settings.supported import REFUSED, obstacles
from mptq.plan.plan import open_source
from tests.support.models import ARGS, FAMILY_ARGS, TENSORS, model
from tests.support.zoo import ZOO

# Gemma's config has what no Megatron-LM argument expresses; the other models have families to be written as.
WRITTEN = sorted(set(ZOO) - {"gemma", "gpt-oss", "partial-rotary"})
SIZES = {"num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "activation_func"}


def conflicts(*pairs):
    return [str(conflict) for conflict in merge([SettingsSource(source, entries) for source, entries in pairs]).conflicts]


@pytest.mark.parametrize("name", ["aligned", "crossing", "mixtral"])
def test_a_directory_agrees_with_the_checkpoint_made_of_it(name, request):
    settings, file = from_hf_config(request.getfixturevalue(f"{name}_hf"))
    args = from_args(open_checkpoint(request.getfixturevalue(name)).args)
    assert file.endswith("config.json")
    assert conflicts(("hf", settings), ("args", args)) == []
    assert SIZES | {"rotary_base", "layernorm_epsilon", "num_query_groups", "kv_channels"} <= set(settings)


@pytest.mark.slow
@pytest.mark.parametrize("name", WRITTEN)
def test_transformers_config_of_every_family_agrees_with_the_arguments(zoo, name):
    model = open_source(zoo(name) / "ckpt").model
    family = family_of(model)
    fields = getattr(transformers, family.config_class)(**config_fields(model, family)).to_dict()
    if name == "qwen3-yarn":  # has an explicit factor on cosine and sine that does not follow from the other fields
        with pytest.raises(CheckpointError, match="attention_factor"):
            from_fields(fields, "config.json")
        return
    told = from_fields(fields, "config.json")
    # The number of positions with YaRN is larger than in the training arguments.
    positions = {"max_position_embeddings": model.max_position_embeddings}
    assert conflicts(("hf", told), ("args", dict(model.settings) | positions)) == []
    assert set(told) >= SIZES


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": 100, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip


def told(**fields):
    """Returns the settings of a plain Llama with these fields changed."""
    return from_fields(LLAMA | fields, "config.json")


def refused(**fields):
    """Returns the error for a plain Llama with these fields changed."""
    with pytest.raises(CheckpointError) as error:
        told(**fields)
    assert str(error.value).startswith("config.json: ")
    return str(error.value).removeprefix("config.json: ")


def test_absent_fields_are_derived_from_others():
    settings = told()
    assert (settings["num_query_groups"], settings["kv_channels"]) == (4, 16)
    assert (settings["normalization"], settings["layernorm_epsilon"]) == ("RMSNorm", 1e-6)
    assert (settings["activation_func"], settings["gated_linear_unit"], settings["add_bias_linear"]) == ("silu", True, False)
    assert "kv_channels" not in told(model_type="qwen3")  # always 128 there
    assert "num_query_groups" not in told(model_type="mistral")


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_rotary_scaling_of_old_and_new_transformers(where):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    settings = told(**{where: scaling})
    assert (settings["rope_scaling"], settings["rope_scaling_factor"], settings["rotary_base"]) == (True, 32.0, 500000.0)
    assert (settings["rope_low_freq_factor"], settings["rope_original_max_position_embeddings"]) == (1.0, 8192)
    assert told(**{where: {"type": "linear", "factor": 4.0}})["seq_len_interpolation_factor"] == 4.0
    assert told(**{where: {"rope_type": "default", "rope_theta": 7.0}})["rope_scaling"] is False
    assert "rope_scaling" not in told()


def test_llama3_scaling_with_frequencies_other_than_megatrons_is_refused():
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    right = told(rope_scaling=scaling | {"original_max_position_embeddings": 8192})
    wrong = told(rope_scaling=scaling | {"original_max_position_embeddings": 4096})
    assert obstacles(REFUSED, right) == []
    assert obstacles(REFUSED, wrong) == ["rotary scaling that is not Llama 3's (rope_original_max_position_embeddings=4096)"]


def test_a_factor_on_cosine_and_sine_is_accepted_if_it_is_redundant():
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    default = 0.1 * math.log(4) + 1
    assert told(rope_scaling=yarn | {"attention_factor": default, "attn_factor": 1.0}) == told(rope_scaling=yarn)
    both = yarn | {"mscale": 0.5, "mscale_all_dim": 1.0}
    assert told(rope_scaling=both | {"attention_factor": (0.05 * math.log(4) + 1) / default}) == told(rope_scaling=both)
    assert "attention_factor 1.5" in refused(rope_scaling=yarn | {"attention_factor": 1.5})
    assert "attn_factor 2" in refused(rope_scaling=yarn | {"attn_factor": 2.0})
    assert "attention_factor" in refused(rope_scaling={"rope_type": "linear", "factor": 2.0, "attention_factor": 1.0})


def test_yarn_has_other_names_in_latent_attention():
    yarn = {"type": "yarn", "factor": 40, "beta_fast": 32, "mscale": 0.7, "truncate": False}
    plain = told(rope_scaling=yarn, max_position_embeddings=512)
    assert (plain["position_embedding_type"], plain["yarn_rotary_scaling_factor"], plain["yarn_mscale"]) == ("yarn", 40, 0.7)
    assert plain["yarn_correction_range_round_to_int"] is False
    assert plain["yarn_original_max_position_embeddings"] == 512
    latent = told(rope_scaling=yarn, model_type="deepseek_v3", kv_lora_rank=16)
    assert (latent["rope_type"], latent["rotary_scaling_factor"], latent["beta_fast"]) == ("yarn", 40, 32)
    assert "kv_channels" not in latent
    # megatron-core's default is yarn
    assert told(rope_scaling={"type": "default"}, model_type="deepseek_v3", kv_lora_rank=16)["rope_type"] == "rope"


def test_a_window_excludes_the_current_token_and_is_read_only_if_used():
    assert told(model_type="mistral", sliding_window=4096)["window_size"] == [4095, 0]
    window = {"model_type": "qwen2", "sliding_window": 4096, "max_window_layers": 0}
    assert told(**window)["window_size"] is None
    assert told(**window, use_sliding_window=True)["window_size"] == [4095, 0]
    assert "window_attn_skip_freq" not in told(**window, use_sliding_window=True)
    some = told(**window | {"use_sliding_window": True, "max_window_layers": 1})
    assert (some["window_size"], some["window_attn_skip_freq"]) == ([4095, 0], [0, 1])
    kinds = ["sliding_attention", "full_attention"]
    assert told(**window, use_sliding_window=True, layer_types=kinds)["window_attn_skip_freq"] == [1, 0]
    assert told(**window | {"use_sliding_window": True, "max_window_layers": 2})["window_size"] is None


def test_experts_of_deepseek():
    fields = {"model_type": "deepseek_v3", "n_routed_experts": 8, "moe_intermediate_size": 32, "n_shared_experts": 2}
    settings = told(**fields, first_k_dense_replace=1, n_group=1, topk_group=1)
    assert (settings["num_moe_experts"], settings["moe_shared_expert_intermediate_size"]) == (8, 64)
    assert settings["moe_layer_freq"] == [0, 1]
    assert settings["moe_router_num_groups"] is None
    assert (settings["moe_router_score_function"], settings["moe_router_enable_expert_bias"]) == ("sigmoid", True)
    assert told(**fields | {"model_type": "kimi_k2"}) == told(**fields)


def test_layers_without_experts_of_qwen():
    fields = {"model_type": "qwen3_moe", "num_hidden_layers": 4, "num_experts": 8, "moe_intermediate_size": 32}
    assert "moe_layer_freq" not in told(**fields)
    assert told(**fields, decoder_sparse_step=2)["moe_layer_freq"] == [0, 1, 0, 1]
    assert told(**fields, mlp_only_layers=[3])["moe_layer_freq"] == [1, 1, 1, 0]


def test_partial_rotary_embeddings_of_nemotron():
    nemotron = {key: value for key, value in LLAMA.items() if key != "rms_norm_eps"} | {"model_type": "nemotron"}
    assert from_fields(nemotron, "config.json")["rotary_percent"] == 0.5
    assert from_fields(nemotron | {"partial_rotary_factor": 0.25}, "config.json")["rotary_percent"] == 0.25
    parameters = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75}
    assert from_fields(nemotron | {"rope_parameters": parameters}, "config.json")["rotary_percent"] == 0.75


def test_the_text_part_of_a_multimodal_model_is_read():
    outer = {"model_type": "x_vl", "hidden_size": 1, "vision_config": {"depth": 3}, "tie_word_embeddings": True}
    settings = from_fields(outer | {"text_config": LLAMA}, "config.json")
    assert (settings["hidden_size"], settings["num_layers"]) == (64, 2)
    assert settings["share_embeddings_and_output_weights"] is True
    assert refused(text_config=[1]) == "text_config is not an object"


KNOWN = (
    "arcee, deepseek_v2, deepseek_v3, gpt2, kimi_k2, llama, mistral, mixtral, nemotron, nemotron_h, opt, qwen2, qwen2_moe, "
    "qwen3, qwen3_moe, starcoder2"
)
MAY_CHANGE = "mptq does not understand it, and it may change what the model computes"


@pytest.mark.parametrize("family", ["granite", "smollm3", "phi3", "olmo2", "gemma", "llama4", "\ud800"])
def test_an_unknown_family_is_refused_with_a_list_of_known_ones(family):
    assert refused(model_type=family, embedding_multiplier=12.0) == (
        f"mptq does not understand the config of model_type {family!r}, only those of {KNOWN}: omit --hf-config and pass "
        "settings that the checkpoint lacks as --config key=value"
    )


@pytest.mark.parametrize("family", [None, 3, ["llama"], {}])
def test_a_config_without_a_family_is_refused(family):
    assert refused(model_type=family) == f"it has no model_type: mptq understands the configs of {KNOWN}"


SCALINGS = "it must be 'default', 'linear', 'llama3' or 'yarn'"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, f"rope_scaling.rope_type is 'dynamic': {SCALINGS}"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}},
            f"rope_scaling.type is 'longrope': {SCALINGS}",
        ),
        (
            {"rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
            f"rope_parameters.mrope_section is [16, 24, 24]: {MAY_CHANGE}",
        ),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.2}},
            "rope_scaling is {'attention_factor': 1.2, 'factor': 4.0, 'rope_type': 'yarn'}: has attention_factor 1.2, which "
            "mptq supports only if yarn's mscale and mscale_all_dim imply it",
        ),
        ({"rope_scaling": {"factor": 4.0}}, "rope_scaling is {'factor': 4.0}: has a factor but no rope_type"),
        ({"embedding_multiplier": 12.0}, f"embedding_multiplier is 12.0: {MAY_CHANGE}"),
        ({"no_rope_layers": [1, 0]}, f"no_rope_layers is [1, 0]: {MAY_CHANGE}"),
        ({"use_rope": False}, f"use_rope is False: {MAY_CHANGE}"),
        ({"kv_lora_rank": 16}, f"kv_lora_rank is 16: {MAY_CHANGE}"),
        ({"attention_bias": True}, "attention_bias is True, but mptq supports this family only if it is False"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5, but mptq supports this family only if it is 1"),
        ({"sliding_window": 4096}, "sliding_window is 4096, but mptq supports this family only if it is 0"),
        (
            {"model_type": "deepseek_v3", "rope_interleave": False},
            "rope_interleave is False, but mptq supports this family only if it is True",
        ),
        (
            {"model_type": "deepseek_v3", "scoring_func": "softmax"},
            "scoring_func is 'softmax', but mptq supports this family only if it is 'sigmoid'",
        ),
        (
            {"model_type": "opt", "do_layer_norm_before": False, "rms_norm_eps": None, "hidden_act": None}
            | {"intermediate_size": None},
            "do_layer_norm_before is False, but mptq supports this family only if it is True",
        ),
    ],
)
def test_fields_that_may_change_the_model_are_refused_by_name(fields, message):
    assert refused(**fields) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads is 0: it must be greater than or equal to 1"),
        ({"hidden_size": "64"}, "hidden_size is '64': it must be a valid integer"),
        ({"hidden_size": 64.0}, "hidden_size is 64.0: it must be a valid integer"),
        ({"vocab_size": True}, "vocab_size is True: it must be a valid integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan: it must be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta is inf: it must be a finite number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes': it must be a valid boolean"),
        (
            {"layer_types": ["full_attention", "chunked_attention"]},
            "layer_types.1 is 'chunked_attention': it must be 'full_attention' or 'sliding_attention'",
        ),
        ({"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
        ({"rope_scaling": [1]}, "rope_scaling is [1]: it must be a valid dictionary or instance of Rope"),
        ({"hidden_act": "si\nlu"}, "hidden_act is 'si\\nlu': must be printable"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000: it must be less than or equal to 16384"),
        (
            {"hidden_size": -1, "vocab_size": "x", "foo": 1},
            f"foo is 1: {MAY_CHANGE}; hidden_size is -1: it must be greater than or equal to 1; "
            "vocab_size is 'x': it must be a valid integer",
        ),
    ],
)
def test_every_invalid_value_is_named(fields, message):
    assert refused(**fields) == message


def test_the_list_of_problems_is_limited():
    message = refused(**{f"key{index}": 1 for index in range(1000)})
    assert message.endswith("; and 988 more")
    assert message.count("mptq does not understand") == 12


def test_every_field_that_a_family_reads_is_typed_and_every_typed_one_is_read():
    assert {key for family in CONFIG_TYPES.values() for key in family.fields.split()} == set(Fields.model_fields)


def small(family):
    """Returns a small config of the family, built by its class in transformers, and the content of its file."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    sizes = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 100}
    latent = {"first_k_dense_replace": 1}
    other = {"nemotron_h": {"layers_block_type": ["mamba", "moe"]}, "opt": {"word_embed_proj_dim": 64}}
    sizes |= (other | {"deepseek_v3": latent, "kimi_k2": latent}).get(family, {})
    if family == "nemotron_h":
        del sizes["num_hidden_layers"]
    return CONFIG_MAPPING["deepseek_v3" if family == "kimi_k2" else family](**sizes)


@pytest.mark.parametrize("family", CONFIG_TYPES)
def test_what_transformers_saves_of_every_family_is_understood(family, tmp_path):
    small(family).save_pretrained(tmp_path)
    settings, _ = from_hf_config(tmp_path)
    assert (settings["num_layers"], settings["hidden_size"], settings["num_attention_heads"]) == (2, 64, 4)
    (tmp_path / "all.json").write_text(json.dumps(small(family).to_dict()))
    assert from_hf_config(tmp_path / "all.json")[0] == settings


@pytest.mark.parametrize("name", FAMILY_ARGS)
def test_what_mptq_writes_of_every_family_is_understood(name):
    """The settings read back are those of the model."""
    config = model(FAMILY_ARGS[name])
    family = family_of(config)
    fields = config_fields(config, family)
    class_ = getattr(transformers, family.config_class)
    read = from_fields(json.loads(json.dumps({"model_type": class_.model_type} | fields)), "config.json")
    # The number of positions with YaRN is larger than in the training arguments.
    positions = {"max_position_embeddings": config.max_position_embeddings}
    assert conflicts(("hf", read), ("args", dict(config.settings) | positions)) == []


# As published, including fields of remote code and of older versions of transformers.
PUBLISHED = {
    "DeepSeek-V3": """{"architectures": ["DeepseekV3ForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config"}, "bos_token_id": 0, "eos_token_id": 1,
        "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "initializer_range": 0.02,
        "intermediate_size": 18432, "kv_lora_rank": 512, "max_position_embeddings": 163840, "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1,
        "norm_topk_prob": true, "num_attention_heads": 128, "num_experts_per_tok": 8, "num_hidden_layers": 61,
        "num_key_value_heads": 128, "num_nextn_predict_layers": 1, "q_lora_rank": 1536, "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64, "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
        "weight_block_size": [128, 128]}, "rms_norm_eps": 1e-06, "rope_scaling": {"beta_fast": 32, "beta_slow": 1,
        "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 4096, "type": "yarn"},
        "rope_theta": 10000, "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": false,
        "topk_group": 4, "topk_method": "noaux_tc", "torch_dtype": "bfloat16", "transformers_version": "4.33.1",
        "use_cache": true, "v_head_dim": 128, "vocab_size": 129280}""",
    "Qwen2.5": """{"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
        "eos_token_id": 151645, "hidden_act": "silu", "hidden_size": 3584, "initializer_range": 0.02,
        "intermediate_size": 18944, "max_position_embeddings": 32768, "max_window_layers": 28, "model_type": "qwen2",
        "num_attention_heads": 28, "num_hidden_layers": 28, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
        "rope_theta": 1000000.0, "sliding_window": 131072, "tie_word_embeddings": false, "torch_dtype": "bfloat16",
        "transformers_version": "4.43.1", "use_cache": true, "use_sliding_window": false, "vocab_size": 152064}""",
    "Nemotron-H": """{"architectures": ["NemotronHForCausalLM"], "attention_bias": false, "attention_dropout": 0.0,
        "attention_head_dim": 128, "auto_map": {}, "bos_token_id": 1, "chunk_size": 128, "conv_kernel": 4,
        "eos_token_id": 12, "expand": 2, "hidden_dropout": 0.0, "hidden_size": 4096, "hybrid_override_pattern": "M-M*",
        "initializer_range": 0.02, "intermediate_size": 21504, "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64,
        "mamba_hidden_act": "silu", "mamba_num_heads": 128, "mamba_proj_bias": false, "max_position_embeddings": 8192,
        "mlp_bias": false, "mlp_hidden_act": "relu2", "model_type": "nemotron_h", "n_groups": 8, "num_attention_heads": 32,
        "num_hidden_layers": 4, "num_key_value_heads": 8, "num_logits_to_keep": 1, "num_query_groups": 8,
        "rescale_prenorm_residual": true, "residual_in_fp32": false, "rms_norm_eps": 1e-05, "sliding_window": null,
        "ssm_state_size": 128, "tie_word_embeddings": false, "time_step_floor": 0.0001, "time_step_limit": [0.0, Infinity],
        "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "use_bias": false, "use_cache": true,
        "use_conv_bias": true, "use_mamba_kernels": true, "vocab_size": 131072}""",
    "gpt2": """{"activation_function": "gelu_new", "architectures": ["GPT2LMHeadModel"], "attn_pdrop": 0.1,
        "bos_token_id": 50256, "embd_pdrop": 0.1, "eos_token_id": 50256, "initializer_range": 0.02,
        "layer_norm_epsilon": 1e-05, "model_type": "gpt2", "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
        "n_positions": 1024, "resid_pdrop": 0.1, "summary_activation": null, "summary_first_dropout": 0.1,
        "summary_proj_to_labels": true, "summary_type": "cls_index", "summary_use_proj": true,
        "task_specific_params": {"text-generation": {"do_sample": true, "max_length": 50}}, "vocab_size": 50257}""",
    "opt": """{"_name_or_path": "facebook/opt-125m", "_remove_final_layer_norm": false, "activation_dropout": 0.0,
        "activation_function": "relu", "architectures": ["OPTForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 2,
        "do_layer_norm_before": true, "dropout": 0.1, "eos_token_id": 2, "ffn_dim": 3072, "hidden_size": 768,
        "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 2048, "model_type": "opt",
        "num_attention_heads": 12, "num_hidden_layers": 12, "pad_token_id": 1, "prefix": "</s>",
        "torch_dtype": "float16", "transformers_version": "4.21.0.dev0", "use_cache": true, "vocab_size": 50272,
        "word_embed_proj_dim": 768}""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_understood(name):
    fields = json.loads(PUBLISHED[name])
    settings = from_fields(fields, "config.json")
    assert settings["num_layers"] == fields.get("num_hidden_layers", fields.get("n_layer"))
    assert (settings["vocab_size"], "layernorm_epsilon" in settings) == (fields["vocab_size"], True)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from(["llama", "moe", "yarn"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=6,
)
KEYS = sorted({key for family in CONFIG_TYPES.values() for key in (*family.fields.split(), *family.fixed)})


@given(
    family=st.sampled_from(sorted(CONFIG_TYPES)),
    changes=st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=20), JSON | st.integers(-1, 300), max_size=4),
    rope=st.none() | st.dictionaries(st.sampled_from(sorted(Rope.model_fields)), JSON | st.integers(0, 9), max_size=4),
)
def test_any_malformed_document_gives_a_one_line_error(family, changes, rope):
    args = from_args(ARGS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        fields = _saved(family) | changes | ({} if rope is None else {"rope_scaling": rope})
        file.write_text(json.dumps(fields), "utf-8", "surrogatepass")
        with suppress(MptqError):
            model_config(merge([SettingsSource("hf", _read(file)), SettingsSource("args", args)]), TENSORS)


def _read(file):
    """Returns the settings if the document is understood; otherwise checks that the error is one line."""
    try:
        return from_hf_config(file)[0]
    except CheckpointError as error:
        message = str(error)
    assert message.isprintable()
    return {}


@functools.cache
def _saved(family):
    return json.loads(json.dumps(small(family).to_dict()))


@given(JSON | st.binary(max_size=40))
def test_any_malformed_file_gives_a_one_line_error(content):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode("utf-8", "surrogatepass"))
        with pytest.raises(CheckpointError) as error:
            from_hf_config(file)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not valid JSON"),
        ("[1]", "is not a JSON object"),
        (None, r"cannot be read \(No such file or directory\)"),
        ("[" * 100_000, "is not valid JSON"),
        (b"\x80\x02", "is not valid JSON"),
    ],
)
def test_an_invalid_config_is_a_one_line_error(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=words) as error:
        from_hf_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_can_be_passed_instead_of_its_directory(tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(LLAMA))
    assert from_hf_config(file) == (told(), str(file))
