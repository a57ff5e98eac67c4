"""What quantizing each group of linears costs, and keeping those that cost most."""

from dataclasses import replace

import pytest
import torch

from mptq import make_plan, run
from mptq.calibration.tokens import load_tokens
from mptq.layers.forward import run_layer
from mptq.pipeline.layer_quantizer import place
from mptq.quantize import quantizer
from mptq.quantize.fp8 import dequantize
from mptq.recipes.schemes import SCHEMES
from mptq.report import read
from tests.conftest import mptq, read_json
from tests.integration.test_rounding import first_layer, read_source
from tests.support.killing import check, comparable


@pytest.mark.parametrize("model", ["aligned", "mixtral"])
def test_bytes_are_the_same_and_every_group_has_a_cost(request, options, model, tmp_path):
    plan = make_plan(request.getfixturevalue(model), "fp8-blockwise", ("hf", "megatron"))
    run(plan, tmp_path / "plain" / "out", options)
    report = run(plan, tmp_path / "measured" / "out", replace(options, sensitivity=True))
    apart = ["report.json: layers", "report.json: predicted_peak_bytes", "manifest.json"]  # which has the option
    check(tmp_path / "measured" / "out", comparable(tmp_path / "plain" / "out"), apart)
    plain, measured = (read_json(tmp_path / name / "out" / "manifest.json") for name in ("plain", "measured"))
    assert plain["tensors"] == measured["tensors"]
    mlp = ["linear_fc1", "linear_fc2"] if model == "aligned" else ["linear_fc1+linear_fc2"]
    for row in report["layers"]:
        assert list(row["sensitivity"]) == ["linear_qkv", "linear_proj", *mlp]
        assert all(0 < cost < 0.1 for cost in row["sensitivity"].values())
        assert 0 < row["hidden_token_error"] < 0.5


def test_the_cost_of_the_first_group_is_what_it_does_to_the_layers_output(aligned, options, tmp_path):
    plan = make_plan(aligned, "fp8-blockwise", ("megatron",))
    report = run(plan, tmp_path / "out", replace(options, sensitivity=True))
    layer, _ = first_layer(plan, options, tmp_path)
    held = load_tokens(options.data, None, plan.model.vocab_size, calibrate=False).held_out
    ids = torch.stack([torch.from_numpy(row) for row in held])
    words = read_source(plan, "embedding.word_embeddings.weight", (plan.model.padded_vocab_size, plan.model.hidden_size))
    hidden = torch.nn.functional.embedding(ids, words)
    before = run_layer(layer, plan.model, hidden).float()
    weight = layer.get_parameter("self_attention.linear_qkv.weight").data
    made, _ = quantizer.quantize(weight, SCHEMES["block"], "w")
    place(layer, "self_attention.linear_qkv.weight", dequantize(made, SCHEMES["block"]).bfloat16())
    after = run_layer(layer, plan.model, hidden).float()
    expected = ((after - before).square().sum(-1) / before.square().sum(-1)).mean()
    assert report["layers"][0]["sensitivity"]["linear_qkv"] == pytest.approx(float(expected), rel=1e-3)


def test_the_costliest_groups_are_kept(aligned, tokens, tmp_path):
    data = ("--calib-dataset", tokens, "--eval-size", 3, "--calib-seq-length", 32, "--device", "cpu", "-q")
    for share, out in ((None, "plain"), ("30%", "out")):
        more = () if share is None else ("--keep-bytes", share)
        done = mptq("quantize", aligned, "--recipe", "fp8-blockwise", *data, *more, "-o", tmp_path / out)
        assert done.returncode == 0, done.stderr
    plain, kept = read(tmp_path / "plain"), read(tmp_path / "out")
    assert kept["fidelity"]["kl"]["mean"] < plain["fidelity"]["kl"]["mean"]
    patterns = [override["pattern"] for override in kept["recipe"]["overrides"]]
    assert patterns
    assert all(pattern.startswith("decoder.layers.") for pattern in patterns)

    def elements(report):
        return sum(row["shape"][0] * row["shape"][1] for row in report["tensors"])

    assert 0.7 <= elements(kept) / elements(plain) < 1
    done = mptq("quantize", aligned, "--recipe", "fp8-blockwise", "--keep-bytes", "5%", "--dry-run")
    assert done.returncode == 2
    assert "--keep-bytes measures the model, which --dry-run does not run: pass only one of them" in done.stderr
