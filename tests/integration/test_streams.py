"""The streams of activations compared with whole models: megatron-core's in BF16, transformers' in float32."""

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM

import mptq.layers.linear
import mptq.pipeline.run
from mptq.calibration.hidden_state_pair import _representable
from mptq.layers.forward import final_norm
from mptq.plan.plan import make_plan
from mptq.quantize.fp8 import dequantize, floored
from mptq.recipes.recipe import load_recipe
from mptq.types import Fp8Weight
from tests.integration.test_engines import distance
from tests.support.driving import (
    IDS,
    MODELS,
    Driven,
    check_fidelity,
    float32,
    largest_inputs,
    logits_of,
    source_logits,
    tokens_of,
    transformers_model,
    weights_of,
)
from tests.support.processes import checked, python


@pytest.fixture(scope="module")
def whole(request, tmp_path_factory):
    """Hidden states and logits of megatron-core's own whole model, by model; each computed once in a separate process."""
    found = {}

    def get(model):
        if model not in found:
            folder = tmp_path_factory.mktemp("whole")
            paths = ["--hf", request.getfixturevalue(f"{model}_hf"), "--checkpoint", request.getfixturevalue(model)]
            checked(python("-m", "tests.support.plain_megatron", "observed", *paths, "--out", folder))
            found[model] = torch.load(folder / "fp8-blockwise" / "observed.pt")
        return found[model]

    return get


@pytest.fixture(scope="module")
def sources(request):
    """transformers' float32 logits of the BF16 weights on `IDS`, by model; computed once."""
    found = {}

    def get(model):
        if model not in found:
            found[model] = source_logits(request.getfixturevalue(f"{model}_hf"))
        return found[model]

    return get


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_the_reference_equals_the_whole_model_bit_for_bit(whole, model, request, tmp_path, monkeypatch):
    expected = whole(model)
    plan = make_plan(request.getfixturevalue(model), "fp8-per-channel")
    tokens = tokens_of(expected["ids"])
    hidden = expected["hidden"].transpose(0, 1).flatten(0, 1)
    close = Driven(plan, tokens, tmp_path).streams.hidden[0]
    monkeypatch.setattr(mptq.layers.linear, "project", linear)
    streams = Driven(plan, tokens, tmp_path).streams
    assert torch.equal(streams.hidden[0], hidden)
    found = linear(final_norm(hidden, streams.norm, plan.model), streams.head)[:, : plan.model.vocab_size]
    assert torch.equal(found, expected["logits"].flatten(0, 1))
    # mptq's own product sums in float32 and rounds once: units of 2^-8 in hidden states, over up to 8 products.
    assert distance(close, hidden) < 2.0**-6
    # Logits are not rounded to BF16: half a unit, plus the difference of the hidden states.
    assert distance(streams.logits[0], found) < 2.0**-7


@pytest.mark.parametrize("model", MODELS)
def test_the_reference_matches_transformers(sources, model, request, tmp_path):
    plan = make_plan(request.getfixturevalue(model), "fp8-per-channel")
    exact = Driven(float32(plan), tokens_of(IDS), tmp_path).streams.logits[0]
    # Float32 on both sides: the remaining difference is the order of sums.
    assert distance(exact, sources(model)) < 2e-5
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(request.getfixturevalue(f"{model}_hf"), dtype=torch.bfloat16)
        theirs = logits_of(loaded.eval(), IDS)
    ours = Driven(plan, tokens_of(IDS), tmp_path).streams.logits[0]
    # Roundings to BF16, each of 2^-9, add up over layers; transformers rounds more often than mptq's float32 sums.
    assert distance(ours, theirs) < 2.0**-6
    assert distance(ours, exact) < 1.5 * distance(theirs, exact) < 2.0**-5


QUANTIZED = [
    ("aligned", "fp8-blockwise", ("hf",)),
    ("aligned", "mxfp8", ("hf",)),
    ("crossing", "fp8-blockwise", ("hf", "megatron")),  # the formats hold different numbers: the stream uses Hugging Face's
    ("crossing", "fp8-per-channel", ("hf",)),
    ("crossing", "fp8-per-tensor", ("hf", "megatron")),
    ("mixtral", "mxfp8", ("hf",)),
    ("mixtral", "fp8-per-channel", ("hf",)),
]


@pytest.mark.parametrize(("model", "recipe", "formats"), QUANTIZED)
def test_the_quantized_stream_matches_the_output(sources, model, recipe, formats, request, tmp_path):
    plan = float32(make_plan(request.getfixturevalue(model), recipe, formats))
    driven = Driven(plan, tokens_of(IDS), tmp_path)
    weights, _ = weights_of(driven.tensors["hf"], plan.recipe.scheme)
    expected = logits_of(transformers_model(request.getfixturevalue(f"{model}_hf"), weights), IDS)
    assert distance(driven.streams.logits[1], expected) < 2e-5
    assert distance(expected, sources(model)) > 1e-3
    check_fidelity(driven.log.fidelity, sources(model), expected)


def test_the_quantized_stream_matches_a_megatron_output(crossing, crossing_hf, tmp_path):
    """Blocks of the fused matrices, which no Hugging Face output contains."""
    plan = float32(make_plan(crossing, "fp8-blockwise", ("megatron",)))
    driven = Driven(plan, tokens_of(IDS), tmp_path)
    stored, weights = driven.tensors["megatron"], load_file(crossing_hf / "model.safetensors")
    for layer in range(plan.model.num_layers):
        for part in plan.linears(layer):
            name = f"decoder.layers.{layer}.{part.megatron}"
            data = torch.cat([stored[f"{name}.{key}"].view(torch.uint8) for key in part.keys]).view(torch.float8_e4m3fn)
            fused = dequantize(Fp8Weight(data, stored[f"{name}.weight_quantizer._scale"]), plan.recipe.scheme)
            members = zip(part.hf, part.fusion.split(fused), strict=True)
            weights |= {f"model.layers.{layer}.{member}.weight": value for member, value in members}
    expected = logits_of(transformers_model(crossing_hf, weights), IDS)
    assert distance(driven.streams.logits[1], expected) < 2e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("amax", [2.0**-40, 1e-9, 1e-3, 0.03, 5.8, 43.8, 448.0, 60000.0])
def test_scales_of_the_cache_are_exact_in_the_dtype_of_engines(amax, dtype):
    """Exact and normal in vLLM's dtype for them, at least amax / 448, and at most one bfloat16 above it."""
    amax = floored(torch.tensor(amax))
    scale = _representable(amax, dtype) / 448
    assert scale == scale.bfloat16().float() == scale.to(dtype).float()
    assert scale >= max(amax / 448, torch.finfo(dtype).tiny)
    assert scale <= max(amax / 448 * (1 + 2**-7), torch.tensor(torch.finfo(dtype).tiny))


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
def test_static_scales_are_the_largest_inputs_of_the_whole_model(whole, model, request, tmp_path, monkeypatch):
    monkeypatch.setattr(mptq.layers.linear, "project", linear)
    expected = whole(model)
    plan = make_plan(request.getfixturevalue(model), load_recipe("fp8").changed(kv_cache="fp8"))
    # Every id of the vocabulary is held out: the maxima over all of these are larger.
    everything = torch.arange(500).view(4, 125)
    driven = Driven(plan, tokens_of(everything, calibration=expected["ids"]), tmp_path)
    inputs, cache = largest_inputs(driven)
    amax = expected["amax"]
    assert inputs.keys() | cache.keys() == amax.keys()
    # For experts, mptq applies the router's weights after the second linear and megatron-core before it: equal except for
    # rounding. So values after the first experts are not bit-identical to megatron-core's.
    close = {name: 2.0**-7 if model == "mixtral" and not name.startswith("layers.0.") else 0.0 for name in amax}
    for name, scale in inputs.items():
        assert abs(scale - float(amax[name] / 448)) <= close[name] * scale, name
    for name, scale in cache.items():
        least = float(amax[name] / 448)
        assert float(scale) == float(scale.bfloat16())
        assert float(scale) * (1 - 2.0**-7 - close[name]) < least <= float(scale) * (1 + close[name])
    wider, _ = largest_inputs(Driven(plan, tokens_of([], calibration=everything), tmp_path))
    assert sum(wider[name] > inputs[name] for name in inputs) > len(inputs) / 2
