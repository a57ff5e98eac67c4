"""Settings from tensor shapes, in every layout; megatron-core's own tensors are in test_from_megatron_args.py."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptq.model.settings.from_tensor_shapes import from_tensors
from mptq.types import TensorSpec

LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": (64,),
    "self_attention.linear_qkv.weight": (96, 64),
    "self_attention.linear_proj.weight": (64, 64),
    "mlp.linear_fc1.layer_norm_weight": (64,),
    "mlp.linear_fc1.weight": (192, 64),
    "mlp.linear_fc2.weight": (64, 96),
}
OUTER = {"embedding.word_embeddings.weight": (128, 64), "decoder.final_layernorm.weight": (64,)}
LLAMA = {
    "num_layers": 3, "hidden_size": 64, "padded_vocab_size": 128, "share_embeddings_and_output_weights": True,
    "ffn_hidden_size": 96, "gated_linear_unit": True, "normalization": "RMSNorm", "add_bias_linear": False,
    "add_qkv_bias": False, "qk_layernorm": False, "multi_latent_attention": False, "num_moe_experts": None,
    "mtp_num_layers": None,
}  # fmt: skip


def told(tensors):
    return from_tensors({key: TensorSpec(key, "bfloat16", shape) for key, shape in tensors.items()})


def stacked(layer, layers=3, prefix="decoder.layers."):
    return {prefix + name: (layers, *shape) for name, shape in layer.items()}


def numbered(*layers, prefix="decoder.layers."):
    return {f"{prefix}{index}.{name}": shape for index, layer in enumerate(layers) for name, shape in layer.items()}


def split(layer):
    """Returns the layer with its gated fc1 split in two, as heterogeneous models store it."""
    rest = {name: shape for name, shape in layer.items() if name != "mlp.linear_fc1.weight"}
    return rest | {f"mlp.linear_fc1.weight_{half}": (96, 64) for half in "wv"}


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "model0.", "module.module."])
@pytest.mark.parametrize("layers", [stacked(LAYER), numbered(LAYER, LAYER, LAYER), numbered(*[split(LAYER)] * 3)])
def test_every_layout_gives_the_same_settings(prefix, layers):
    assert told({prefix + key: shape for key, shape in (OUTER | layers).items()}) == LLAMA


def test_the_optimizer_quantizers_and_extra_states_are_ignored():
    foreign = {
        "optimizer.state.exp_avg.decoder.layers.mlp.linear_fc2.weight": (9, 64, 7),
        "chained_0.optimizer.state.fp32_param.embedding.word_embeddings.weight": (9, 9),
        "decoder.layers.0.mlp.linear_fc1.weight_quantizer._amax": (1,),
        "decoder.layers.9.mlp.linear_fc1._extra_state": (),
        "rng_state": (1, 1),
    }
    assert told(OUTER | stacked(LAYER) | foreign) == LLAMA


def test_an_output_layer_biases_and_learned_positions():
    gpt = {
        "self_attention.linear_qkv.layer_norm_bias": (64,),
        "self_attention.linear_qkv.bias": (96,),
        "self_attention.linear_proj.bias": (64,),
        "mlp.linear_fc1.weight": (96, 64),
    }
    outer = OUTER | {"output_layer.weight": (128, 64), "embedding.position_embeddings.weight": (512, 64)}
    found = told(outer | stacked(LAYER | gpt))
    assert (found["normalization"], found["add_bias_linear"], found["add_qkv_bias"]) == ("LayerNorm", True, True)
    assert (found["gated_linear_unit"], found["share_embeddings_and_output_weights"]) == (False, False)
    assert (found["position_embedding_type"], found["max_position_embeddings"]) == ("learned_absolute", 512)


def test_a_qkv_bias_alone():
    found = told(OUTER | stacked(LAYER | {"self_attention.linear_qkv.bias": (96,)}))
    assert (found["add_bias_linear"], found["add_qkv_bias"]) == (False, True)


MOE = {name: shape for name, shape in LAYER.items() if "fc1.weight" not in name and "fc2" not in name}
MOE |= {"mlp.router.weight": (8, 64)}
EXPERTS = {
    "stacked": {"mlp.experts.experts.linear_fc1.weight": (8, 64, 64), "mlp.experts.experts.linear_fc2.weight": (8, 64, 32)},
    "numbered": {
        f"mlp.experts.experts.{expert}.linear_fc{linear}.weight": (64, 64 // linear) for expert in range(8) for linear in (1, 2)
    },
}


@pytest.mark.parametrize("experts", EXPERTS)
def test_experts(experts):
    found = told(OUTER | stacked(MOE | EXPERTS[experts]))
    assert (found["num_moe_experts"], found["moe_ffn_hidden_size"], found["gated_linear_unit"]) == (8, 32, True)
    assert found["moe_shared_expert_intermediate_size"] is None
    assert not {"ffn_hidden_size", "moe_layer_freq"} & set(found)


def test_shared_experts_biases_of_experts_and_dense_layers_between():
    shared = {"mlp.shared_experts.linear_fc2.weight": (64, 48), "mlp.shared_experts.gate_weight": (1, 64)}
    moe = MOE | EXPERTS["stacked"] | shared | {"mlp.router.expert_bias": (8,)}
    found = told(OUTER | numbered(LAYER, moe, moe))
    assert (found["moe_shared_expert_intermediate_size"], found["moe_shared_expert_gate"]) == (48, True)
    assert found["moe_router_enable_expert_bias"] is True
    assert (found["moe_layer_freq"], found["ffn_hidden_size"], found["moe_ffn_hidden_size"]) == ([0, 1, 1], 96, 32)


@pytest.mark.parametrize("fused", [False, True])
def test_latent_attention(fused):
    down = {"linear_qkv_down_proj.weight": (24 + 16 + 8, 64)} if fused else {
        "linear_q_down_proj.weight": (24, 64), "linear_kv_down_proj.weight": (16 + 8, 64),
    }  # fmt: skip
    attention = down | {"linear_q_up_proj.weight": (80, 24), "linear_kv_up_proj.weight": (96, 16)}
    attention |= {"kv_layernorm.weight": (16,), "linear_proj.weight": (64, 48)}
    mlp = {name: shape for name, shape in LAYER.items() if name.startswith("mlp")}
    found = told(OUTER | stacked(mlp | {f"self_attention.{name}": shape for name, shape in attention.items()}))
    assert (found["multi_latent_attention"], found["q_lora_rank"], found["kv_lora_rank"]) == (True, 24, 16)
    assert (found["qk_pos_emb_head_dim"], found["qk_layernorm"]) == (8, True)


def test_the_pattern_of_a_hybrid_model():
    mamba = {"mixer.in_proj.weight": (200, 64), "mixer.in_proj.layer_norm_weight": (64,)}
    attention = {name: shape for name, shape in LAYER.items() if name.startswith("self_attention")}
    mlp = {name: shape for name, shape in LAYER.items() if name.startswith("mlp")}
    experts = {"mlp.router.weight": (8, 64)} | EXPERTS["stacked"]
    found = told(OUTER | numbered(mamba, attention, mlp, experts, mamba))
    assert (found["hybrid_layer_pattern"], found["is_hybrid_model"], found["num_layers"]) == ("M*-EM", True, 5)
    assert told(OUTER | numbered(mamba, mamba))["hybrid_layer_pattern"] == "MM"
    assert "hybrid_layer_pattern" not in told(OUTER | stacked(LAYER))


def test_multi_token_prediction_layers():
    mtp = numbered({"eh_proj.weight": (64, 128)}, {"eh_proj.weight": (64, 128)}, prefix="mtp.layers.")
    found = told(OUTER | stacked(LAYER) | mtp)
    assert (found["mtp_num_layers"], found["num_layers"]) == (2, 3)


def test_sinks():
    assert told(OUTER | stacked(LAYER | {"self_attention.core_attention.softmax_offset": (4,)}))["softmax_type"] == "learnable"


def test_a_huge_stack_is_ignored():
    assert told({"decoder.layers.mlp.linear_fc2.weight": (10**15, 1, 1)}) == {}
    assert told({f"decoder.layers.{'9' * 5000}.mlp.linear_fc2.weight": (64, 96)}).keys() >= {"num_layers"}


def test_no_model():
    assert told({}) == {}
    assert told({"something.else": (3,)}) == {}


@given(st.dictionaries(st.sampled_from([*OUTER, *stacked(LAYER), *numbered(MOE)]), st.lists(st.integers(0, 9), max_size=4)))
def test_any_shapes_under_known_names_are_read(tensors):
    assert isinstance(told({key: tuple(shape) for key, shape in tensors.items()}), dict)
