"""Adding a scheme takes one record: blocks of 64x64, in both formats, with ModelOpt's numbers."""

import pytest
import torch
from modelopt.torch.quantization.qtensor import FP8QTensor

from mptq import make_plan, run, verify
from mptq.quantize import quantizer
from mptq.recipes.recipe import recipe_from
from mptq.recipes.schemes import SCHEMES, Scheme
from tests.conftest import read_json

BLOCKS = {"num_bits": (4, 3), "axis": None, "block_sizes": {-1: 64, -2: 64}}


@pytest.fixture
def scheme(monkeypatch):
    made = Scheme("block-64", "block", "FP8, 64x64 blocks", (64, 64), BLOCKS, {"deepseek-fp8": {"weight_block_size": [64, 64]}})
    monkeypatch.setitem(SCHEMES, made.name, made)
    return made


def test_its_numbers_are_modelopts(scheme):
    weight = torch.randn(192, 320, generator=torch.Generator().manual_seed(0))
    ours, _ = quantizer.quantize(weight, scheme, "w")
    theirs, scale = FP8QTensor.quantize(weight, block_sizes=BLOCKS["block_sizes"])
    assert torch.equal(ours.data.view(torch.uint8), theirs._quantized_data.view(torch.uint8))
    assert torch.equal(ours.scale, scale.reshape(3, 5))


def test_both_formats_hold_it_and_verify(scheme, crossing, options, tmp_path):
    fields = {"name": "blocks of 64", "description": "x", "weights": {"scale": "block", "block_size": 64}, "hf": "deepseek-fp8"}
    run(make_plan(crossing, recipe_from(fields, "test"), ("hf", "megatron")), tmp_path / "out", options)
    assert verify(tmp_path / "out", crossing).failures == []
    config = read_json(tmp_path / "out/hf/config.json")["quantization_config"]
    assert (config["weight_block_size"], config["modules_to_not_convert"]) == ([64, 64], ["lm_head"])
