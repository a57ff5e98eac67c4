"""The FP8 cache of multi-latent attention, whose scale covers what engines cache: latents and the rotated shared key."""

import math

import pytest
import torch

from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.hidden_state_pair import HiddenStatePair
from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.reader import Reader
from mptq.layers.forward import run_layer
from mptq.layers.transformer_layer import build_layer
from mptq.pipeline.context import PlannedReader
from mptq.plan.estimates import warnings
from mptq.quantize.activation_quantizers import ActivationQuantizers
from mptq.recipes.recipe import Calibration, load_recipe
from tests.integration.test_calibration import fake_quantized
from tests.integration.test_engines import distance
from tests.support.driving import Driven, Kept, float32, logits_of, tokens_of, transformers_model, weights_of
from tests.support.zoo import observed

pytestmark = pytest.mark.slow

MODELS = ["deepseek-v3", "deepseek-v2-lite"]
"""A model with a compressed query and plain rotation, and one with neither."""
LARGER = 8
"""Factor for latents that leaves the model's function unchanged (a power of two: exact)."""
FACTORS = {"kv_layernorm.weight": LARGER, "linear_kv_up_proj.weight": 1 / LARGER}


@pytest.fixture
def enlarged(monkeypatch):
    """Make every checkpoint be read with larger latents."""
    read = PlannedReader._read

    def reparametrized(self, item):
        factor = next((factor for ending, factor in FACTORS.items() if item.name.endswith(ending)), 1)
        return read(self, item) * factor

    monkeypatch.setattr(PlannedReader, "_read", reparametrized)


def plan_of(checkpoint, kv_cache="fp8", formats=("hf",)):
    return make_plan(checkpoint, load_recipe("fp8-per-channel").changed(kv_cache=kv_cache), formats)


def scales_of(driven, kind):
    """The scale of each layer, in the compressed-tensors form."""
    layers = range(driven.streams.plan.model.num_layers)
    return [float(driven.tensors["hf"][f"model.layers.{layer}.self_attn.{kind}_scale"]) for layer in layers]


def bfloat16_above(value):
    """The smallest bfloat16 that is at least `value`."""
    rounded = torch.tensor(value).bfloat16()
    return float(rounded if float(rounded) >= value else torch.nextafter(rounded, torch.tensor(math.inf).bfloat16()))


def reader_of(checkpoint):
    index = open_checkpoint(checkpoint)
    reader = Reader(index)
    return lambda name: reader.read(name, torch.empty(index.tensors[name].spec.shape, dtype=torch.bfloat16)).float()


@pytest.mark.parametrize("name", MODELS)
def test_the_magnitude_equals_the_whole_models_bit_for_bit(zoo, name):
    """The magnitude of a layer on megatron-core's hidden states equals that in megatron-core's own norm and core attention."""
    expected = observed(zoo(name))
    plan = float32(plan_of(zoo(name) / "ckpt"))
    read = reader_of(zoo(name) / "ckpt")
    for index, (hidden, cached) in enumerate(zip(expected["hidden"], expected["cached"], strict=False)):
        layer = build_layer(plan.model, index)
        shapes = {name: weight.shape for name, weight in layer.state_dict().items()}
        weights = {name: torch.zeros(shape) for name, shape in shapes.items()}  # zeros for the part after the attention
        prefix = f"decoder.layers.{index}."
        for copy in plan.unquantized(index):
            if copy.parameter.startswith(("input_layernorm", "self_attention")):
                place = plan.source.places[prefix + copy.megatron][0].key
                weights[copy.parameter] = read(place)
        for part in plan.linears(index):
            if part.module.startswith("self_attention"):
                weights[f"{part.module}.weight"] = read(f"{prefix}{part.megatron}.weight")
        layer.load_state_dict(weights, assign=True)
        observers = ActivationQuantizers(layer.eval(), (), ("latent",), Calibration(), "layer")
        observers.calibrate(lambda layer, model=plan.model, hidden=hidden: run_layer(layer, model, hidden))
        assert float(observers.magnitudes()["latent"]) == float(cached.max())


@pytest.mark.parametrize("name", MODELS)
def test_one_scale_for_k_and_v_from_what_the_whole_model_caches(zoo, name, tmp_path):
    expected = observed(zoo(name))
    driven = Driven(float32(plan_of(zoo(name) / "ckpt")), tokens_of([], calibration=expected["ids"]), tmp_path, batch_size=4)
    wanted = [float(row.max() / 448) for row in expected["cached"]]
    assert scales_of(driven, "k") == scales_of(driven, "v")
    for scale, least in zip(scales_of(driven, "k"), wanted, strict=True):
        assert scale == bfloat16_above(scale)
        assert least * (1 - 5e-6) <= scale <= least * (1 + 2**-7)
    assert [row["kv_cache"] for row in driven.log.layers] == [{"k_scale": s, "v_scale": s} for s in scales_of(driven, "k")]


@pytest.mark.parametrize("name", MODELS)
def test_larger_latents_have_a_larger_scale(zoo, name, tmp_path, enlarged):
    expected = observed(zoo(name))
    driven = Driven(float32(plan_of(zoo(name) / "ckpt")), tokens_of([], calibration=expected["ids"]), tmp_path, batch_size=4)
    for scale, (latent, shared) in zip(scales_of(driven, "k"), expected["cached"].tolist(), strict=True):
        least = max(LARGER * latent, shared) / 448
        assert least * (1 - 5e-6) <= scale <= least * (1 + 2**-7)


def rounding_latents(model, scales):
    """Round what transformers' model caches, with hooks and an output's scales."""
    for name, module in model.named_modules():
        if not name.endswith("self_attn"):
            continue
        scale, rotary = scales[f"{name}.k_scale"], model.config.qk_rope_head_dim
        module.kv_a_layernorm.register_forward_hook(lambda _module, _given, out, scale=scale: fake_quantized(out, scale))
        expand = module.expand_kv

        def expanded(latents, shared, expand=expand, scale=scale, rotary=rotary):
            assert shared.shape[-1] == rotary
            return expand(latents, fake_quantized(shared, scale))

        module.expand_kv = expanded


@pytest.mark.parametrize("larger", [False, True], ids=["as it is", "reparametrized"])
@pytest.mark.parametrize("name", MODELS)
def test_the_quantized_stream_matches_transformers_with_rounded_latents(zoo, name, larger, request, tmp_path):
    run(make_plan(zoo(name) / "ckpt", "none"), tmp_path / "bf16", Options(device="cpu", data=DataOptions((), eval_size=0)))
    if larger:
        request.getfixturevalue("enlarged")
    ids = observed(zoo(name))["ids"]
    plan = float32(plan_of(zoo(name) / "ckpt"))
    driven = Driven(plan, tokens_of(ids, calibration=ids), tmp_path)
    weights, scales = weights_of(driven.tensors["hf"], plan.recipe.scheme)
    theirs = transformers_model(tmp_path / "bf16", weights)
    unrounded = logits_of(theirs, ids)
    rounding_latents(theirs, scales)
    expected = logits_of(theirs, ids)
    pairs = zip(driven.streams.logits[1].split(ids.shape[1]), expected.split(ids.shape[1]), strict=True)
    apart = sorted(distance(*pair) for pair in pairs)
    # In the other sequences the last bit of a sum moves a latent across a tie (tests/integration/test_calibration.py).
    assert apart[0] < 2e-5
    assert apart[-1] < 0.1 * distance(unrounded, expected)


class Clipping(Kept):
    """Streams whose cache scales are an eighth of the correct magnitude."""

    def calibrate(self, *arguments):
        found = super().calibrate(*arguments)
        found.amax["latent"] /= 8
        return found


def test_the_report_shows_the_rounding(zoo, tmp_path, enlarged):
    """The effect is small with the correct scale, and large with one that covers only K and V (4.7, while latents reach 40)."""
    ids = observed(zoo("deepseek-v3"))["ids"]
    tokens, checkpoint = tokens_of(ids, calibration=ids), zoo("deepseek-v3") / "ckpt"
    plain, right, clipped = (
        Driven(plan_of(checkpoint, cache), tokens, tmp_path, kind=kind).log
        for cache, kind in (("none", Kept), ("fp8", Kept), ("fp8", Clipping))
    )
    assert 1.05 < right.layers[0]["hidden_relative_error"] / plain.layers[0]["hidden_relative_error"] < 1.3
    assert plain.fidelity["kl"]["mean"] < right.fidelity["kl"]["mean"] < 2 * plain.fidelity["kl"]["mean"]
    assert clipped.fidelity["kl"]["mean"] > 20 * right.fidelity["kl"]["mean"]


def test_megatrons_scales_are_those_of_its_quantizers_inputs(zoo, tmp_path):
    """ModelOpt's quantizers are in the core attention, on decompressed K and V; with both formats, each has its own scales."""
    ids = observed(zoo("deepseek-v3"))["ids"]
    both = plan_of(zoo("deepseek-v3") / "ckpt", formats=("hf", "megatron"))
    alone = plan_of(zoo("deepseek-v3") / "ckpt", formats=("megatron",))
    assert any("decompressed K and V" in note for note in warnings(both))
    assert not any("decompressed" in note for note in warnings(plan_of(zoo("deepseek-v3") / "ckpt")))
    seen = []

    class Watched(HiddenStatePair):
        def calibrate(self, index, layer, static):
            largest = {}

            def keep(_module, given):
                parts = zip(("k", "v"), given[1:3], strict=True)
                largest.update({kind: max(largest.get(kind, 0.0), float(part.abs().max())) for kind, part in parts})

            hook = layer.self_attention.core_attention.register_forward_pre_hook(keep)
            found = super().calibrate(index, layer, static)
            hook.remove()
            seen.append(largest)
            return found

    outputs = [Driven(plan, tokens_of(ids, calibration=ids), tmp_path, kind=Watched) for plan in (both, alone)]
    for output in outputs:
        for layer, largest in enumerate(seen[:3]):
            for kind in "kv":
                key = f"decoder.layers.{layer}.self_attention.core_attention.{kind}_bmm_quantizer._amax"
                assert float(output.tensors["megatron"][key]) == bfloat16_above(largest[kind] / 448) * 448
    assert seen[:3] == seen[3:]
    # The stream follows the Hugging Face format if it is written.
    assert [row["kv_cache"] for row in outputs[0].log.layers] != [row["kv_cache"] for row in outputs[1].log.layers]
    assert outputs[0].log.layers[0]["kv_cache"]["k_scale"] == outputs[0].log.layers[0]["kv_cache"]["v_scale"]
