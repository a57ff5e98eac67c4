"""A mixture of experts, end to end: numbers, names and the ways in which it may be saved."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from mptq import Options, inspect, make_plan, run
from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.reader import Reader
from mptq.verification.structure import verify
from tests.conftest import files, make_checkpoint, read_json
from tests.integration.test_verification import resign
from tests.support import reference

EXPERTS, LAYERS = 4, 2
ROUTERS = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(LAYERS)]
GROUPS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"]]
for expert in range(EXPERTS):
    GROUPS += [[f"block_sparse_moe.experts.{expert}.{name}" for name in names] for names in (("w1", "w3"), ("w2",))]


def bits(tensor):
    return tensor.contiguous().view(torch.uint8)


def expected(source, recipe):
    """FP8 bytes and scales of every projection, by name."""
    for layer in range(LAYERS):
        for group in GROUPS:
            names = [f"model.layers.{layer}.{member}" for member in group]
            weights = [source[f"{name}.weight"].float() for name in names]
            amax = max(weight.abs().max() for weight in weights)
            for name, weight in zip(names, weights, strict=True):
                if recipe == "fp8-blockwise":
                    data, scale = reference.block(weight)
                    yield name, data, f"{name}.weight_scale_inv", scale
                elif recipe == "fp8-per-channel":
                    data, scale = reference.row(weight)
                    yield name, data, f"{name}.weight_scale", scale
                else:
                    data, scale = reference.tensor(weight, amax)
                    yield name, data, f"{name}.weight_scale", scale.expand(len(weight), 1)


@pytest.mark.parametrize("recipe", ["fp8-blockwise", "fp8-per-channel", "fp8-per-tensor"])
def test_hf_output_equals_the_reference(quantized_mixtral, mixtral_hf, recipe):
    source = load_file(mixtral_hf / "model.safetensors")
    found = load_file(quantized_mixtral[recipe] / "hf" / "model.safetensors")
    for name, data, scale_name, scale in expected(source, recipe):
        assert torch.equal(bits(found.pop(f"{name}.weight")), data), name
        assert torch.equal(found.pop(scale_name), scale), name
    # The rest is unchanged: routers, norms, the vocabulary.
    assert {f"{name}.weight" for name in ROUTERS} < found.keys()
    assert len(found) == 3 + LAYERS * 3
    assert all(torch.equal(bits(tensor), bits(source[name])) for name, tensor in found.items())


@pytest.mark.parametrize("recipe", ["fp8-blockwise", "fp8-per-channel", "fp8-per-tensor"])
def test_outputs_verify_against_the_source(quantized_mixtral, mixtral, recipe):
    found = verify(quantized_mixtral[recipe], mixtral)
    assert found.failures == []
    assert found.compared == 2 * (3 + LAYERS * (3 + 2 + 2 * EXPERTS))


def test_every_router_is_excluded_by_name(quantized_mixtral):
    config = read_json(quantized_mixtral["fp8-blockwise"] / "hf" / "config.json")
    assert config["quantization_config"]["modules_to_not_convert"] == ["lm_head", *ROUTERS]
    assert config["architectures"] == ["MixtralForCausalLM"]
    assert (config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"]) == (4, 2, 384)
    config = read_json(quantized_mixtral["fp8-per-channel"] / "hf" / "config.json")
    assert config["quantization_config"]["ignore"] == ["lm_head", *ROUTERS]


def test_a_router_that_is_not_excluded_is_detected(quantized_mixtral, tmp_path):
    out = shutil.copytree(quantized_mixtral["fp8-blockwise"], tmp_path / "out")
    path = out / "hf" / "config.json"
    path.write_text(path.read_text().replace(f'"{ROUTERS[1]}"', '"lm_head"'))
    resign(out, "hf/config.json")
    assert verify(out).failures == [
        f"config.json has missing or extra excluded modules {[ROUTERS[1]]}: engines would misread them"
    ]


def test_megatron_output_has_a_key_for_each_expert(quantized_mixtral):
    specs = open_checkpoint(quantized_mixtral["fp8-blockwise"] / "megatron").specs
    owner = "decoder.layers.1.mlp.experts.experts.3."
    found = {name.removeprefix(owner): (spec.dtype, spec.shape) for name, spec in specs.items() if name.startswith(owner)}
    assert found == {
        "linear_fc1.weight_w": ("float8_e4m3fn", (384, 256)),
        "linear_fc1.weight_v": ("float8_e4m3fn", (384, 256)),
        "linear_fc1.weight_quantizer._amax": ("float32", (6, 2)),
        "linear_fc1.weight_quantizer._scale": ("float32", (6, 2)),
        "linear_fc2.weight": ("float8_e4m3fn", (256, 384)),
        "linear_fc2.weight_quantizer._amax": ("float32", (2, 3)),
        "linear_fc2.weight_quantizer._scale": ("float32", (2, 3)),
    }


@pytest.mark.parametrize("recipe", ["fp8-blockwise", "fp8-per-channel", "fp8-per-tensor"])
def test_both_outputs_hold_the_same_bytes(quantized_mixtral, recipe):
    out = quantized_mixtral[recipe]
    assert read_json(out / "report.json")["differing"] == []
    checkpoint, hf = open_checkpoint(out / "megatron"), load_file(out / "hf" / "model.safetensors")
    reader = Reader(checkpoint)
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            owner = f"decoder.layers.{layer}.mlp.experts.experts.{expert}."
            for key, name in (("linear_fc1.weight_w", "w1"), ("linear_fc1.weight_v", "w3"), ("linear_fc2.weight", "w2")):
                spec = checkpoint.tensors[owner + key].spec
                found = reader.read(owner + key, torch.empty(spec.shape, dtype=torch.float8_e4m3fn))
                projection = hf[f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}.weight"]
                assert torch.equal(bits(found), bits(projection))


def test_components(quantized_mixtral, mixtral):
    report = read_json(quantized_mixtral["fp8-per-tensor"] / "report.json")
    assert report["actions"]["experts"] == "FP8, one scale a fused group"
    assert report["actions"]["router"] == "copied"
    assert report["components"]["router"]["parameters"] == LAYERS * EXPERTS * 256
    assert report["components"]["experts"]["parameters"] == LAYERS * EXPERTS * 3 * 256 * 384
    assert sum(row["in"] for row in report["components"].values()) == report["bytes"]["in"]
    (document,) = inspect(mixtral)
    assert document["facts"]["architecture"].startswith(
        "Mixtral-like, 2 layers, hidden 256, 4 experts, 2 per token, each with ffn"
    )
    assert document["facts"]["saved at"] == "TP=1 PP=1 EP=1"
    assert {row["component"] for row in document["components"]} >= {"experts", "router", "attention"}


def test_one_expert_of_a_stack(mixtral):
    checkpoint = open_checkpoint(mixtral)
    name = "decoder.layers.mlp.experts.experts.linear_fc2.weight"
    assert checkpoint.tensors[name].spec.shape == (LAYERS, EXPERTS, 256, 384)
    reader = Reader(checkpoint)
    whole = reader.read(name, torch.empty(LAYERS, EXPERTS, 256, 384))
    for layer in range(LAYERS):
        for expert in range(EXPERTS):
            assert torch.equal(reader.read(name, torch.empty(256, 384), (layer, expert)), whole[layer, expert])


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "processes"), [(["--ep", 2], 2), (["--per-layer"], 1)], ids=["ep2", "per-layer"])
def test_bytes_do_not_depend_on_how_the_checkpoint_was_saved(mixtral_hf, quantized_mixtral, tmp_path, flags, processes):
    checkpoint = make_checkpoint(mixtral_hf, tmp_path / "ckpt", *flags, processes=processes)
    run(make_plan(checkpoint, "fp8-blockwise", ("hf", "megatron")), tmp_path / "out", Options(device="cpu"))
    first, second = files(quantized_mixtral["fp8-blockwise"]), files(tmp_path / "out")
    assert first.keys() == second.keys()
    # The last file holds the training run's arguments, which include how it was saved; the metadata has its length.
    apart = {
        "report.json",
        "report.html",
        "manifest.json",
        "megatron/iter_0000100/__3_0.distcp",
        "megatron/iter_0000100/.metadata",
    }
    assert {name for name in first if first[name] != second[name]} <= apart
