from pathlib import Path

import pytest

from mptq import make_plan
from mptq.arch.config import from_args
from mptq.arch.naming import locate
from mptq.checkpoint.index import Checkpoint, Tensor
from mptq.checkpoint.layout import Location
from mptq.errors import RecipeError
from mptq.plan import Source, plan_source
from mptq.recipe import load_recipe
from mptq.types import TensorSpec

BLOCK, TENSOR = load_recipe("fp8-blockwise"), load_recipe("fp8-per-tensor")


def source(hidden, ffn, heads, groups, head_dim, layers=2, tied=True) -> Source:
    """A checkpoint that exists as metadata only."""
    args = {
        "num_layers": layers,
        "hidden_size": hidden,
        "ffn_hidden_size": ffn,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "group_query_attention": True,
        "kv_channels": head_dim,
        "vocab_size": 1000,
        "norm_epsilon": 1e-5,
        "max_position_embeddings": 512,
        "normalization": "RMSNorm",
        "swiglu": True,
        "position_embedding_type": "rope",
        "add_bias_linear": False,
        "untie_embeddings_and_output_weights": not tied,
    }
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": ((heads + 2 * groups) * head_dim, hidden),
        "self_attention.linear_proj.weight": (hidden, heads * head_dim),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    shapes = {f"decoder.layers.{name}": (layers, *shape) for name, shape in layer.items()}
    shapes |= {"embedding.word_embeddings.weight": (1024, hidden), "decoder.final_layernorm.weight": (hidden,)}
    if not tied:
        shapes["output_layer.weight"] = (1024, hidden)
    specs = {name: TensorSpec(name, "bfloat16", shape) for name, shape in shapes.items()}
    tensors = {name: Tensor(spec, ()) for name, spec in specs.items()}
    checkpoint = Checkpoint(Location(Path("/c/iter_0000001"), Path("/c"), 1), tensors, {}, args, "args", "0" * 64)
    model = from_args(args, "args", specs)
    return Source(checkpoint, model, locate(specs, model))


def test_llama_7b_in_blocks():
    plan = plan_source(source(4096, 11008, 32, 32, 128, layers=32), BLOCK, ("hf", "megatron"))
    assert plan.excluded == ["lm_head"]
    assert plan.differing == []
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = (1024 * 4096 + (2 * 32 + 1) * 4096) * 2
    assert plan.bytes_in == 2 * linears + rest
    assert plan.bytes_out("hf") == linears + linears // 128**2 * 4 + rest - 24 * 4096 * 2
    assert plan.bytes_out("megatron") == linears + 2 * (linears // 128**2 * 4) + rest
    totals = {form: sum(row[form] for row in plan.components().values()) for form in ("in", "hf", "megatron")}
    assert totals == {"in": plan.bytes_in, "hf": plan.bytes_out("hf"), "megatron": plan.bytes_out("megatron")}


def test_serving_limit_of_blocks_is_a_warning():
    # 11008 = 86 * 128: two tensor-parallel ranks have 43 blocks each, four have none that is whole.
    plan = plan_source(source(4096, 11008, 32, 32, 128), BLOCK, ("hf",))
    assert any("only up to TP=2" in warning for warning in plan.warnings)
    assert plan_source(source(4096, 8192, 32, 8, 128), BLOCK, ("hf",)).warnings == []
    assert plan_source(source(4096, 11008, 32, 32, 128), TENSOR, ("hf",)).warnings == []
    assert plan_source(source(4096, 11008, 32, 32, 128), BLOCK, ("megatron",)).warnings == []


def test_ragged_groups_are_excluded_and_named():
    plan = plan_source(source(256, 320, 4, 2, 64), BLOCK, ("hf", "megatron"))
    assert plan.excluded == ["lm_head"] + [
        f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")
    ]
    assert plan.warnings[0].startswith("gate_proj, up_proj, down_proj: not multiples of 128, so they stay bfloat16")
    assert [name.split(".", 3)[3] for name in plan.differing[:3]] == [
        "self_attention.linear_qkv.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]


def test_actions_say_what_happens_to_each_component():
    ragged = source(256, 320, 4, 2, 64)
    assert plan_source(ragged, BLOCK, ("hf",)).actions() == {
        "embedding": "copied",
        "norms": "copied",
        "attention": "FP8, 128x128 blocks",
        "mlp": "copied",
    }
    both = plan_source(ragged, BLOCK, ("hf", "megatron")).actions()
    assert both["mlp"] == "FP8, 128x128 blocks; gate_proj, up_proj, down_proj copied in hf"
    assert plan_source(ragged, BLOCK, ("megatron",)).actions()["mlp"] == "FP8, 128x128 blocks"
    assert plan_source(ragged, load_recipe("fp8-per-channel"), ("hf",)).actions()["mlp"] == "FP8, one scale a row"
    assert plan_source(ragged, TENSOR, ("hf",)).actions()["mlp"] == "FP8, one scale a fused group"


def test_nothing_to_quantize_in_hf_suggests_what_works():
    small = source(576, 1536, 9, 3, 64)
    message = r"no linear .* multiples of 128 \(sizes 192, 576, 1536\).* use --recipe fp8-per-channel or fp8-per-tensor, or"
    with pytest.raises(RecipeError, match=message):
        plan_source(small, BLOCK, ("hf", "megatron"))
    plan_source(small, BLOCK, ("megatron",))
    plan_source(small, TENSOR, ("hf",))


def test_unknown_format(aligned):
    with pytest.raises(RecipeError, match="unknown format gguf"):
        make_plan(aligned, "fp8-blockwise", ("hf", "gguf"))
    with pytest.raises(RecipeError, match="unknown format"):
        make_plan(aligned, "fp8-blockwise", ())
    assert make_plan(aligned, "fp8-blockwise", ("megatron", "hf")).formats == ("hf", "megatron")


def test_predicted_memory_does_not_depend_on_the_number_of_layers():
    few, many = (plan_source(source(4096, 11008, 32, 32, 128, layers=n), BLOCK, ("hf",)) for n in (2, 80))
    assert few.peak_memory == many.peak_memory
    assert 2e9 < few.peak_memory < 3e9
