"""Linears that are separate in Megatron but fused by engines: the numbers of both outputs, for a model like DeepSeek V3."""

import pytest
import torch
from safetensors.torch import load_file

from mptq import make_plan, run, verify
from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.reader import Reader
from mptq.model.source import open_source
from mptq.recipes.assignment import Assignment
from tests.support import reference

pytestmark = pytest.mark.slow

BOTH, ALONE = ("hf", "megatron"), ("megatron",)
RUNS = [("fp8", BOTH), ("fp8-per-tensor", BOTH), ("fp8-per-tensor", ALONE), ("fp8-blockwise", BOTH)]
PAIR = {"q_a_proj": "linear_q_down_proj", "kv_a_proj_with_mqa": "linear_kv_down_proj"}


@pytest.fixture(scope="module")
def checkpoint(zoo):
    return zoo("deepseek-v3-latents") / "ckpt"


@pytest.fixture(scope="module")
def outputs(checkpoint, options, tmp_path_factory):
    """The output directory of each of RUNS."""
    folder, made = tmp_path_factory.mktemp("fused"), {}
    for recipe, formats in RUNS:
        made[recipe, formats] = folder / f"{recipe}-{len(formats)}"
        run(make_plan(checkpoint, recipe, formats), made[recipe, formats], options)
    return made


def sources(checkpoint, layer):
    """The weights of the pair in the checkpoint."""
    source = open_source(checkpoint)
    reader, found = Reader(source.checkpoint), []
    for name in PAIR.values():
        parts = source.places[f"decoder.layers.{layer}.self_attention.{name}.weight"]
        found.append(reader.read_parts(parts, torch.empty(parts[0].shape, dtype=torch.bfloat16)).float())
    return found


def in_hf(out, layer):
    """Bytes, scale and input scale (or None) of each linear of the pair."""
    tensors = load_file(out / "hf" / "model.safetensors")
    for name in PAIR:
        prefix = f"model.layers.{layer}.self_attn.{name}."
        scale = next(tensor for key, tensor in tensors.items() if key.startswith(f"{prefix}weight_scale"))
        yield tensors[f"{prefix}weight"].view(torch.uint8), scale, tensors.get(f"{prefix}input_scale")


def in_megatron(out, layer):
    """Bytes and scale of each linear of the pair."""
    stored = open_checkpoint(out if (out / "latest_checkpointed_iteration.txt").is_file() else out / "megatron")
    reader = Reader(stored)
    for name in PAIR.values():
        keys = [f"decoder.layers.{layer}.self_attention.{name}.{key}" for key in ("weight", "weight_quantizer._scale")]
        specs = [stored.tensors[key].spec for key in keys]
        weight, scale = (reader.read(spec.name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype))) for spec in specs)
        yield weight.view(torch.uint8), scale


@pytest.mark.parametrize(("recipe", "formats"), RUNS)
def test_the_output_verifies_against_the_source(outputs, checkpoint, recipe, formats):
    assert verify(outputs[recipe, formats], checkpoint).failures == []


@pytest.mark.parametrize("recipe", ["fp8", "fp8-per-tensor"])
@pytest.mark.parametrize("layer", [0, 2])
def test_one_scale_is_the_largest_of_the_fused_group(outputs, checkpoint, recipe, layer):
    pair = sources(checkpoint, layer)
    amax = torch.cat(pair).abs().max()
    assert pair[0].abs().max() != pair[1].abs().max()
    hf, megatron = list(in_hf(outputs[recipe, BOTH], layer)), list(in_megatron(outputs[recipe, BOTH], layer))
    for source, (data, scale, _), (fused, fused_scale) in zip(pair, hf, megatron, strict=True):
        expected, expected_scale = reference.tensor(source, amax)
        assert torch.equal(data, expected)
        assert torch.equal(fused, expected)
        assert (scale == expected_scale).all()
        assert torch.equal(fused_scale, expected_scale)
    assert (hf[0][2] is None) == (recipe != "fp8")
    assert hf[0][2] == hf[1][2]  # the input is the same


def test_megatron_alone_has_the_same_numbers(outputs):
    for layer in range(3):
        both, alone = (list(in_megatron(outputs["fp8-per-tensor", formats], layer)) for formats in (BOTH, ALONE))
        for (data, scale), (other, other_scale) in zip(both, alone, strict=True):
            assert torch.equal(data, other)
            assert torch.equal(scale, other_scale)


def test_blocks_of_the_latent_end_in_a_partial_block(outputs, checkpoint):
    out = outputs["fp8-blockwise", BOTH]
    (hf_q, hf_kv), (megatron_q, megatron_kv) = list(in_hf(out, 1)), list(in_megatron(out, 1))
    assert (hf_kv[0].shape, hf_kv[1].shape) == ((576, 256), (5, 2))
    for source, hf, megatron in zip(sources(checkpoint, 1), (hf_q, hf_kv), (megatron_q, megatron_kv), strict=True):
        data, scale = reference.block(source)
        assert torch.equal(hf[0], data)
        assert torch.equal(hf[1], scale)
        assert torch.equal(megatron[0], data)
        assert torch.equal(megatron[1], scale)


def test_unshared_scales_are_detected(outputs, checkpoint, monkeypatch):
    monkeypatch.setattr(Assignment, "sharing", lambda _assignment, _layer, linear: (linear,))
    failures = verify(outputs["fp8-per-tensor", BOTH], checkpoint).failures
    assert len(failures) == 2 * 3  # in each layer the linear with the smaller largest magnitude, in both outputs
    assert all("scales differ from amax / 448 of the source" in failure for failure in failures)
