"""The names of a model's tensors, and how rows are divided among them."""

import pytest
import torch

from mptq.model.tensors import UnquantizedTensor, hf_layer, layer_copies, layer_linears, outer_copies
from tests.support.models import ARGS, FAMILY_ARGS, HYBRID, LATENT, MOE_ARGS, OSS_ARGS, model

CONFIG, MOE = model(ARGS), model(MOE_ARGS)


def hf_names(config, layer=0):
    """Returns the shape of every Hugging Face tensor of a layer, by name without the prefix."""
    found = {f"{name}.weight": shape for linear in layer_linears(config, layer) for name, shape in linear.members}
    for copy in layer_copies(config, layer):
        found |= dict(zip(copy.hf, copy.hf_shapes, strict=True))
    return found


def test_members_of_linears():
    qkv, proj, fc1, fc2 = layer_linears(CONFIG, 0)
    assert qkv.shape == (128, 64)
    assert qkv.members == (
        ("self_attn.q_proj", (64, 64)),
        ("self_attn.k_proj", (32, 64)),
        ("self_attn.v_proj", (32, 64)),
    )
    assert (proj.shape, fc1.shape, fc2.shape) == ((64, 64), (192, 64), (64, 96))
    assert (fc1.keys, fc1.key_rows, fc2.key_rows) == (("weight_w", "weight_v"), (96, 96), (64,))
    assert qkv.crosses(128)
    assert not qkv.fits((128, 128))
    assert not qkv.crosses(None)
    assert qkv.fits((1, 1))
    assert not proj.crosses(128)


def test_linears_and_copies_of_a_mixture():
    linears = layer_linears(MOE, 1)
    assert len(linears) == 2 + 2 * 8
    fc1, fc2 = linears[-2:]
    assert (fc1.megatron, fc1.module) == ("mlp.experts.experts.7.linear_fc1", "mlp.experts.local_experts.7.linear_fc1")
    assert (fc1.expert, fc1.kind) == (7, "linear_fc1")
    assert fc1.members == (("block_sparse_moe.experts.7.w1", (48, 64)), ("block_sparse_moe.experts.7.w3", (48, 64)))
    assert fc2.members == (("block_sparse_moe.experts.7.w2", (64, 48)),)
    router = layer_copies(MOE, 1)[-1]
    assert (router.megatron, router.hf, router.hf_shapes) == (
        "mlp.router.weight",
        ("block_sparse_moe.gate.weight",),
        ((8, 64),),
    )
    assert all(linear.module == linear.megatron for linear in layer_linears(CONFIG, 0))


def test_layers_without_experts_are_dense():
    config = model(MOE_ARGS | {"moe_layer_freq": [0, 1]})
    assert [len(layer_linears(config, layer)) for layer in (0, 1)] == [4, 18]
    assert [any("router" in copy.megatron for copy in layer_copies(config, layer)) for layer in (0, 1)] == [False, True]


NORMS = {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
ATTENTION = {
    "self_attn.q_proj.weight": (64, 64),
    "self_attn.k_proj.weight": (32, 64),
    "self_attn.v_proj.weight": (32, 64),
    "self_attn.o_proj.weight": (64, 64),
}
MLP = {"mlp.gate_proj.weight": (96, 64), "mlp.up_proj.weight": (96, 64), "mlp.down_proj.weight": (64, 96)}
QKV_BIASES = {"self_attn.q_proj.bias": (64,), "self_attn.k_proj.bias": (32,), "self_attn.v_proj.bias": (32,)}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Llama", NORMS | ATTENTION | MLP),
        ("Mistral", NORMS | ATTENTION | MLP),
        ("Qwen2", NORMS | ATTENTION | MLP | QKV_BIASES),
        (
            "Nemotron",
            NORMS
            | ATTENTION
            | {"mlp.up_proj.weight": (96, 64), "mlp.down_proj.weight": (64, 96)}
            | {"input_layernorm.bias": (64,), "post_attention_layernorm.bias": (64,)},
        ),
        (
            "StarCoder2",
            NORMS
            | ATTENTION
            | QKV_BIASES
            | {"input_layernorm.bias": (64,), "post_attention_layernorm.bias": (64,), "self_attn.o_proj.bias": (64,)}
            | {"mlp.c_fc.weight": (96, 64), "mlp.c_fc.bias": (96,), "mlp.c_proj.weight": (64, 96), "mlp.c_proj.bias": (64,)},
        ),
    ],
)
def test_all_tensors_of_a_dense_layer(name, expected):
    assert hf_names(model(FAMILY_ARGS[name])) == expected


def test_norms_of_query_and_key_are_of_a_head():
    names = hf_names(model(FAMILY_ARGS["Qwen3"]))
    assert (names["self_attn.q_norm.weight"], names["self_attn.k_norm.weight"]) == ((32,), (32,))


def test_all_tensors_of_multi_latent_attention():
    names = hf_names(model(LATENT | {"q_lora_rank": 24}))
    assert {name: shape for name, shape in names.items() if name.startswith("self_attn")} == {
        "self_attn.q_a_proj.weight": (24, 64),
        "self_attn.q_a_layernorm.weight": (24,),
        "self_attn.q_b_proj.weight": (4 * 24, 24),
        "self_attn.kv_a_proj_with_mqa.weight": (40, 64),
        "self_attn.kv_a_layernorm.weight": (32,),
        "self_attn.kv_b_proj.weight": (4 * 32, 32),
        "self_attn.o_proj.weight": (64, 64),
    }
    without = hf_names(model(LATENT))
    assert without["self_attn.q_proj.weight"] == (4 * 24, 64)
    assert not {name for name in without if "q_a" in name or "q_b" in name}


def test_all_tensors_of_a_mamba_layer():
    config = model(HYBRID)
    inner, states, heads = 8 * 16, 2 * 8, 8
    assert hf_names(config) == {
        "norm.weight": (64,),
        "mixer.in_proj.weight": (2 * inner + 2 * states + heads, 64),
        "mixer.conv1d.weight": (inner + 2 * states, 1, 4),
        "mixer.conv1d.bias": (inner + 2 * states,),
        "mixer.A_log": (heads,),
        "mixer.D": (heads,),
        "mixer.dt_bias": (heads,),
        "mixer.norm.weight": (inner,),
        "mixer.out_proj.weight": (64, inner),
    }
    (projection, _) = layer_linears(config, 0)
    assert (projection.key_rows, hf_layer(config, 3)) == ((inner, inner, states, states, heads), "backbone.layers.3.")
    assert [len(layer_linears(config, layer)) for layer in range(5)] == [2, 2, 2, 2, 8]
    assert [copy.hf[0] for layer in (1, 2, 4) for copy in layer_copies(config, layer)][:3] == ["norm.weight"] * 3


def test_sinks_biases_and_routers():
    config = model(OSS_ARGS)
    copies = {copy.megatron: copy for copy in layer_copies(config, 0)}
    assert copies["self_attention.core_attention.softmax_offset"].shape == (4,)
    assert copies["mlp.router.bias"].shape == (8,)
    bias = copies["mlp.experts.experts.3.linear_fc1.bias"]
    assert (bias.shape, bias.hf_shapes, bias.keys) == ((96,), ((48,), (48,)), ("bias_w", "bias_v"))
    assert bias.parameter == "mlp.experts.local_experts.3.linear_fc1.bias"
    balanced = {copy.megatron: copy for copy in layer_copies(model(FAMILY_ARGS["DeepSeek-V3"]), 1)}["mlp.router.expert_bias"]
    assert (balanced.hf, balanced.exact) == (("mlp.gate.e_score_correction_bias",), True)


def test_tensors_outside_the_layers():
    before, after = outer_copies(CONFIG)
    assert [(copy.megatron, copy.hf, copy.shape) for copy in (*before, *after)] == [
        ("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), (128, 64)),
        ("decoder.final_layernorm.weight", ("model.norm.weight",), (64,)),
        ("output_layer.weight", ("lm_head.weight",), (128, 64)),
    ]
    assert before[0].hf_shapes == after[-1].hf_shapes == ((100, 64),)
    tied = outer_copies(model(ARGS | {"untie_embeddings_and_output_weights": False}))
    assert [copy.megatron for copy in tied[1]] == ["decoder.final_layernorm.weight"]
    hybrid = outer_copies(model(HYBRID))
    assert (hybrid[1][0].megatron, hybrid[1][0].hf[0]) == ("decoder.final_norm.weight", "backbone.norm_f.weight")


def test_opt_has_two_rows_before_the_first_position():
    (words, positions), after = outer_copies(model(FAMILY_ARGS["OPT"]))
    assert (positions.megatron, positions.hf) == (
        "embedding.position_embeddings.weight",
        ("model.decoder.embed_positions.weight",),
    )
    assert (positions.shape, positions.hf_shapes) == ((512, 64), ((514, 64),))
    table = torch.randn(512, 64)
    (found,) = positions.for_hf(table)
    assert torch.equal(found[2:], table)
    assert not found[:2].any()
    (cut,) = words.for_hf(torch.randn(128, 64))
    assert cut.shape == (100, 64)
    assert [copy.hf[0] for copy in after][:2] == [
        "model.decoder.final_layer_norm.weight",
        "model.decoder.final_layer_norm.bias",
    ]


def test_a_carried_tensor_has_no_hugging_face_name():
    copy = UnquantizedTensor("mtp.layers.0.enorm.weight", (), (64,), 64)
    assert (copy.keys, copy.parameter) == ((), "mtp.layers.0.enorm.weight")


@pytest.mark.parametrize("args", [*FAMILY_ARGS.values(), OSS_ARGS], ids=[*FAMILY_ARGS, "gpt-oss"])
def test_no_two_tensors_have_the_same_name(args):
    config = model(args)
    for layer in range(config.num_layers):
        linears, copies = layer_linears(config, layer), layer_copies(config, layer)
        megatron = [f"{linear.megatron}.weight" for linear in linears] + [copy.megatron for copy in copies]
        hf = [f"{name}.weight" for linear in linears for name in linear.hf] + [name for copy in copies for name in copy.hf]
        assert len(set(megatron)) == len(megatron)
        assert len(set(hf)) == len(hf)
        for part in linears:
            assert sum(part.key_rows) == part.shape[0]
        for copy in copies:
            if copy.keys:
                assert sum(copy.key_rows) == copy.shape[0], copy
            assert sum(shape[0] for shape in copy.hf_shapes) == copy.shape[0]
