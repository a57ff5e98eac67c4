"""Compares what engines fuse and split with vLLM's own classes for the same models (tests/support/vllm_models.json)."""

import json

import pytest

from mptq.model import engines, tensors
from mptq.model.architectures.registry import family_of
from mptq.plan import estimates
from tests.support.engine_cases import RECIPES, RECORD, cases
from tests.support.models import ARGS, FAMILY_ARGS, model
from tests.support.planning import MODELS, planned, whole

RECORDED = json.loads(RECORD.read_text())["cases"]
CASES = cases()
OF_FAMILIES = [name for name in CASES if name not in MODELS]
REFUSED = {"Nemotron-H fp8-per-channel even": "All MoE projections need to have same quantization scheme"}
"""For experts without a gate, vLLM looks up a gate with an empty name: see `_gateless` in formats/hf/warnings.py."""


def made_of(module, case, found):
    """Returns the Hugging Face modules that form a vLLM module, without the prefix, which vLLM changes."""
    owner, _, last = module.rpartition(".")
    for old, new in found["renamed"].items():
        owner = owner.replace(f"{new}.", f"{old}.", 1) if owner.startswith(f"{new}.layers.") else owner
    if last == "experts":
        return frozenset(name for name in modules(case.plan) if name.startswith(f"{owner}.experts."))
    return frozenset(f"{owner}.{member}" for member in found["packed"].get(last, [last]))


def modules(plan):
    """Returns the Hugging Face modules of a plan's linears."""
    return [tensors.hf_layer(plan.model, layer) + name for layer, linear in plan.assignment.linears() for name in linear.hf]


def in_layers(found):
    """Returns vLLM's linears and routed experts, without Mamba's convolution, which is never quantized."""
    return [name for name in (*found["fp8"], *found["other"]) if name != "lm_head" and not name.endswith(".conv1d")]


def test_the_record_has_these_cases():
    digests = {name: case.digest for name, case in CASES.items()}
    assert {name: entry["digest"] for name, entry in RECORDED.items()} == digests, "record again: scripts/record_vllm.py"


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_groups_match_vllms_modules(name):
    plan, found = CASES[name].plan, RECORDED[name]["ranks"]["1"]
    groups = {}
    for layer in plan.layers:
        prefix = tensors.hf_layer(plan.model, layer)
        for group in engines.groups(plan.model, layer).values():
            groups[frozenset(prefix + member for linear in group.linears for member in linear.hf)] = None
        matrices = (copy for copy in plan.unquantized(layer) if len(copy.shape) == 2)
        groups |= {frozenset({prefix + copy.hf[0].removesuffix(".weight")}): None for copy in matrices}
    assert {made_of(module, CASES[name], found) for module in in_layers(found)} == set(groups)


@pytest.mark.parametrize("family", FAMILY_ARGS)
def test_fused_linears_of_a_family_are_those_that_vllm_packs(family):
    found = RECORDED[f"{family} fp8-blockwise even"]["ranks"]["1"]
    used = {name.rpartition(".")[2] for name in in_layers(found)} & found["packed"].keys()
    plan = CASES[f"{family} fp8-blockwise even"].plan
    names = {name.rpartition(".")[2] for name in modules(plan) if ".experts." not in name}
    fused = {name: members.split() for name, members in family_of(plan.model).fused.items()}
    assert {name: members for name, members in fused.items() if set(members) <= names} == {
        name: found["packed"][name] for name in used
    }


@pytest.mark.parametrize("name", [name for name in CASES if name not in REFUSED])
def test_vllm_treats_the_same_linears_as_quantized(name):
    case, found = CASES[name], RECORDED[name]["ranks"]["1"]
    quantized = {module for members in case.plan.layouts["hf"].contents.groups.values() for module in members}
    assert {module for part in found["fp8"] for module in made_of(part, case, found)} == quantized
    assert "lm_head" in found["other"]
    kept = {module for part in in_layers(found) if part in found["other"] for module in made_of(part, case, found)}
    assert kept | {"lm_head"} == set(case.plan.layouts["hf"].excluded)


@pytest.mark.parametrize("name", REFUSED)
def test_what_vllm_refuses_is_a_warning(name):
    assert REFUSED[name] in RECORDED[name]["ranks"]["1"]["error"]
    assert any("experts without a gate" in warning for warning in estimates.warnings(CASES[name].plan))


@pytest.mark.parametrize("name", [name for name in OF_FAMILIES if name not in REFUSED])
def test_only_models_that_vllm_refuses_have_a_warning(name):
    assert not any("experts without a gate" in warning for warning in estimates.warnings(CASES[name].plan))


# Computed by hand: each of TP ranks has heads / TP query heads, at least one K and V head, ffn / TP rows of gate and up
# and columns of down, and all of MLA's q_a and kv_a. Sizes that are then not multiples of 128 are unsupported. The 28
# and 12 heads of Qwen2 cannot be split over 8 ranks in any precision.
LIMITS = {  # name -> maximum TP with whole blocks, maximum TP at all
    "Llama-2-7B": (2, 8),  # 11008 / 4 = 21.5 * 128
    "Llama-3-8B": (8, 8),  # 14336 / 8 = 14 * 128, 8 heads of 128 for K and V
    "Llama-3-70B": (8, 8),  # 28672 / 8 = 28 * 128
    "Llama-3.2-1B": (4, 8),  # heads of 64: with TP=8 a rank has half a block of K; vLLM accepts that but loads the wrong scales
    "Qwen2-1.5B": (2, 4),  # 8960 / 4 = 17.5 * 128
    "Qwen2-7B": (4, 4),  # 18944 / 4 = 37 * 128, 4 heads of 128
    "Qwen3-30B-A3B": (8, 8),  # 4 heads of K and V, which 8 ranks share
    "Mixtral-8x7B": (8, 8),
    "DeepSeek-V2-Lite": (2, 8),  # shared experts: 2816 / 4 = 5.5 * 128; the dense MLP (10944) is not quantized
    "DeepSeek-V3": (8, 8),  # 18432 / 8 = 18 * 128, 2048 / 8 = 2 * 128
}
OF_EXPERTS = {"Qwen3-30B-A3B": 2, "DeepSeek-V2-Lite": 1}  # 768 / 4 and 1408 / 2 are not multiples of 128


@pytest.mark.parametrize("name", MODELS)
def test_the_limits_of_tensor_parallelism_match_vllm(name):
    limit, served = LIMITS[name]
    notes = [note for note in estimates.warnings(CASES[name].plan) if "tensor-parallel" in note]
    found = {"experts'" in note: int(note.partition("TP=")[2][0]) for note in notes}
    assert found.get(False, served) == limit
    assert found.get(True) == OF_EXPERTS.get(name)
    for note in notes:
        assert note.endswith("expert parallelism") == ("experts'" in note)
    for ranks, made in ((int(ranks), made) for ranks, made in RECORDED[name]["ranks"].items()):
        blocks = "divisible by weight quantization" in made.get("error", "")
        assert ("error" in made and not blocks) == (ranks > served)  # unrelated to blocks
        if ranks <= served:
            assert (blocks or bool(made["cut"])) == (ranks > limit)
            assert blocks or bool(made["refined"]) == (ranks > OF_EXPERTS.get(name, served))


def test_with_more_ranks_than_heads_each_rank_has_one_head():
    (qkv, *_), config = tensors.layer_linears(model(MODELS["Qwen3-30B-A3B"]), 0), model(MODELS["Qwen3-30B-A3B"])
    assert [tp for tp in (1, 2, 4, 8, 16, 32) if engines.splits(config, qkv, tp, 128)] == [1, 2, 4, 8, 16, 32]
    narrow = model(ARGS | {"hidden_size": 256, "kv_channels": 64, "num_attention_heads": 8, "num_query_groups": 4})
    (qkv, *_) = tensors.layer_linears(narrow, 0)
    assert [tp for tp in (1, 2, 4, 8) if engines.splits(narrow, qkv, tp, 128)] == [1, 2]


def test_a_compressed_query_is_in_one_group_with_the_latent():
    plan = planned(whole("DeepSeek-V3"), "fp8-blockwise")
    group = engines.groups(plan.model, 0)["self_attention.linear_kv_down_proj"]
    assert [linear.hf for linear in group.linears] == [("self_attn.q_a_proj",), ("self_attn.kv_a_proj_with_mqa",)]
    assert group is engines.groups(plan.model, 0)["self_attention.linear_q_down_proj"]
    # 576 rows: the partial block is at the end of the fused matrix.
    assert group.ragged
    assert group.fits((128, 128))
    assert not group.linears[1].fits((128, 128))
    ragged = model(whole("DeepSeek-V3") | {"q_lora_rank": 192})
    assert not engines.groups(ragged, 0)["self_attention.linear_kv_down_proj"].fits((128, 128))


def test_without_a_compressed_query_the_latent_is_alone():
    config = model(whole("DeepSeek-V2"))
    group = engines.groups(config, 0)["self_attention.linear_kv_down_proj"]
    assert len(group.linears) == 1
    assert not group.fits((128, 128))


def test_routed_experts_are_a_group_and_shared_ones_are_not_in_it():
    config = model(whole("DeepSeek-V3"))
    found = engines.groups(config, 1)
    experts = found["mlp.experts.experts.0.linear_fc1"]
    assert len(experts.linears) == 2 * 8
    assert not experts.fused
    assert len(found["mlp.shared_experts.linear_fc1"].linears) == 1
    # Only fc1 fits MX blocks of 32 columns: the hidden size is 256, and experts have width 48.
    narrow = model(whole("Qwen3-MoE") | {"moe_ffn_hidden_size": 48})
    group = engines.groups(narrow, 0)["mlp.experts.experts.3.linear_fc1"]
    assert group.linears[0].fits((1, 32))
    assert not group.fits((1, 32))


def test_parts_of_a_mamba_projection_are_whole_blocks():
    args = whole("Nemotron-H")
    (first, _) = tensors.layer_linears(model(args), 0)
    assert first.fits((128, 128))
    # B and C have 64 rows each: together they are one block, which engines split.
    (first, _) = tensors.layer_linears(model(args | {"mamba_state_dim": 8}), 0)
    assert first.shape[0] % 128 == 0
    assert not first.fits((128, 128))


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_has_a_case(recipe):
    assert {name.split()[0] for name in OF_FAMILIES if f" {recipe} " in name} == set(FAMILY_ARGS)
