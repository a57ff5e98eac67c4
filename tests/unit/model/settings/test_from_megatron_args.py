"""Arguments are translated to the same settings as by megatron-core itself."""

import json
from pathlib import Path

import pytest

from mptq.checkpoint.pickles import Inert
from mptq.checkpoint.sources import load_yaml
from mptq.checkpoint.torch_zip import load_torch_file
from mptq.model.settings.from_megatron_args import from_args
from mptq.model.settings.from_run_config import from_document, unread
from mptq.model.settings.from_tensor_shapes import from_tensors
from mptq.model.settings.run_config_fields import NEUTRAL
from mptq.model.settings.settings import KINDS, agree
from mptq.types import TensorSpec
from tests.support.processes import ROOT, checked, python

BASE = {
    "num-layers": 4, "hidden-size": 64, "num-attention-heads": 4, "seq-length": 32, "max-position-embeddings": 128,
    "vocab-size": 100, "tokenizer-type": "NullTokenizer", "micro-batch-size": 1, "train-iters": 1, "lr": 1,
    "transformer-impl": "local", "distributed-backend": "gloo",
}  # fmt: skip
FLAGS = ["no-rope-fusion", "no-persist-layer-norm", "no-gradient-accumulation-fusion", "no-masked-softmax-fusion"]
LLAMA = {"normalization": "RMSNorm", "position-embedding-type": "rope", "norm-epsilon": 1e-6, "rotary-base": 500000}
CASES = {
    "model-gpt": ({}, []),
    "gpt-unfused": ({}, ["no-bias-gelu-fusion"]),
    "gpt-no-bias": ({}, ["disable-bias-linear"]),
    "model-llama": (LLAMA, ["swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights", "bf16"]),
    "model-gqa": (LLAMA | {"num-query-groups": 2, "kv-channels": 32}, ["swiglu", "group-query-attention", "qk-layernorm"]),
    "model-mqa": (LLAMA | {"num-query-groups": 1}, ["swiglu", "group-query-attention", "add-qkv-bias", "disable-bias-linear"]),
    "llama3": (LLAMA | {"rope-scaling-factor": 8.0}, ["swiglu", "use-rope-scaling"]),
    "interpolated": (LLAMA | {"rotary-percent": 0.5, "rotary-seq-len-interpolation-factor": 4}, ["swiglu"]),
    "model-plain": ({"position-embedding-type": "rope"}, ["squared-relu", "disable-bias-linear"]),
    "nemotron": ({"position-embedding-type": "rope"}, ["squared-relu", "apply-layernorm-1p", "disable-bias-linear"]),
    "quick": ({"glu-linear-offset": 1.0, "activation-func-clamp-value": 7.0}, ["quick-geglu", "no-bias-gelu-fusion"]),
    "window": ({"window-size": "16,0", "window-attn-skip-freq": 2, "softmax-type": "learnable"}, []),
    "window-list": ({"window-size": "16,0", "window-attn-skip-freq": "[1,1,1,0]"}, []),
    "no-rope": (LLAMA | {"no-rope-freq": 2}, ["swiglu"]),
    "model-moe": (
        LLAMA | {"num-experts": 4, "moe-router-topk": 2, "moe-token-dispatcher-type": "allgather"},
        ["swiglu", "disable-bias-linear"],
    ),
    "model-deepseek": (
        LLAMA
        | {"num-experts": 8, "moe-router-topk": 4, "moe-ffn-hidden-size": 48, "moe-layer-freq": "([0]*1+[1]*3)"}
        | {"moe-shared-expert-intermediate-size": 96, "moe-router-score-function": "sigmoid", "moe-router-num-groups": 4}
        | {"moe-router-group-topk": 2, "moe-router-topk-scaling-factor": 2.5, "q-lora-rank": 24, "kv-lora-rank": 16}
        | {"qk-head-dim": 12, "qk-pos-emb-head-dim": 8, "v-head-dim": 12, "rotary-scaling-factor": 40, "mscale": 0.7}
        | {"moe-token-dispatcher-type": "allgather", "moe-router-dtype": "fp32", "mtp-num-layers": 1},
        ["swiglu", "disable-bias-linear", "multi-latent-attention", "moe-router-enable-expert-bias", "qk-layernorm"],
    ),
    "model-mla-rope": (
        LLAMA | {"kv-lora-rank": 16, "qk-head-dim": 12, "qk-pos-emb-head-dim": 8, "rope-type": "rope"},
        ["swiglu", "disable-bias-linear", "multi-latent-attention"],
    ),
    "moe-capacity": (
        LLAMA | {"num-experts": 4, "moe-expert-capacity-factor": -1, "moe-token-dispatcher-type": "allgather"},
        ["swiglu", "moe-router-pre-softmax"],
    ),
    "yarn": (
        LLAMA | {"position-embedding-type": "yarn", "rotary-scaling-factor": 32, "yarn-original-max-position-embeddings": 64},
        ["swiglu"],
    ),
    "model-moe-shared": (
        LLAMA | {"num-experts": 4, "moe-shared-expert-intermediate-size": 48, "moe-token-dispatcher-type": "allgather"},
        ["swiglu", "disable-bias-linear", "moe-shared-expert-gate"],
    ),
    "linear-attention": (
        LLAMA | {"experimental-attention-variant": "gated_delta_net", "linear-attention-freq": 4, "linear-num-value-heads": 16},
        ["swiglu", "attention-output-gate", "disable-bias-linear"],
    ),
    "hybrid": ({"hybrid-layer-pattern": "M*M-"}, ["disable-bias-linear"]),
    "mup": (LLAMA | {"mup-base-hidden-size": 32}, ["swiglu", "use-mup"]),
    "null-eod": ({"null-tokenizer-eod-id": 100}, []),
    "null-eod-within": ({"null-tokenizer-eod-id": 7, "null-tokenizer-pad-id": 8}, []),
    "null-multimodal": ({"tokenizer-type": "NullMultimodalTokenizer"}, []),
}
# Names in GPTModelConfig that differ from the setting's; settings without a field there come only from the arguments.
GPT = {"max_position_embeddings": "seq_length", "seq_length": None, "vocab_size": None, "padded_vocab_size": "vocab_size"}
GPT |= {"tokenizer_model": None, "tokenizer_type": None, "params_dtype": None, "hybrid_layer_pattern": None}
GPT |= {"heterogeneous_layers_config_path": None, "heterogeneous_layers_config_encoded_json": None}


SAID_BY_BOTH = {"activation_func", "gated_linear_unit", "layernorm_epsilon", "num_query_groups", "position_embedding_type"}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """Returns the arguments and configs of all cases, built by megatron-core."""
    out = tmp_path_factory.mktemp("configs")
    cases = {
        name: [part for key, value in (BASE | options).items() for part in (f"--{key}", str(value))]
        + [f"--{flag}" for flag in [*FLAGS, *flags]]
        for name, (options, flags) in CASES.items()
    }
    (out / "cases.json").write_text(json.dumps(cases))
    checked(python(ROOT / "tests/support/megatron_configs.py", out / "cases.json", out))
    return out


def expected(name, config):
    """Returns the value of a setting in megatron-core's configs, in the form of a setting."""
    if name in GPT:
        return config["gpt"].get(GPT[name])
    if name not in config["transformer"]:
        return config["gpt"][name]
    value = config["transformer"][name]
    if name == "activation_func" and value == "gelu" and config["transformer"]["bias_activation_fusion"]:
        return "gelu_tanh"
    return value


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_settings_are_the_fields_of_megatrons_own_config(built, case):
    args = load_torch_file(built / f"{case}.pt", case)["args"].state
    config = json.loads((built / f"{case}.json").read_text())
    settings = from_args(args)
    compared = [key for key in settings if GPT.get(key, key) is not None]
    assert {key: settings[key] for key in compared} == {key: expected(key, config) for key in compared}
    fields = set(config["transformer"]) & set(KINDS)
    missing = fields - set(settings) - {"moe_router_topk_limited_devices"}
    assert not {key for key in missing if key in args}, "an argument of the run that is not among its settings"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["model-gpt", "null-eod", "null-eod-within", "null-multimodal"])
def test_the_vocabulary_has_every_id_of_megatrons_own_null_tokenizers(built, case):
    args = load_torch_file(built / f"{case}.pt", case)["args"].state
    tokenizer = json.loads((built / f"{case}.json").read_text())["tokenizer"]
    assert from_args(args)["vocab_size"] == max(tokenizer["vocab_size"], tokenizer["eod"] + 1)


@pytest.mark.slow
@pytest.mark.parametrize("case", [name for name in CASES if name.startswith("model-")])
def test_the_shapes_of_megatrons_own_tensors_agree_with_its_arguments(built, case):
    config = json.loads((built / f"{case}.json").read_text())
    args = load_torch_file(built / f"{case}.pt", case)["args"].state
    told = from_tensors({key: TensorSpec(key, "float32", tuple(shape)) for key, shape in config["shapes"].items()})
    settings = from_args(args)
    assert {key: value for key, value in told.items() if not agree(key, value, settings[key])} == {}
    size = "moe_ffn_hidden_size" if args["num_experts"] else "ffn_hidden_size"
    assert {"num_layers", "hidden_size", "padded_vocab_size", "normalization", "gated_linear_unit", size} <= set(told)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_run_config_gives_the_same_settings_as_the_arguments(built, case):
    args = from_args(load_torch_file(built / f"{case}.pt", case)["args"].state)
    told = from_document(load_yaml(built / f"{case}.yaml"))
    # A provider's vocabulary includes the padding, and its sequence length is its number of positions.
    args |= {"vocab_size": args["padded_vocab_size"], "seq_length": args["max_position_embeddings"]}
    if args.get("multi_latent_attention"):
        del args["rotary_base"]  # the default of GPTModelConfig hides that of MLATransformerConfig
    assert {key: told[key] for key in told if key in args and not agree(key, told[key], args[key])} == {}
    assert told.keys() >= SAID_BY_BOTH


@pytest.mark.slow
def test_every_field_of_megatrons_configs_is_read_or_known_to_change_nothing(built):
    """New fields must be added to run_config_fields.py or settings.py (and supported.py if they change the model)."""
    config = json.loads((built / "model-deepseek.json").read_text())
    assert {*config["transformer"], *config["gpt"]} - {*KINDS, *NEUTRAL, "_cpu_offloading_context"} == set()
    assert NEUTRAL.isdisjoint(KINDS)
    assert unread(load_yaml(built / "model-deepseek.yaml")) == []


@pytest.mark.parametrize(
    ("spec", "pattern", "key", "name"),
    [
        (["local"], None, "transformer_layer_spec", "local"),
        (["my.specs", "my_layer_spec"], None, "transformer_layer_spec", "my_layer_spec"),
        (["megatron.core.models.mamba.mamba_layer_specs", "mamba_stack_spec"], "M*", "hybrid_stack_spec", "mamba_stack_spec"),
    ],
)
def test_a_spec_is_named(spec, pattern, key, name):
    assert from_args({"spec": spec, "hybrid_layer_pattern": pattern})[key] == name
    assert "transformer_layer_spec" not in from_args({"spec": None})


OLD = {"norm_epsilon": 1e-6, "apply_layernorm_1p": True, "num_experts": 8, "ffn_hidden_size": 64, "moe_ffn_hidden_size": None}


NEW = {"null_tokenizer_eod_id": None, "null_tokenizer_pad_id": -1}
PADDED = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 2}


@pytest.mark.parametrize(
    ("args", "size"),
    [
        ({"tokenizer_type": "NullTokenizer"}, 501),  # up to 0.17
        ({"tokenizer_type": "NullTokenizer"} | NEW, 500),
        ({"tokenizer_type": "NullTokenizer"} | NEW | {"null_tokenizer_eod_id": 2}, 500),
        ({"tokenizer_type": "NullTokenizer"} | NEW | {"null_tokenizer_eod_id": 510}, 511),
        ({"tokenizer_type": "NullMultimodalTokenizer"} | NEW, 501),
        ({"tokenizer_type": "NullMultimodalTokenizer"}, 501),
        ({"tokenizer_type": "TikTokenizer", "padded_vocab_size": 768} | PADDED, 500),
        ({"tokenizer_type": "HuggingFaceTokenizer"}, 500),
        ({"tokenizer_type": "HuggingFaceTokenizer", "padded_vocab_size": 512} | PADDED, 500),
        ({"tokenizer_type": "HuggingFaceTokenizer", "padded_vocab_size": 768} | PADDED, None),
        ({"tokenizer_type": "HuggingFaceTokenizer", "padded_vocab_size": 768}, 500),
        ({}, 500),
    ],
)
def test_the_vocabulary_is_that_of_the_tokenizer(args, size):
    """NullTokenizers add their end of document; others ignore --vocab-size, so the padding need not match it."""
    assert from_args({"vocab_size": 500} | args)["vocab_size"] == size


def test_a_vocabulary_that_is_not_a_size_is_left_to_the_checks():
    assert from_args({"vocab_size": -1, "tokenizer_type": "NullTokenizer"})["vocab_size"] == -1
    assert from_args({"vocab_size": None, "tokenizer_type": "HuggingFaceTokenizer"})["vocab_size"] is None


def test_a_pattern_that_is_not_a_string_is_left_to_the_checks():
    assert from_args({"hybrid_layer_pattern": True})["hybrid_layer_pattern"] is True


def test_names_of_older_versions():
    settings = from_args(OLD | {"hybrid_override_pattern": "ME", "untie_embeddings_and_output_weights": True})
    assert settings["layernorm_epsilon"] == 1e-6
    assert settings["layernorm_zero_centered_gamma"] is True
    assert (settings["num_moe_experts"], settings["moe_ffn_hidden_size"]) == (8, 64)
    assert (settings["hybrid_layer_pattern"], settings["is_hybrid_model"]) == ("ME", True)
    assert settings["share_embeddings_and_output_weights"] is False


def test_the_length_before_yarn_of_latent_attention_in_0_13():
    mla = {"multi_latent_attention": True, "kv_lora_rank": 16, "max_position_embeddings": 8192}
    assert from_args(mla)["original_max_position_embeddings"] == 8192
    assert from_args(mla | {"cache_mla_latents": False})["original_max_position_embeddings"] == 4096


def test_an_absent_argument_gives_no_setting():
    assert from_args({}) == {}
    assert from_args({"num_layers": 3}) == {"num_layers": 3}


def test_objects_become_strings_or_nothing():
    inert = type("bfloat16", (Inert,), {"global_name": "torch.bfloat16"})
    member = type("Score", (Inert,), {"global_name": "x.Score"})(5)
    assert from_args({"params_dtype": inert, "moe_router_score_function": member}) == {"params_dtype": "bfloat16"}
