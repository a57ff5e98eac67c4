from pathlib import Path

import pytest

from mptq import make_plan
from mptq.checkpoint.index import Checkpoint, Tensor
from mptq.checkpoint.locate import Location
from mptq.errors import RecipeError, UnsupportedModelError
from mptq.model.checkpoint_keys import locate
from mptq.model.tensors import outer_copies
from mptq.plan import estimates
from mptq.plan.estimates import bytes_in
from mptq.plan.plan import Source, plan_source
from mptq.recipes.recipe import load_recipe, recipe_from
from mptq.types import TensorSpec
from tests.support.models import model
from tests.support.planning import planned, whole

BLOCK, TENSOR = load_recipe("fp8-blockwise"), load_recipe("fp8-per-tensor")


def source(hidden, ffn, heads, groups, head_dim, layers=2, tied=True, experts=0, **others) -> Source:
    """A checkpoint that exists as metadata only; with experts, `ffn` is the size of each."""
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
        "num_experts": experts,
        "moe_router_topk": 2,
        **others,
    }
    layer = {
        "self_attention.linear_qkv.layer_norm_weight": (hidden,),
        "self_attention.linear_qkv.weight": ((heads + 2 * groups) * head_dim, hidden),
        "self_attention.linear_proj.weight": (hidden, heads * head_dim),
        "mlp.linear_fc1.layer_norm_weight": (hidden,),
        "mlp.linear_fc1.weight": (2 * ffn, hidden),
        "mlp.linear_fc2.weight": (hidden, ffn),
    }
    if experts:
        layer = {name: shape for name, shape in layer.items() if not name.startswith("mlp.")}
        layer |= {"pre_mlp_layernorm.weight": (hidden,), "mlp.router.weight": (experts, hidden)}
        layer["mlp.experts.experts.linear_fc1.weight"] = (experts, 2 * ffn, hidden)
        layer["mlp.experts.experts.linear_fc2.weight"] = (experts, hidden, ffn)
    shapes = {f"decoder.layers.{name}": (layers, *shape) for name, shape in layer.items()}
    shapes |= {"embedding.word_embeddings.weight": (1024, hidden), "decoder.final_layernorm.weight": (hidden,)}
    if not tied:
        shapes["output_layer.weight"] = (1024, hidden)
    specs = {name: TensorSpec(name, "bfloat16", shape) for name, shape in shapes.items()}
    tensors = {name: Tensor(spec, ()) for name, spec in specs.items()}
    checkpoint = Checkpoint(Location(Path("/c/iter_0000001"), Path("/c"), 1), tensors, {}, args, "args", "0" * 64)
    config = model(args, specs)
    return Source(checkpoint, config, locate(specs, config))


def test_llama_7b_in_blocks():
    plan = plan_source(source(4096, 11008, 32, 32, 128, layers=32), BLOCK, ("hf", "megatron"))
    assert plan.layouts["hf"].excluded == ["lm_head"]
    assert plan.differing == []
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = (1024 * 4096 + (2 * 32 + 1) * 4096) * 2
    assert bytes_in(plan) == 2 * linears + rest
    assert plan.layouts["hf"].nbytes == linears + linears // 128**2 * 4 + rest - 24 * 4096 * 2
    assert plan.layouts["megatron"].nbytes == linears + 2 * (linears // 128**2 * 4) + rest
    totals = {form: sum(row[form] for row in estimates.components(plan).values()) for form in ("in", "hf", "megatron")}
    assert totals == {"in": bytes_in(plan), "hf": plan.layouts["hf"].nbytes, "megatron": plan.layouts["megatron"].nbytes}


def test_serving_limit_of_blocks_is_a_warning():
    # 11008 = 86 * 128: two tensor-parallel ranks have 43 blocks each, four would have to cut blocks.
    plan = plan_source(source(4096, 11008, 32, 32, 128), BLOCK, ("hf",))
    assert any("only up to TP=2" in warning for warning in estimates.warnings(plan))
    assert estimates.warnings(plan_source(source(4096, 8192, 32, 8, 128), BLOCK, ("hf",))) == []
    assert estimates.warnings(plan_source(source(4096, 11008, 32, 32, 128), TENSOR, ("hf",))) == []
    assert estimates.warnings(plan_source(source(4096, 11008, 32, 32, 128), BLOCK, ("megatron",))) == []


def test_ragged_groups_are_excluded_and_named():
    plan = plan_source(source(256, 320, 4, 2, 64), BLOCK, ("hf", "megatron"))
    assert plan.layouts["hf"].excluded == ["lm_head"] + [
        f"model.layers.{layer}.mlp.{name}_proj" for layer in (0, 1) for name in ("gate", "up", "down")
    ]
    assert estimates.warnings(plan)[0].startswith("gate_proj, up_proj, down_proj: not multiples of 128, so they stay bfloat16")
    assert [name.split(".", 3)[3] for name in plan.differing[:3]] == [
        "self_attention.linear_qkv.weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    ]


def actions(checkpoint, recipe, *formats):
    return estimates.actions(plan_source(checkpoint, load_recipe(recipe), formats))


def test_actions_describe_what_happens_to_each_component():
    ragged = source(256, 320, 4, 2, 64)
    assert actions(ragged, "fp8-blockwise", "hf") == {
        "embedding": "copied",
        "norms": "copied",
        "attention": "FP8, 128x128 blocks",
        "mlp": "copied",
    }
    assert actions(ragged, "fp8-blockwise", "hf", "megatron")["mlp"] == "copied in hf; FP8, 128x128 blocks in megatron"
    assert actions(ragged, "fp8-blockwise", "megatron")["mlp"] == "FP8, 128x128 blocks"
    assert actions(ragged, "fp8-per-channel", "hf")["mlp"] == "FP8, one scale a row"
    assert actions(ragged, "fp8-per-tensor", "hf")["mlp"] == "FP8, one scale a fused group"
    assert actions(ragged, "mxfp8", "hf")["mlp"] == "MXFP8, blocks of 32"
    kept = plan_source(ragged, load_recipe("fp8").changed(["*.layers.0.mlp.*"]), ("hf",))
    assert estimates.actions(kept)["mlp"] == "copied (2 of 4); FP8, one scale a fused group, static activations (2 of 4)"


def test_misaligned_weights_can_have_per_channel_scales():
    fields = BLOCK.model_dump() | {"misaligned": "per-channel"}
    plan = plan_source(source(256, 320, 4, 2, 64), recipe_from(fields, "x"), ("hf", "megatron"))
    assert plan.layouts["hf"].dialect_name == "compressed-tensors"
    assert plan.layouts["hf"].excluded == ["lm_head"]
    assert {scheme.name: len(modules) for scheme, modules in plan.layouts["hf"].contents.groups.items()} == {
        "block": 8,
        "row": 6,
    }
    assert "gate_proj, up_proj, down_proj: not multiples of 128, so they get one scale per row" in estimates.warnings(plan)[0]
    whole = plan_source(source(256, 384, 4, 2, 128), recipe_from(fields, "x"), ("hf",))
    assert whole.layouts["hf"].dialect_name == "deepseek-fp8"
    with pytest.raises(RecipeError, match=r"model\.layers\.0\.mlp\.gate_proj.* have sizes that are not multiples of the block"):
        plan_source(source(256, 320, 4, 2, 64), recipe_from(fields | {"misaligned": "error"}, "x"), ("hf",))
    small = plan_source(source(576, 1536, 9, 3, 64), recipe_from(fields, "x"), ("hf",))
    assert (small.layouts["hf"].dialect_name, small.layouts["hf"].excluded) == ("compressed-tensors", ["lm_head"])


def test_overrides_by_pattern():
    checkpoint = source(256, 384, 4, 2, 128, layers=3)
    fields = BLOCK.model_dump() | {
        "overrides": [
            {"pattern": "*.self_attn.?_proj", "recipe": "fp8-per-channel"},
            {"pattern": "decoder.layers.0.*", "recipe": "none"},
        ]
    }
    plan = plan_source(checkpoint, recipe_from(fields, "x"), ("hf", "megatron"))
    assert plan.layouts["hf"].dialect_name == "compressed-tensors"
    assert {scheme.name: len(modules) for scheme, modules in plan.layouts["hf"].contents.groups.items()} == {
        "row": 8,
        "block": 6,
    }
    assert plan.layouts["hf"].excluded == ["lm_head"] + [
        f"model.layers.0.{name}_proj"
        for name in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o", "mlp.gate", "mlp.up", "mlp.down")
    ]
    assert plan.layouts["megatron"].other_schemes["decoder.layers.0.mlp.linear_fc1"] is None
    assert plan.layouts["megatron"].other_schemes["decoder.layers.1.self_attention.linear_qkv"].name == "row"
    assert len(plan.layouts["megatron"].other_schemes) == 4 + 2 * 2


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["decoder.layer.0.*"], r"'decoder\.layer\.0\.\*' matches no linear of the 2 layers: patterns must match names such"),
        (
            ["*.q_proj"],
            r"different schemes to .*q_proj, .*k_proj, .*v_proj, .* use 'decoder\.layers\.0\.self_attention\.linear_qkv'",
        ),
        (["*"], "every linear is ignored"),
    ],
)
def test_bad_patterns(patterns, message):
    with pytest.raises(RecipeError, match=message):
        plan_source(source(256, 384, 4, 2, 128), BLOCK.changed(patterns), ("hf",))


EXPERTS = r"such as '\*mlp\.experts\*', or none"
LATENT = r"q_a_proj and .*kv_a_proj_with_mqa,.*'\*\.self_attention\.linear_q_down_proj' and '\*\.self_attention\.linear_kv_down"


@pytest.mark.parametrize(
    ("family", "pattern", "message"),
    [
        ("Qwen3-MoE", "*experts.experts.0.*", r"experts\.0\.gate_proj and .*experts\.1\.gate_proj, but engines .*" + EXPERTS),
        ("Qwen3-MoE", "*linear_fc2", r"different schemes to .*experts\.0\.down_proj, but.*" + EXPERTS),
        ("Mixtral", "*.w2", r"layers\.0\.block_sparse_moe\.experts\.0\.w1 and .*w2, but.*" + EXPERTS),
        ("DeepSeek-V3", "*layers.1.*linear_fc1", r"layers\.1\.mlp\.experts.*" + EXPERTS),
        ("DeepSeek-V3", "*kv_a_proj_with_mqa", LATENT),
        ("DeepSeek-V3", "*linear_q_down_proj", LATENT),
    ],
)
def test_linears_that_engines_fuse_cannot_have_different_schemes(family, pattern, message):
    args = whole(family)
    with pytest.raises(RecipeError, match=message):
        planned(args, "fp8-blockwise", pattern)
    with pytest.raises(RecipeError, match="or use --format megatron"):
        planned(args, "fp8-blockwise", pattern, formats=("hf", "megatron"))
    # Each is a separate linear in Megatron.
    plan = planned(args, "fp8-blockwise", pattern, formats=("megatron",))
    assert (
        0
        < sum(scheme is None for scheme in plan.layouts["megatron"].other_schemes.values())
        < len(list(plan.assignment.linears()))
    )


@pytest.mark.parametrize(
    ("family", "patterns"),
    [
        ("Qwen3-MoE", ["*mlp.experts*"]),
        ("DeepSeek-V3", ["*mlp.experts*"]),
        ("DeepSeek-V3", ["*shared_experts*"]),
        ("DeepSeek-V3", ["*shared_experts.linear_fc2"]),
        ("DeepSeek-V3", ["*.self_attention.linear_q_down_proj", "*.self_attention.linear_kv_down_proj"]),
        ("DeepSeek-V3", ["*_a_proj*"]),
        ("DeepSeek-V2", ["*kv_a_proj_with_mqa"]),
    ],
)
def test_the_suggested_patterns_are_accepted(family, patterns):
    plan, plain = planned(whole(family), "fp8-per-channel", *patterns), planned(whole(family), "fp8-per-channel")
    assert len(plan.layouts["hf"].excluded) > len(plain.layouts["hf"].excluded)


def test_a_compressed_query_is_quantized_in_blocks_with_the_latent():
    plan = planned(whole("DeepSeek-V3"), "fp8-blockwise", formats=("hf", "megatron"))
    assert plan.layouts["hf"].excluded == ["lm_head", "model.layers.1.mlp.gate"]
    assert plan.differing == []
    prefix = "model.layers.0.self_attn.kv_a_proj_with_mqa.weight"
    shapes = {spec.name: spec.shape for spec in plan.layouts["hf"].specs}
    assert (shapes[prefix], shapes[f"{prefix}_scale_inv"]) == ((576, 256), (5, 2))
    note = "kv_a_proj_with_mqa: 576 rows end in a partial block, as in DeepSeek's own checkpoints"
    assert any(warning.startswith(note) for warning in estimates.warnings(plan))
    fields = BLOCK.model_dump()
    for misaligned in ("per-channel", "error"):
        plan = planned(whole("DeepSeek-V3"), recipe_from(fields | {"misaligned": misaligned}, "x"))
        assert (plan.layouts["hf"].dialect_name, plan.layouts["hf"].excluded) == (
            "deepseek-fp8",
            ["lm_head", "model.layers.1.mlp.gate"],
        )


def test_the_latent_keeps_its_precision_with_a_ragged_query():
    args = whole("DeepSeek-V3") | {"q_lora_rank": 192}
    plan = planned(args, "fp8-blockwise")
    names = ("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj")  # the columns of q_b are the rows of q_a
    assert [name for name in plan.layouts["hf"].excluded if ".0." in name] == [
        f"model.layers.0.self_attn.{name}" for name in names
    ]
    rows = planned(args, recipe_from(BLOCK.model_dump() | {"misaligned": "per-channel"}, "x"))
    (kept,) = [modules for scheme, modules in rows.layouts["hf"].contents.groups.items() if scheme.name == "row"]
    assert [name for name in kept if ".0." in name] == [f"model.layers.0.self_attn.{name}" for name in names]


def test_a_latent_without_a_compressed_query_keeps_its_precision():
    plan = planned(whole("DeepSeek-V2"), "fp8-blockwise")
    assert "model.layers.0.self_attn.kv_a_proj_with_mqa" in plan.layouts["hf"].excluded
    assert "model.layers.0.self_attn.q_proj" not in plan.layouts["hf"].excluded


def test_experts_with_a_linear_that_does_not_fit_keep_their_precision():
    # In MX blocks of 32 columns, fc1 has 8 and fc2 one and a half.
    plan = planned(whole("Qwen3-MoE") | {"moe_ffn_hidden_size": 48}, "mxfp8")
    kept = [name for name in plan.layouts["hf"].excluded if ".experts." in name]
    assert len(kept) == 2 * 8 * 3
    assert any(warning.startswith("gate_proj, up_proj, down_proj: not multiples of 32") for warning in estimates.warnings(plan))


def test_one_scale_per_tensor_is_shared_by_what_engines_fuse():
    plan = planned(whole("DeepSeek-V3"), "fp8", formats=("hf", "megatron"))
    by_name = {linear.megatron: linear for linear in plan.linears(1)}
    pair = tuple(by_name[f"self_attention.linear_{name}_down_proj"] for name in ("q", "kv"))
    assert plan.assignment.sharing(1, pair[0]) == plan.assignment.sharing(1, pair[1]) == pair
    # Not by experts, which engines hold in one module with a scale for each.
    expert = by_name["mlp.experts.experts.0.linear_fc1"]
    assert plan.assignment.sharing(1, expert) == (expert,)
    blocks = planned(whole("DeepSeek-V3"), "fp8-blockwise")
    assert blocks.assignment.sharing(1, pair[0]) == pair[:1]
    # If only the Megatron output is written, one of them may be ignored.
    alone = planned(whole("DeepSeek-V3"), "fp8", "*linear_q_down_proj", formats=("megatron",))
    assert alone.assignment.sharing(1, pair[1]) == pair[1:]


def test_mixtures_that_no_engine_reads_are_refused_for_hf():
    fields = load_recipe("mxfp8").model_dump() | {"overrides": [{"pattern": "*.mlp.*", "recipe": "fp8-per-channel"}]}
    recipe = recipe_from(fields, "x")
    with pytest.raises(RecipeError, match="no Hugging Face quantization format can mix mx and row weights"):
        plan_source(source(256, 384, 4, 2, 128), recipe, ("hf",))
    assert plan_source(source(256, 384, 4, 2, 128), recipe, ("megatron",)).layouts["megatron"].nbytes


def test_nothing_to_quantize_in_hf_suggests_what_works():
    small = source(576, 1536, 9, 3, 64)
    message = (
        r"no linear .* multiples of 128 \(sizes 192, 576, 1536\).* use --recipe fp8 or fp8-per-channel or fp8-per-tensor, or"
    )
    with pytest.raises(RecipeError, match=message):
        plan_source(small, BLOCK, ("hf", "megatron"))
    plan_source(small, BLOCK, ("megatron",))
    plan_source(small, TENSOR, ("hf",))


def test_without_quantization_the_checkpoint_is_converted():
    checkpoint, none = source(576, 1536, 9, 3, 64, tied=False), load_recipe("none")
    plan = plan_source(checkpoint, none, ("hf",))
    assert (plan.layouts["hf"].dialect_name, plan.layouts["hf"].contents.groups, plan.differing) == ("plain", {}, [])
    assert set(estimates.actions(plan).values()) == {"copied"}
    assert {spec.dtype for spec in plan.layouts["hf"].specs} == {"bfloat16"}
    assert not [spec.name for spec in plan.layouts["hf"].specs if "scale" in spec.name]
    assert plan.layouts["hf"].nbytes == bytes_in(plan) - 2 * 24 * 576 * 2
    with pytest.raises(RecipeError, match="none converts to Hugging Face, but the checkpoint is already in Megatron format"):
        plan_source(checkpoint, none, ("hf", "megatron"))


def test_copies_have_the_dtype_and_shape_of_each_format():
    plan = plan_source(source(256, 384, 4, 2, 128, tied=False), BLOCK, ("hf", "megatron"))
    (words,), (norm, head) = outer_copies(plan.model)
    assert plan.layouts["hf"].unquantized(words) == (TensorSpec("model.embed_tokens.weight", "bfloat16", (1000, 256)),)
    assert plan.layouts["megatron"].unquantized(head) == (TensorSpec("output_layer.weight", "bfloat16", (1024, 256)),)
    assert plan.layouts["hf"].unquantized(norm) == (TensorSpec("model.norm.weight", "bfloat16", (256,)),)
    (first, _) = plan.unquantized(1)
    assert plan.layouts["hf"].unquantized(first, 1)[0].name == "model.layers.1.input_layernorm.weight"
    # Under its name in the checkpoint.
    assert [spec.name for spec in plan.layouts["megatron"].unquantized(first, 1)] == [
        "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    ]


def test_a_model_without_a_hf_architecture_has_only_a_megatron_output():
    checkpoint = source(256, 384, 4, 2, 128, rotary_percent=0.5)
    with pytest.raises(UnsupportedModelError, match=r"nearest, Llama, differs in partial rotary .*: yes \(Llama: no\): use"):
        plan_source(checkpoint, BLOCK, ("hf",))
    plan = plan_source(checkpoint, BLOCK, ("megatron",))
    assert {linear.megatron for _, linear in plan.assignment.linears()} == {
        "self_attention.linear_qkv",
        "self_attention.linear_proj",
        "mlp.linear_fc1",
        "mlp.linear_fc2",
    }
    assert plan.layouts["megatron"].nbytes < bytes_in(plan)


def test_only_layers_with_attention_have_cache_scales():
    plan = plan_source(source(256, 384, 4, 2, 128), BLOCK.changed(kv_cache="fp8"), ("hf", "megatron"))
    assert [plan.assignment.has_cache(layer) for layer in plan.layers] == [True, True]
    assert sum("_bmm_quantizer" in spec.name for spec in plan.layouts["megatron"].specs) == 4
    assert not plan_source(source(256, 384, 4, 2, 128), BLOCK, ("hf",)).assignment.has_cache(0)


def test_unknown_format(aligned):
    with pytest.raises(RecipeError, match="unknown format gguf"):
        make_plan(aligned, "fp8-blockwise", ("hf", "gguf"))
    with pytest.raises(RecipeError, match="unknown format"):
        make_plan(aligned, "fp8-blockwise", ())
    assert make_plan(aligned, "fp8-blockwise", ("megatron", "hf")).formats == ("hf", "megatron")


def test_predicted_memory_does_not_depend_on_the_number_of_layers():
    few, many = (plan_source(source(8192, 28672, 64, 8, 128, layers=n), BLOCK, ("hf",)) for n in (2, 80))
    assert estimates.peak_memory(few) == estimates.peak_memory(many)
    qkv, proj, fc1, fc2 = 8192 * 10240, 8192**2, 8192 * 57344, 8192 * 28672
    # fc1, with fc2 and a norm read ahead; its FP8 output at one byte per element; and proj's output being written.
    assert estimates.peak_memory(few) == estimates.IMPORTS_BYTES + 2 * (fc1 + fc2 + 8192) + fc1 + proj
    both = plan_source(source(8192, 28672, 64, 8, 128), BLOCK, ("hf", "megatron"))
    outer = 2 * both.model.padded_vocab_size * 8192
    # Meanwhile the largest tensor outside the layers is written.
    assert estimates.peak_memory(both) == estimates.IMPORTS_BYTES + outer + 2 * (fc1 + fc2 + 8192) + 2 * fc1 + 2 * proj
    assert qkv < fc1


def test_memory_of_small_models_is_that_of_imports():
    small, mixtral = source(256, 384, 4, 2, 128), source(256, 384, 4, 2, 128, tied=False, experts=4)
    for one, formats in ((small, ("hf",)), (mixtral, ("hf",)), (small, ("hf", "megatron"))):
        assert estimates.peak_memory(plan_source(one, BLOCK, formats)) == estimates.IMPORTS_BYTES + estimates.END_BYTES


def test_predicted_memory_with_activations():
    """First the output layer with logits or quantizing a linear is the largest part, then a forward pass."""
    imports = estimates.IMPORTS_BYTES
    plan = plan_source(source(2048, 8192, 16, 16, 128, tied=False), BLOCK, ("hf",))
    vocabulary, padded = plan.model.vocab_size, plan.model.padded_vocab_size
    found = estimates.peak_memory(plan, estimates.ActivationBudget(10**6, 0, 512, 512, compares=True))
    layer, fc1 = 2 * (4 * 2048**2 + 3 * 2048 * 8192 + 2 * 2048), 2 * 2048 * 8192
    head = (
        2048 * (2 * padded + 4 * vocabulary)
        + min(1 << 26, 2 * padded * 2048)
        + 28 * vocabulary * min(511, (1 << 23) // vocabulary)
    )
    rounding = layer + (2 + 1 + 8) * fc1 + 2048**2
    assert found == imports + 10**6 + max(head, rounding)
    tokens = 16 * 512
    found = estimates.peak_memory(plan, estimates.ActivationBudget(0, 0, tokens, 512, compares=True))
    assert found == imports + layer + 4 * fc1 + tokens * (6 * 2048 + 6 * 2048 + 4 * 16384)


def test_outputs_kept_for_the_sensitivity_are_in_the_prediction():
    plan = plan_source(source(2048, 8192, 16, 16, 128), BLOCK, ("hf",))
    plain, measuring = (
        estimates.peak_memory(plan, estimates.ActivationBudget(0, 0, 16 * 512, 512, compares=True, measured_bytes=more))
        for more in (0, 10**9)
    )
    assert measuring == plain + 10**9


def test_inputs_and_moments_of_rounding_are_in_the_prediction():
    """The inputs of down, which are the most, and its moments; and eight float32 copies of the matrix."""
    plan = plan_source(source(2048, 8192, 16, 16, 128), BLOCK, ("megatron",))
    plain, rounding = (
        estimates.peak_memory(plan, estimates.ActivationBudget(0, 0, 512, 512, False, tokens)) for tokens in (0, 32768)
    )
    fc2 = 2048 * 8192
    layer, made = 2 * (4 * 2048**2 + 3 * fc2 + 2 * 2048), (2 + 1) * fc2 + 2 * fc2  # the fc1 before it is being written
    steps = layer + made + 32 * fc2 + 32 * 8192**2
    assert rounding - estimates.IMPORTS_BYTES == steps + 2 * 32768 * 8192 + 8 * 512 * 8192
    assert plain < rounding
    # With two streams also the reference's inputs, and the residual stream: before attention and MLP, and once more.
    both = estimates.peak_memory(plan, estimates.ActivationBudget(0, 0, 512, 512, False, 32768, 2))
    more = 2 * 32768 * (3 * 2048 + 8192 + 3 * 2048) + 8 * 512 * (8192 + 2048)
    assert both == rounding + more


def test_a_search_for_scales_is_in_the_prediction():
    """ModelOpt's mse has 17 bytes per weight of the largest linear."""
    fields = BLOCK.model_dump(mode="json") | {"algorithm": "mse"}
    model, fc1 = source(8192, 28672, 64, 64, 128), 2 * 8192 * 28672
    found = [estimates.peak_memory(plan_source(model, recipe, ("hf",))) for recipe in (BLOCK, recipe_from(fields, "test"))]
    assert found[1] - found[0] == 17 * fc1


def test_mixtral_8x7b_in_blocks():
    plan = plan_source(source(4096, 14336, 32, 8, 128, layers=32, tied=False, experts=8), BLOCK, ("hf", "megatron"))
    assert plan.layouts["hf"].excluded == ["lm_head"] + [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(32)]
    components = estimates.components(plan)
    assert components["experts"]["parameters"] == 32 * 8 * 3 * 4096 * 14336
    assert components["router"] == {"parameters": 32 * 8 * 4096} | dict.fromkeys(("in", "hf", "megatron"), 2 * 32 * 8 * 4096)
    quantized = [name for name, action in estimates.actions(plan).items() if action == "FP8, 128x128 blocks"]
    assert quantized == ["attention", "experts"]
    assert estimates.actions(plan)["router"] == "copied"
    # A few times the fc1 of one expert, independent of their number.
    assert 2e9 < estimates.peak_memory(plan) < 2.4e9


def test_ragged_experts_are_excluded_together():
    plan = plan_source(source(256, 320, 2, 1, 128, experts=2), BLOCK, ("hf", "megatron"))
    kept = [f"experts.{expert}.{name}" for expert in (0, 1) for name in ("w1", "w3", "w2")]
    assert plan.layouts["hf"].excluded == ["lm_head"] + [
        f"model.layers.{layer}.block_sparse_moe.{name}" for layer in (0, 1) for name in ["gate", *kept]
    ]
    assert estimates.warnings(plan)[0].startswith("w1, w3, w2: not multiples of 128, so they stay bfloat16")
    assert estimates.actions(plan)["experts"] == "copied in hf; FP8, 128x128 blocks in megatron"
    assert estimates.actions(plan)["router"] == "copied"
