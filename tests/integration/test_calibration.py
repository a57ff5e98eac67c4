"""Static scales: their effect on the quantized stream, the calibration data, splitting into batches, and refusals."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import linear, silu
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import mptq.layers.transformer_layer
import mptq.pipeline.run
from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.tokens import load_tokens
from mptq.errors import CheckpointError
from mptq.layers.forward import run_layer
from mptq.pipeline.context import PlannedReader
from mptq.plan.plan import make_plan
from mptq.recipes.recipe import Calibration, load_recipe
from tests.integration.test_engines import distance
from tests.support.driving import (
    CPU,
    IDS,
    OTHERS,
    Driven,
    Kept,
    check_fidelity,
    float32,
    largest_inputs,
    logits_of,
    source_logits,
    tokens_of,
    transformers_model,
    weights_of,
)
from tests.unit.calibration.conftest import write_indexed


def fake_quantized(tensor, scale):
    """Round to E4M3 with a scale, as an engine does with `scale` from its checkpoint."""
    return (tensor / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def rounding_inputs(model, scales):
    """Round the input of every linear of `model` that has an input scale, and store the scales of K and V."""
    for name, module in model.named_modules():
        scale = scales.get(f"{name}.input_scale")
        if scale is not None:
            module.register_forward_pre_hook(lambda _, arguments, scale=scale: (fake_quantized(arguments[0], scale),))
        if f"{name}.k_proj.k_scale" in scales:
            module.cache_scales = scales[f"{name}.k_proj.k_scale"], scales[f"{name}.v_proj.v_scale"]
        if name.endswith("mlp.experts"):
            prefix = name.replace("mlp", "block_sparse_moe")
            inputs = [[scales[f"{prefix}.{index}.w{part}.input_scale"] for part in (1, 3, 2)] for index in range(4)]
            module.forward = partial(rounding_experts, module, inputs)


def rounding_experts(module, scales, hidden, chosen, weights):
    """Compute transformers' experts, which it fuses, one at a time."""
    out = torch.zeros_like(hidden)
    for index, (gate, up, down) in enumerate(scales):
        token, place = torch.where(chosen == index)
        parts = zip((gate, up), module.gate_up_proj[index].chunk(2), strict=True)
        left, right = (linear(fake_quantized(hidden[token], scale), weight) for scale, weight in parts)
        states = linear(fake_quantized(silu(left) * right, down), module.down_proj[index])
        out.index_add_(0, token, states * weights[token, place, None])
    return out


def attend(module, query, key, value, *arguments, **options):
    """transformers' attention with K and V rounded after the rotary embedding."""
    key, value = (fake_quantized(part, scale) for part, scale in zip((key, value), module.cache_scales, strict=True))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, *arguments, **options)


@pytest.mark.parametrize(("model", "kv_cache"), [("aligned", "none"), ("crossing", "fp8"), ("mixtral", "fp8")])
def test_static_activations_are_rounded_with_the_scales_of_the_output(model, kv_cache, request, tmp_path):
    plan = float32(make_plan(request.getfixturevalue(model), load_recipe("fp8").changed(kv_cache=kv_cache)))
    folder = request.getfixturevalue(f"{model}_hf")
    driven = Driven(plan, tokens_of(IDS, calibration=OTHERS), tmp_path)
    weights, scales = weights_of(driven.tensors["hf"], plan.recipe.scheme)
    theirs = transformers_model(folder, weights)
    unrounded = logits_of(theirs, IDS)
    rounding_inputs(theirs, scales)
    if kv_cache == "fp8":
        ALL_ATTENTION_FUNCTIONS.register("rounding", attend)
        theirs.set_attn_implementation("rounding")
    expected = logits_of(theirs, IDS)
    pairs = zip(driven.streams.logits[1].split(IDS.shape[1]), expected.split(IDS.shape[1]), strict=True)
    apart = sorted(distance(*pair) for pair in pairs)
    # If the last bit of a sum moves an input across a rounding tie, it changes by 2^-3, one of 256 terms of a product. That
    # is rare (the bits are 2^-20 of a step): most sequences are unaffected.
    assert apart[len(apart) // 2] < 2e-5
    assert apart[-1] < 2e-2
    assert distance(unrounded, expected) > 2e-2
    check_fidelity(driven.log.fidelity, source_logits(folder), expected, close=1e-3 if apart[-1] < 2e-5 else 1e-2)


@pytest.mark.parametrize("propagate", ["reference", "quantized"])
def test_held_out_tokens_do_not_affect_calibration(crossing, propagate, tmp_path):
    plan = make_plan(crossing, recipe_with(propagate))
    one, other = (Driven(plan, tokens_of(ids, calibration=OTHERS), tmp_path) for ids in (IDS, IDS[:0]))
    assert same(one.tensors["hf"], other.tensors["hf"])
    assert one.log.fidelity is not None
    assert other.log.fidelity is None


def recipe_with(propagate, kv_cache="fp8"):
    """The static recipe, calibrated on this stream, `reference` or `quantized`."""
    recipe = load_recipe("fp8").changed(kv_cache=kv_cache)
    return recipe.model_copy(update={"calibration": Calibration(propagate=propagate)})


def same(left, right):
    """Whether two outputs are identical, byte by byte."""
    return left.keys() == right.keys() and all(
        torch.equal(tensor.reshape(-1).view(torch.uint8), right[name].reshape(-1).view(torch.uint8))
        for name, tensor in left.items()
    )


class Watched(Kept):
    """Also keeps, for every layer, the largest inputs of its linears on the quantized stream's calibration tokens."""

    def calibrate(self, index, layer, static):
        self.seen = getattr(self, "seen", {})
        hooks = []
        for part in static:
            name = f"layers.{index}.{part.module}"

            def keep(_module, arguments, name=name):
                self.seen[name] = max(self.seen.get(name, 0.0), float(arguments[0].abs().max().float()))

            hooks.append(layer.get_submodule(part.module).register_forward_pre_hook(keep))
        for batch in self.calibration:
            run_layer(layer, self.config, self.quantized.read(batch, CPU))
        for hook in hooks:
            hook.remove()
        return super().calibrate(index, layer, static)


def test_propagated_calibration_uses_the_quantized_stream(crossing, tmp_path):
    plans = [make_plan(crossing, recipe_with(propagate)) for propagate in ("reference", "quantized")]
    # The calibration tokens are also held out, so that the streams return their hidden states too.
    tokens = tokens_of(IDS, calibration=IDS)
    plain, watched = (Driven(plan, tokens, tmp_path, kind=kind) for plan, kind in zip(plans, (Kept, Watched), strict=True))
    inputs, _ = largest_inputs(watched)
    assert inputs == {name: float(torch.tensor(amax) / 448) for name, amax in watched.streams.seen.items()}
    others, _ = largest_inputs(plain)
    first = {name for name in inputs if name.startswith("layers.0.")}
    assert all(inputs[name] == others[name] for name in first)
    assert sum(inputs[name] != others[name] for name in inputs.keys() - first) >= 2
    reference, quantized = watched.streams.hidden
    assert torch.equal(reference, plain.streams.hidden[0][: IDS.numel()])
    assert torch.equal(quantized[: IDS.numel()], quantized[IDS.numel() :])
    assert len(quantized) == 2 * len(reference)
    assert not torch.equal(quantized[: IDS.numel()], plain.streams.hidden[1])


@pytest.mark.parametrize("propagate", ["reference", "quantized"])
def test_hidden_states_in_files_give_the_same_output_as_in_memory(mixtral, propagate, tmp_path):
    plan = make_plan(mixtral, recipe_with(propagate), ("hf", "megatron"))
    memory, files = (Driven(plan, tokens_of(IDS, calibration=OTHERS), tmp_path, memory=size) for size in (10**9, 0))
    assert (memory.streams.on_disk, files.streams.on_disk) == (False, True)
    assert all(same(memory.tensors[form], files.tensors[form]) for form in plan.formats)
    assert (memory.log.fidelity, memory.log.layers) == (files.log.fidelity, files.log.layers)
    assert all(torch.equal(left, right) for left, right in zip(memory.streams.hidden, files.streams.hidden, strict=True))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """A Megatron dataset of random ids, in documents of different lengths; two have the same length."""
    torch.manual_seed(9)
    lengths = [5, 9, 2, 9, 30, 17, 4, 12, 3]
    rows = [[torch.randint(0, 500, (length,)).tolist()] for length in lengths]
    return write_indexed(tmp_path_factory.mktemp("data") / "ids", rows)


def test_documents_do_not_affect_each_other(crossing, documents, tmp_path):
    options = DataOptions((str(documents),), calib_size=3, eval_size=6, seq_length=16, packed=False)
    tokens = load_tokens(options, None, 500, calibrate=True)
    plan = float32(make_plan(crossing, "fp8"))
    together = Driven(plan, tokens, tmp_path, batch_size=4)
    lengths = [len(ids) for ids in tokens.held_out]
    assert len(set(lengths)) > 2
    states = zip(*(hidden[: sum(lengths)].split(lengths) for hidden in together.streams.hidden), tokens.held_out, strict=True)
    for reference, quantized, ids in states:
        alone = Driven(plan, replace(tokens, held_out=(ids,)), tmp_path)
        assert distance(alone.streams.hidden[0][: len(ids)], reference) < 2e-6
        assert distance(alone.streams.hidden[1], quantized) < 2e-2  # a rounding tie may be broken differently (see above)
        assert same(alone.tensors["hf"], together.tensors["hf"])


def break_weight(monkeypatch, name, factor):
    """Make the run read this weight multiplied by `factor`."""
    read = PlannedReader._read

    def broken(self, item):
        tensor = read(self, item)
        return tensor * factor if item.name == name else tensor

    monkeypatch.setattr(PlannedReader, "_read", broken)


BROKEN = [
    ("fp8", "decoder.layers.1.mlp.linear_fc1.weight", 0, r"^decoder\.layers\.1\.mlp\.linear_fc2: the calibration"),
    ("fp8-per-channel", "decoder.layers.0.mlp.linear_fc1.weight", 2, r"^layer 0: the held-out"),
    ("fp8-per-channel", "output_layer.weight", 2, r"^output layer: the held-out"),
]


@pytest.mark.parametrize(("recipe", "name", "eval_size", "message"), BROKEN)
def test_infinite_activations_stop_the_run(aligned, documents, recipe, name, eval_size, message, tmp_path, monkeypatch):
    break_weight(monkeypatch, name, 3e38 if name.startswith("output") else 1e30)
    data = DataOptions((str(documents),), calib_size=2, eval_size=eval_size, seq_length=8)
    with pytest.raises(CheckpointError, match=f"{message} data produces .* not finite") as caught:
        mptq.pipeline.run.run(make_plan(aligned, recipe), tmp_path / "out", mptq.Options(device="cpu", data=data))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_perplexity_that_overflows_stops_the_run(crossing, monkeypatch, tmp_path):
    """With tied embeddings, this factor leaves the hidden states after the norm unchanged, and gives finite logits of 1e6."""
    break_weight(monkeypatch, "embedding.word_embeddings.weight", 1e7)
    with pytest.raises(CheckpointError, match=r"^output layer: .* not finite$"):
        Driven(make_plan(crossing, "fp8-per-channel"), tokens_of(IDS), tmp_path)
