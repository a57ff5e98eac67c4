"""Rounding by the inputs, end to end: both formats, every scheme, experts and latents, several processes, resume, verify."""

import re
from dataclasses import replace
from functools import partial

import modelopt.torch.quantization as mtq
import pytest
import torch

from mptq import RealQuantTransformerLayer, make_plan, run, verify
from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.hidden_state_pair import HiddenStateOptions, HiddenStatePair
from mptq.calibration.moments import moments
from mptq.calibration.tokens import load_tokens
from mptq.checkpoint.reader import Reader
from mptq.errors import CheckpointError, DataError
from mptq.formats import FORMATS
from mptq.formats.layout import canonical_weight
from mptq.layers.forward import run_layer
from mptq.layers.transformer_layer import build_layer
from mptq.model.tensors import outer_copies
from mptq.pipeline import layer_quantizer
from mptq.pipeline.layer_quantizer import place
from mptq.quantize.modelopt import quant_config, silenced
from mptq.recipes.recipe import load_recipe
from mptq.recipes.schemes import SCHEMES
from mptq.report import read
from tests.conftest import RECIPES, mptq
from tests.integration.test_resume import BOTH, stopped, whole
from tests.integration.test_verification import edit_hf
from tests.support.killing import check, comparable

ENOUGH = 40
"""Sequences of 32 tokens: more tokens than the tiny models have inputs."""


@pytest.fixture
def enough(options, tokens):
    return replace(options, data=DataOptions((str(tokens),), calib_size=ENOUGH, eval_size=3, seq_length=32))


def rounded(recipe, method):
    return load_recipe(recipe).changed(rounding=method)


CASES = [
    *(("aligned", recipe, method) for recipe in (*RECIPES, "fp8-blockwise-ue8m0") for method in ("gptq", "qep")),
    *(("aligned", recipe, "scales") for recipe in (*RECIPES, "fp8-blockwise-ue8m0") if recipe != "mxfp8"),
    *((model, "fp8", method) for model in ("mixtral", "deepseek-v3") for method in ("scales", "gptq", "qep")),
    *(("mixtral", "fp8-blockwise", "gptq"), ("deepseek-v3", "fp8-per-channel", "gptq")),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "recipe", "method"), CASES)
def test_both_formats_are_nearer_than_nearest_and_verify(request, zoo, enough, model, recipe, method, tmp_path):
    checkpoint = zoo(model) / "ckpt" if "-" in model else request.getfixturevalue(model)
    plan = make_plan(checkpoint, rounded(recipe, method), BOTH)
    report = run(plan, tmp_path / "out", enough)
    assert verify(tmp_path / "out", checkpoint).failures == []
    rows = [row for row in report["tensors"] if row["output_error"] is not None]
    assert rows
    assert all(row["output_error"] <= row["output_error_nearest"] for row in rows)
    better = [row for row in rows if row["rounding"] != "nearest"]
    assert all(row["output_error"] < row["output_error_nearest"] for row in better)
    if method != "scales":
        assert sum(row["rounding"] in ("gptq", method) for row in rows) > len(rows) / 4


@pytest.mark.slow
def test_the_same_bytes_from_several_processes(mixtral, tokens, enough, tmp_path_factory):
    alone = tmp_path_factory.mktemp("alone") / "out"
    run(make_plan(mixtral, rounded("fp8-blockwise", "qep"), BOTH), alone, replace(enough, max_shard_bytes=200_000))
    for size in (2, 3):
        out = tmp_path_factory.mktemp(str(size)) / "out"
        data = ("--calib-dataset", tokens, "--calib-size", ENOUGH, "--eval-size", 3, "--calib-seq-length", 32)
        more = ("--calib-batch-size", 4, "--format", "hf,megatron", "--max-shard-size", 200000, "--rounding", "qep")
        done = mptq("quantize", mixtral, "--recipe", "fp8-blockwise", *data, *more, "-o", out, "--quiet", processes=size)
        assert done.returncode == 0, done.stderr
        figures = ("calibration", "fidelity", "layers", "predicted_peak_bytes", "ranks")
        check(out, comparable(alone), apart=[f"report.json: {key}" for key in figures])
        assert read(out)["tensors"] == read(alone)["tensors"]


@pytest.mark.parametrize("method", ["gptq", "qep"])
def test_a_stopped_run_resumes(aligned, enough, method, tmp_path, tmp_path_factory):
    plan = make_plan(aligned, rounded("fp8-blockwise", method), BOTH)
    stopped(plan, tmp_path / "out", 2, enough)
    document = run(plan, tmp_path / "out", replace(enough, resume=True))
    check(tmp_path / "out", whole(plan, tmp_path_factory.mktemp("one"), enough))
    assert {row["rounding"] for row in document["tensors"]} <= {method, "nearest"}


def test_codes_that_were_changed_do_not_verify(aligned, enough, tmp_path):
    run(make_plan(aligned, rounded("fp8-per-channel", "gptq"), BOTH), tmp_path / "out", enough)
    name = "model.layers.0.mlp.down_proj.weight"

    def change(tensors):
        tensors[name].view(torch.uint8)[::4] ^= 1 << 7  # the sign

    edit_hf(tmp_path / "out", change)
    (failure,) = verify(tmp_path / "out", aligned).failures
    assert re.fullmatch(rf"{name}: the error is \d+\.\d times that of the nearest codes", failure)

    def spoil(tensors):
        tensors[name].view(torch.uint8)[0, 0] = 0x7F

    edit_hf(tmp_path / "out", spoil)
    assert verify(tmp_path / "out", aligned).failures == [f"{name}: some of its codes are NaN"]


def test_without_a_tokenizer_or_token_ids_it_is_refused(aligned, options, tmp_path):
    none = replace(options, data=replace(options.data, datasets=()))
    with pytest.raises(DataError, match="tokenizer"):
        run(make_plan(aligned, rounded("fp8-per-channel", "gptq")), tmp_path / "out", none)
    assert not (tmp_path / "out").exists()


def test_activations_that_are_not_finite_are_one_line(aligned, enough, monkeypatch, tmp_path):
    def broken(rows, *others):
        found = moments(rows, *others)
        found.fitted[0, 0] = torch.nan
        return found

    monkeypatch.setattr(layer_quantizer, "moments", broken)
    with pytest.raises(CheckpointError, match=r"^decoder\.layers\.0\.self_attention\.linear_qkv: .* not finite\n"):
        run(make_plan(aligned, rounded("fp8-per-channel", "gptq")), tmp_path / "out", enough)


@pytest.mark.parametrize(
    ("model", "method"), [*(("aligned", method) for method in ("scales", "gptq", "qep")), ("mixtral", "gptq")]
)
def test_modelopts_algorithm_of_that_name_rounds_a_layer_the_same(request, enough, model, method, tmp_path):
    """The first layer, whose inputs no earlier one has changed: `mtq.quantize` and `mtq.compress`, as anyone may call them."""
    plan = make_plan(request.getfixturevalue(model), rounded("fp8-blockwise", method), ("megatron",))
    run(plan, tmp_path / "out", enough)
    layer, loop = first_layer(plan, enough, tmp_path)
    assert isinstance(layer, RealQuantTransformerLayer)
    with silenced():
        mtq.quantize(layer, quant_config(SCHEMES["block"]) | {"algorithm": {"method": f"mptq_{method}"}}, loop)
        mtq.compress(layer)
    stored = FORMATS["megatron"].open(tmp_path / "out")
    for linear in plan.linears(0):
        module = layer.get_submodule(linear.module)
        parts = FORMATS["megatron"].load_linear(plan.layouts["megatron"], stored, 0, linear)
        found = torch.cat([part.data.view(torch.uint8) for part in parts])
        assert torch.equal(module.weight.data.view(torch.uint8), found)


def test_modelopts_algorithm_needs_a_loop(aligned, enough, tmp_path):
    layer, _ = first_layer(make_plan(aligned, "fp8-blockwise"), enough, tmp_path)
    with silenced(), pytest.raises(CheckpointError, match="^mptq_gptq needs a forward_loop: pass one that calls the layer"):
        mtq.quantize(layer, quant_config(SCHEMES["block"]) | {"algorithm": {"method": "mptq_gptq"}})


def read_source(plan, name, shape):
    """A tensor of the checkpoint, by its canonical name."""
    return Reader(plan.source.checkpoint).read_parts(plan.source.places[name], torch.empty(shape, dtype=torch.bfloat16))


def first_layer(plan, options, folder):
    """The first layer with its weights, and a loop that passes the calibration tokens' embeddings through it."""
    model, read = plan.model, partial(read_source, plan)
    layer = build_layer(model, 0)
    for tensor in plan.unquantized(0):
        place(layer, tensor.parameter, read(f"decoder.layers.0.{tensor.megatron}", tensor.shape))
    for linear in plan.linears(0):
        place(layer, f"{linear.module}.weight", read(canonical_weight(0, linear), linear.shape))
    tokens = load_tokens(options.data, None, model.vocab_size, calibrate=True)
    states = HiddenStatePair(plan, tokens, HiddenStateOptions(torch.device("cpu"), options.batch_size, 1 << 30, folder))
    before, _ = outer_copies(model)
    states.embed([read(tensor.megatron, tensor.shape) for tensor in before])

    def loop(called):
        for batch in states.calibration:
            stream = states.quantized if plan.recipe.propagates else states.reference
            run_layer(called, model, stream.read(batch, torch.device("cpu")))

    return layer, loop
