"""Activation quantizers against short hooks."""

import contextlib

import pytest
import torch
from modelopt.torch.quantization.nn import TensorQuantizer
from torch.nn.functional import linear

from mptq.errors import CheckpointError
from mptq.layers.forward import run_layer
from mptq.layers.transformer_layer import build_layer
from mptq.model.tensors import CORE_ATTENTION, layer_linears
from mptq.quantize.activation_quantizers import CACHED, ActivationQuantizers
from mptq.recipes.recipe import Calibration
from tests.support.models import ARGS, DEEPSEEK, LATENT, MOE_ARGS, model
from tests.unit.layers.test_transformer_layer import filled


@pytest.fixture(params=[(ARGS, "bfloat16"), (ARGS, "float32"), (MOE_ARGS, "bfloat16")], ids=["bf16", "float32", "mixture"])
def layer(request):
    """A config, its layer, the names of its linears, and two batches of hidden states."""
    config, module = filled(*request.param)
    torch.manual_seed(1)
    batches = [torch.randn(2, length, config.hidden_size).to(getattr(torch, config.dtype)) for length in (7, 12)]
    return config, module, [linear.module for linear in layer_linears(config, 0)], batches


MAX = Calibration()


def observe(module, config, batches, names, cached=(), calibration=MAX):
    """The layer's quantizers after the batches have passed through it, and the outputs."""
    observers, outputs = ActivationQuantizers(module, names, cached, calibration, "layer"), []
    observers.calibrate(lambda layer: outputs.extend(run_layer(layer, config, batch) for batch in batches))
    return observers, outputs


@contextlib.contextmanager
def seen(module, names):
    """Inputs of the linears, and K and V at the input of the core attention, in the order of calls."""
    found = {name: [] for name in (*names, "key", "value")}

    def attend(_module, arguments):
        found["key"].append(arguments[1].clone())
        found["value"].append(arguments[2].clone())

    hooks = [
        module.get_submodule(name).register_forward_pre_hook(lambda _, arguments, name=name: found[name].append(arguments[0]))
        for name in names
    ]
    hooks.append(module.get_submodule(CORE_ATTENTION).register_forward_pre_hook(attend))
    yield found
    for hook in hooks:
        hook.remove()


def test_collecting_changes_nothing_and_finds_the_exact_amax(layer):
    config, module, names, batches = layer
    with seen(module, names) as inputs:
        plain = [run_layer(module, config, batch) for batch in batches]
    observers, observed = observe(module, config, batches, names, ("key", "value"))
    assert all(torch.equal(left, right) for left, right in zip(plain, observed, strict=True))
    found = observers.magnitudes()
    assert found.keys() == inputs.keys()
    for name, parts in inputs.items():
        assert found[name].dtype == torch.float32
        assert found[name].shape == ()
        assert float(found[name]) == max(float(part.abs().max()) for part in parts if part.numel()), name
    # The layer goes on as if it had no quantizers.
    after = run_layer(module, config, batches[0])
    assert torch.equal(after, plain[0])


def turned(keys, base):
    """Keys [length, sequences, heads, dim] after the rotary embedding (of the two halves), in float64."""
    length, dim = keys.shape[0], keys.shape[-1]
    angles = torch.arange(length).double()[:, None, None, None] / base ** (torch.arange(0, dim, 2).double() / dim)
    left, right = keys.double().chunk(2, dim=-1)
    return torch.cat([left * angles.cos() - right * angles.sin(), right * angles.cos() + left * angles.sin()], dim=-1)


def test_keys_are_observed_after_the_rotary_embedding(layer):
    config, module, _, batches = layer
    fused = []
    hook = module.self_attention.linear_qkv.register_forward_hook(lambda _module, _arguments, out: fused.append(out[0]))
    observers, _ = observe(module, config, [batches[1].repeat(1, 20, 1)], (), ("key", "value"))
    hook.remove()
    parts = fused[0].unflatten(-1, (config.num_query_groups, -1, config.head_dim))
    found = observers.magnitudes()
    # Megatron rotates in BF16, with cosines and sines rounded to BF16: three roundings of 2^-9.
    close = 3 * 2.0**-9 if config.dtype == "bfloat16" else 1e-4
    largest = float(turned(parts[:, :, :, -2], config.get("rotary_base")).abs().max())
    assert float(found["key"]) == pytest.approx(largest, rel=close)
    assert float(found["key"]) != float(parts[:, :, :, -2].abs().max())
    assert float(found["value"]) == float(parts[:, :, :, -1].abs().max())


@pytest.mark.parametrize("percentile", [90.0, 99.9, 100.0])
def test_percentile_is_torchs_quantile_within_a_bin(layer, percentile):
    config, module, names, batches = layer
    with seen(module, names) as inputs:
        for batch in batches:
            run_layer(module, config, batch)
    observers, _ = observe(
        module, config, batches, names, ("key", "value"), Calibration(method="percentile", percentile=percentile)
    )
    for name, amax in observers.magnitudes().items():
        values = torch.cat([part.float().abs().flatten() for part in inputs[name]])
        first = next(part for part in inputs[name] if part.numel())
        width = float(first.float().abs().max()) / 2048  # ModelOpt's histogram: the first batch sets the bin width
        least, most = (float(torch.quantile(values, percentile / 100, interpolation=side)) for side in ("lower", "higher"))
        assert least - 1.01 * width <= float(amax) <= most + 1.01 * width, name


def rounded(values, amax):
    """Rounded to E4M3 with the scale amax / 448, in the dtype of `values`."""
    scale = amax / 448
    return ((values.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).to(values.dtype)


def near(found, before, amax):
    """`found` is E4M3 of `before`.

    ModelOpt multiplies by 448 / amax, `rounded` divides by amax / 448. They differ in the last bit of float32, so BF16
    values, many of which are ties in E4M3, may round either way. Both results are then equally near (up to rounding in
    the dtype).
    """
    ulp = 2.0**-8 if before.dtype == torch.bfloat16 else 2.0**-20
    exact, found, wanted = (part.float().clamp(-amax, amax) for part in (before, found, rounded(before, amax)))
    assert ((found - exact).abs() <= (wanted - exact).abs() + wanted.abs() * ulp).all()
    assert ((found - wanted).abs() > wanted.abs() * 2.0**-22).sum() <= 0.03 * found.numel()


def test_quantizing_rounds_inputs_keys_and_values_to_e4m3(layer):
    """Inputs are rounded and nothing else changes: a linear's output is that of its rounded input."""
    config, module, names, batches = layer
    observers, _ = observe(module, config, batches, names, ("key", "value"))
    # Half the amax for some: larger values saturate instead of becoming NaN.
    amax = {name: value * (0.5 if index % 2 else 1) for index, (name, value) in enumerate(observers.magnitudes().items())}
    plain, passed, products = run_layer(module, config, batches[1]), {name: [] for name in amax}, []
    observers.round_with(amax)
    for name, quantizer in observers.quantizers.items():
        quantizer.register_forward_hook(lambda _, given, out, name=name: passed[name].append((given[0].clone(), out.clone())))
    module.self_attention.linear_proj.register_forward_hook(lambda _module, _given, out: products.append(out[0].clone()))
    with seen(module, names) as raw:
        out = run_layer(module, config, batches[1])
    assert out.isfinite().all()
    for name, parts in raw.items():
        assert any(part.numel() for part in parts), name
        for part, (before, after) in zip([part for part in parts if part.numel()], passed[name], strict=True):
            assert torch.equal(part, before)
            near(after, before, amax[name])
    assert not torch.equal(out, plain)
    ((_, rounded_input),) = passed["self_attention.linear_proj"]
    weight = module.self_attention.linear_proj.weight
    assert torch.equal(products[0], linear(rounded_input.float(), weight.float()).to(weight.dtype))


def test_a_linear_without_tokens_has_no_amax():
    config, module = filled(MOE_ARGS, "bfloat16")
    names = [linear.module for linear in layer_linears(config, 0)]
    observers, _ = observe(module, config, [torch.randn(1, 1, config.hidden_size).bfloat16()], names, ())
    found = observers.magnitudes()
    experts = {name: amax for name, amax in found.items() if "experts" in name}
    assert sum(amax is not None for amax in experts.values()) == 2 * config.moe_topk
    assert all(amax is not None for name, amax in found.items() if name not in experts)
    _, module = filled(MOE_ARGS, "bfloat16")
    assert all(amax is None for amax in observe(module, config, [], names, ("key", "value"))[0].magnitudes().values())


def test_nothing_to_observe():
    config, module = filled(ARGS, "bfloat16")
    observers, outputs = observe(module, config, [torch.randn(1, 3, config.hidden_size).bfloat16()], ())
    assert observers.magnitudes() == {}
    assert len(outputs) == 1
    assert not hasattr(module, "_modelopt_state")


def test_the_quantizers_of_some_linears_are_enabled():
    config, module = filled(MOE_ARGS, "bfloat16")
    names = [linear.module for linear in layer_linears(config, 0)]
    for chosen in (names[:1], names[:-1], names[2:5]):
        _, module = filled(MOE_ARGS, "bfloat16")
        ActivationQuantizers(module, chosen, ("value",), MAX, "layer")
        enabled = [name for name, part in module.named_modules() if isinstance(part, TensorQuantizer) and part.is_enabled]
        assert sorted(enabled) == sorted([f"{name}.input_quantizer" for name in chosen] + [CACHED["value"]])


@pytest.mark.parametrize(
    "calibration", [Calibration(), Calibration(method="percentile", percentile=99.0)], ids=["max", "percentile"]
)
@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_activations_that_are_not_finite_are_refused_by_name(calibration, value):
    config, module = filled(ARGS, "bfloat16")
    hidden = torch.randn(1, 5, config.hidden_size).bfloat16()
    with torch.no_grad():
        module.mlp.linear_fc1.weight[3] = value
    with pytest.raises(CheckpointError, match=r"^layer\.mlp\.linear_fc2: .* not finite$"):
        observe(module, config, [hidden, hidden], ["self_attention.linear_proj", "mlp.linear_fc2"], (), calibration)


@pytest.mark.parametrize("method", ["max", "percentile"])
def test_inputs_of_only_zeros_are_accepted(method):
    """A dead layer: the amax is 0, and zeros stay zeros."""
    config = model(ARGS)
    module = build_layer(config, 0)
    weights = {name: torch.zeros(weight.shape, dtype=weight.dtype) for name, weight in module.named_parameters()}
    module.load_state_dict(weights, assign=True)
    calibration = Calibration() if method == "max" else Calibration(method="percentile", percentile=99.0)
    names = [linear.module for linear in layer_linears(config, 0)]
    hidden = torch.randn(1, 5, config.hidden_size).bfloat16()
    observers, _ = observe(module, config, [hidden, hidden], names, ("key", "value"), calibration)
    amax = observers.magnitudes()
    assert all(value == 0 for value in amax.values())
    observers.round_with(amax)
    assert torch.equal(run_layer(module, config, hidden), hidden)


@pytest.fixture(params=[(LATENT, "bfloat16"), (DEEPSEEK | {"q_lora_rank": 24}, "float32")], ids=["bf16", "float32"])
def latent(request):
    """A config of multi-latent attention, its layer, and hidden states."""
    config, module = filled(*request.param)
    torch.manual_seed(1)
    return config, module, [torch.randn(2, length, 64).to(getattr(torch, config.dtype)) for length in (7, 12)]


@torch.no_grad()
def rows_of(config, module, hidden):
    """What engines cache, computed by hand: the latent after its norm, and the shared key, here before RoPE."""
    attention, rank = module.self_attention, config.latent.kv_rank
    normed = torch.nn.functional.rms_norm(hidden.transpose(0, 1), (64,), module.input_layernorm.weight, 1e-5)
    row = linear(normed.float(), attention.linear_kv_down_proj.weight.float()).to(hidden.dtype)
    latents = torch.nn.functional.rms_norm(row[..., :rank], (rank,), attention.kv_layernorm.weight, 1e-5)
    return latents, row[..., rank:]


def test_latents_are_observed_as_they_are_cached(latent):
    config, module, batches = latent
    plain = [run_layer(module, config, batch) for batch in batches]
    observers, observed = observe(module, config, batches, (), ("latent",))
    assert all(torch.equal(left, right) for left, right in zip(plain, observed, strict=True))
    rows = [rows_of(config, module, batch) for batch in batches]
    largest = max(float(latents.abs().max()) for latents, _ in rows)
    # A rotation keeps the norm of a pair, which bounds the shared key up to YaRN's factor.
    bound = 1.5 * max(float(shared.norm(dim=-1).max()) for _, shared in rows)
    found = float(observers.magnitudes()["latent"])
    assert found >= largest
    assert found == largest or found <= bound


@pytest.mark.parametrize("part", ["latent", "shared key"])
def test_one_magnitude_covers_the_latent_and_the_shared_key(latent, part):
    """The amax is that of the larger one: the weights of one are multiplied so that the other stays below."""
    config, module, batches = latent
    keys = []
    hook = module.self_attention.core_attention.register_forward_pre_hook(lambda _, given: keys.append(given[1]))
    with torch.no_grad():
        if part == "latent":
            module.self_attention.kv_layernorm.weight *= 64
        else:
            module.self_attention.linear_kv_down_proj.weight[config.latent.kv_rank :] *= 64
    observers, _ = observe(module, config, batches, (), ("latent",))
    hook.remove()
    largest = {
        "latent": max(float(rows_of(config, module, batch)[0].abs().max()) for batch in batches),
        "shared key": max(float(key[..., config.latent.qk_dim :].abs().max()) for key in keys),
    }
    assert largest[part] == max(largest.values())
    assert float(observers.magnitudes()["latent"]) == largest[part]


def test_a_percentile_counts_the_shared_key_once(latent):
    """Not once per head: the histogram is of what is cached."""
    config, module, batches = latent
    observers, _ = observe(module, config, batches, (), ("latent",), Calibration(method="percentile", percentile=99.0))
    counted = int(observers.quantizers["latent"]._calibrator._calib_hist.sum())
    assert counted == sum(batch[..., 0].numel() for batch in batches) * (config.latent.kv_rank + config.latent.rotary_dim)


def test_quantizing_rounds_latents_as_engines_cache_them(latent):
    config, module, batches = latent
    observers, _ = observe(module, config, batches, (), ("latent",))
    attention, sizes, seen = module.self_attention, config.latent, {}

    def keep(name, place):
        return lambda _module, given: seen.update({name: given[place].clone()})

    amax = {"latent": observers.magnitudes()["latent"] * 0.75}  # larger values saturate
    observers.round_with(amax)
    attention.latent_quantizer.register_forward_pre_hook(keep("shared before", 0))  # after the latent itself
    attention.linear_kv_up_proj.register_forward_pre_hook(keep("latents", 0))
    attention.core_attention.register_forward_pre_hook(keep("key", 1))
    attention.linear_kv_up_proj.register_forward_hook(lambda _module, _given, out: seen.update(up=out[0]))
    run_layer(module, config, batches[1])
    latents, _ = rows_of(config, module, batches[1])
    near(seen["latents"], latents, amax["latent"])
    heads = seen["key"].shape[2]
    near(seen["key"][..., sizes.qk_dim :], seen["shared before"].expand(-1, -1, heads, -1), amax["latent"])
    assert torch.equal(seen["key"][..., sizes.qk_dim :], seen["key"][:, :, :1, sizes.qk_dim :].expand(-1, -1, heads, -1))
    # The rest of the key comes from the rounded latents, and is not rounded itself.
    content = seen["up"].unflatten(-1, (heads, -1))[..., : sizes.qk_dim]
    assert torch.equal(seen["key"][..., : sizes.qk_dim], content)
