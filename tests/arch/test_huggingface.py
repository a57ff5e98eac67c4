"""A Hugging Face config says the same as the arguments of the training run that made its model."""

import json

import pytest

from mptq.arch.arguments import from_args
from mptq.arch.families import family_of
from mptq.arch.hf_config import config_fields
from mptq.arch.huggingface import from_fields, from_hf_config
from mptq.arch.settings import Rung, merge
from mptq.checkpoint.index import open_checkpoint
from mptq.errors import CheckpointError
from mptq.plan import open_source
from tests.zoo import ZOO

# The config of Gemma has what no argument of Megatron-LM says; those of the others have families to be written as.
WRITTEN = sorted(set(ZOO) - {"gemma", "gpt-oss", "partial-rotary"})
SIZES = {"num_layers", "hidden_size", "num_attention_heads", "vocab_size", "max_position_embeddings", "activation_func"}


def conflicts(*pairs):
    return [str(conflict) for conflict in merge([Rung(source, entries) for source, entries in pairs]).conflicts]


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
    import transformers

    model = open_source(zoo(name) / "ckpt").model
    family = family_of(model)
    fields = getattr(transformers, family.config_class)(**config_fields(model, family)).to_dict()
    told = from_fields(fields)
    assert conflicts(("hf", told), ("args", model.settings)) == []
    assert set(told) >= SIZES


LLAMA = {
    "model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96,
    "vocab_size": 100, "rms_norm_eps": 1e-6, "hidden_act": "silu",
}  # fmt: skip


def test_fields_that_are_absent_are_those_of_other_fields():
    settings = from_fields(LLAMA)
    assert (settings["num_query_groups"], settings["kv_channels"]) == (4, 16)
    assert (settings["normalization"], settings["layernorm_epsilon"]) == ("RMSNorm", 1e-6)
    assert (settings["activation_func"], settings["gated_linear_unit"], settings["add_bias_linear"]) == ("silu", True, False)


@pytest.mark.parametrize("where", ["rope_parameters", "rope_scaling"])
def test_rotary_scaling_of_old_and_new_transformers(where):
    scaling = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    settings = from_fields(LLAMA | {where: scaling})
    assert (settings["rope_scaling"], settings["rope_scaling_factor"], settings["rotary_base"]) == (True, 32.0, 500000.0)
    assert (settings["rope_low_freq_factor"], settings["rope_original_max_position_embeddings"]) == (1.0, 8192)
    assert from_fields(LLAMA | {where: {"type": "linear", "factor": 4.0}})["seq_len_interpolation_factor"] == 4.0


def test_yarn_has_other_names_in_latent_attention():
    yarn = {"rope_scaling": {"type": "yarn", "factor": 40, "beta_fast": 32, "mscale": 0.7}}
    plain = from_fields(LLAMA | yarn)
    assert (plain["position_embedding_type"], plain["yarn_rotary_scaling_factor"], plain["yarn_mscale"]) == ("yarn", 40, 0.7)
    latent = from_fields(LLAMA | yarn | {"model_type": "deepseek_v3", "kv_lora_rank": 16})
    assert (latent["rope_type"], latent["rotary_scaling_factor"], latent["beta_fast"]) == ("yarn", 40, 32)
    assert "kv_channels" not in latent


def test_a_window_is_counted_without_the_token_itself_and_only_where_it_is_used():
    assert from_fields(LLAMA | {"sliding_window": 4096})["window_size"] == [4095, 0]
    assert "window_size" not in from_fields(LLAMA | {"sliding_window": 4096, "use_sliding_window": False})


def test_experts_of_deepseek():
    fields = {"model_type": "deepseek_v3", "n_routed_experts": 8, "moe_intermediate_size": 32, "n_shared_experts": 2}
    settings = from_fields(LLAMA | fields | {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1})
    assert (settings["num_moe_experts"], settings["moe_shared_expert_intermediate_size"]) == (8, 64)
    assert settings["moe_layer_freq"] == [0, 1]
    assert settings["moe_router_num_groups"] is None
    assert (settings["moe_router_score_function"], settings["moe_router_enable_expert_bias"]) == ("sigmoid", True)


def test_the_text_part_of_a_model_with_images_is_read():
    settings = from_fields({"model_type": "x_vl", "hidden_size": 1, "text_config": LLAMA})
    assert (settings["hidden_size"], settings["num_layers"]) == (64, 2)


def test_an_unknown_family_says_only_what_its_fields_say():
    settings = from_fields({"model_type": "new", "hidden_size": 64})
    assert settings == {"hidden_size": 64}


@pytest.mark.parametrize(("content", "words"), [("", "no JSON"), ("[1]", "no JSON object"), (None, "does not exist")])
def test_what_is_no_config_is_one_line(tmp_path, content, words):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=words) as error:
        from_hf_config(tmp_path)
    assert "\n" not in str(error.value)


def test_a_file_can_be_given_instead_of_its_directory(tmp_path):
    file = tmp_path / "other.json"
    file.write_text(json.dumps(LLAMA))
    assert from_hf_config(file) == (from_fields(LLAMA), str(file))
