"""Adding a scheme takes one record: blocks of 64x64, in both formats, with ModelOpt's numbers."""

import pytest
import torch
from modelopt.torch.quantization.qtensor import FP8QTensor

from mptq import make_plan, run, verify
from mptq.plan.estimates import warnings
from mptq.quantize import quantizer
from mptq.recipes.recipe import recipe_from
from mptq.recipes.schemes import SCHEMES, Scheme
from tests.conftest import read_json
from tests.support.models import ARGS
from tests.support.planning import planned, sized, whole

BLOCKS = {"num_bits": (4, 3), "axis": None, "block_sizes": {-1: 64, -2: 64}}


@pytest.fixture
def scheme(monkeypatch):
    made = Scheme("block-64", "block", "FP8, 64x64 blocks", (64, 64), BLOCKS, {"deepseek-fp8": {"weight_block_size": [64, 64]}})
    monkeypatch.setitem(SCHEMES, made.name, made)
    return made


def test_its_numbers_equal_modelopts(scheme):
    weight = torch.randn(192, 320, generator=torch.Generator().manual_seed(0))
    ours, _ = quantizer.quantize(weight, scheme, "w")
    theirs, scale = FP8QTensor.quantize(weight, block_sizes=BLOCKS["block_sizes"])
    assert torch.equal(ours.data.view(torch.uint8), theirs._quantized_data.view(torch.uint8))
    assert torch.equal(ours.scale, scale.reshape(3, 5))


@pytest.fixture
def recipe(scheme):
    fields = {"weights": {"scale": "block", "block_size": scheme.block}, "hf": "deepseek-fp8"}
    return recipe_from(fields | {"name": "blocks of 64", "description": "x"}, "test")


def test_warnings_use_its_block_size(recipe):
    """11008 = 172 * 64: four tensor-parallel ranks have 43 blocks each, eight none that is whole."""
    args = sized(ARGS, 4096, 11008, 32, 32)
    (warning,) = warnings(planned(args, recipe))
    assert warning == (
        "blocks of 64 of gate_proj, up_proj, down_proj split evenly across tensor-parallel ranks only up to TP=4"
    )
    ragged = planned(whole("DeepSeek-V3") | {"kv_lora_rank": 448, "qk_pos_emb_head_dim": 32}, recipe)
    assert any("kv_a_proj_with_mqa: 480 rows end in a partial block" in line for line in warnings(ragged))


def test_both_formats_store_it_and_verify(recipe, crossing, options, tmp_path):
    run(make_plan(crossing, recipe, ("hf", "megatron")), tmp_path / "out", options)
    assert verify(tmp_path / "out", crossing).failures == []
    config = read_json(tmp_path / "out/hf/config.json")["quantization_config"]
    assert (config["weight_block_size"], config["modules_to_not_convert"]) == ([64, 64], ["lm_head"])
