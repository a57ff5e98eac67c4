"""Inputs of linears, group by group, against hooks on whole forward passes."""

from contextlib import suppress

import pytest
import torch

from mptq.calibration.linear_inputs import LinearInputs, Reached, is_added
from mptq.layers.forward import run_layer
from mptq.model.tensors import layer_linears, stages
from tests.support.models import ARGS, LATENT, MOE_ARGS
from tests.unit.layers.test_transformer_layer import filled


def see_all(layer, linears):
    """Inputs by module, the modules in the order in which they ran, and the residual stream after each addition."""
    inputs, ran, residual, before = {}, [], {}, {}

    def see(name):
        def seen(_module, given):
            inputs[name] = given[0].flatten(0, -2).clone()
            ran.append(name)

        return seen

    for linear in linears:
        layer.get_submodule(linear.module).register_forward_pre_hook(see(linear.module))
    layer.pre_mlp_layernorm.register_forward_pre_hook(lambda _, given: residual.update(linear_proj=given[0].clone()))
    layer.register_forward_hook(lambda _module, _given, out: residual.update(linear_fc2=out[0].clone()))
    layer.register_forward_pre_hook(lambda _, given: before.update(linear_proj=given[0].clone()))
    layer.pre_mlp_layernorm.register_forward_pre_hook(lambda _, given: before.update(linear_fc2=given[0].clone()))
    return inputs, ran, residual, before


@pytest.mark.parametrize("fields", [ARGS, MOE_ARGS, LATENT], ids=["dense", "experts", "latent"])
def test_each_group_is_seen_before_the_next_runs(fields):
    config, layer = filled(fields, "bfloat16")
    linears = layer_linears(config, 0)
    torch.manual_seed(0)
    hidden = torch.randn(2, 9, config.hidden_size).bfloat16()
    whole, ran, residual, stream = see_all(layer, linears)
    run_layer(layer, config, hidden)
    expected, groups = dict(whole), stages(linears)
    assert sorted(linear.module for group in groups for linear in group) == sorted(linear.module for linear in linears)
    for place, group in enumerate(groups):
        later = [linear.module for part in groups[place + 1 :] for linear in part]
        found, before = LinearInputs(group, later, residuals=True), len(ran)
        with found.collecting(layer), suppress(Reached):
            found.number = 5
            run_layer(layer, config, hidden)
        # The hooks above are registered first, so one of the later linears may have been seen, but none has run.
        if all(linear.expert is None for linear in group):
            assert len([name for name in ran[before:] if name in later]) <= 1
        for linear in group:
            inputs = found.rows[linear.module].get(5)
            if linear.module not in expected:
                assert inputs is None  # an expert without tokens
                continue
            assert torch.equal(inputs.rows, expected[linear.module])
            if not is_added(linear):
                assert inputs.weights is inputs.residual is None
                continue
            norm = residual[linear.kind].flatten(0, 1).float().square().mean(1, keepdim=True).sqrt()
            assert torch.allclose(inputs.weights, 1 / norm)
            assert torch.equal(inputs.residual, stream[linear.kind].flatten(0, 1))
            assert torch.allclose(inputs.weighted(inputs.rows, torch.device("cpu")), inputs.rows.float() / norm)


def test_one_pass_sees_all_linears_and_no_residual_unless_asked():
    config, layer = filled(ARGS, "bfloat16")
    linears = layer_linears(config, 0)
    whole, _, residual, _ = see_all(layer, linears)
    found = LinearInputs(linears)
    with found.collecting(layer):
        run_layer(layer, config, torch.randn(2, 5, config.hidden_size).bfloat16())
    for linear in linears:
        inputs = found.rows[linear.module][0]
        assert torch.equal(inputs.rows, whole[linear.module])
        assert inputs.residual is None
        if is_added(linear):
            square = residual[linear.kind].flatten(0, 1).float().square().mean(1, keepdim=True)
            assert torch.allclose(inputs.weights, square.rsqrt())


def test_nothing_is_left_on_the_layer():
    config, layer = filled(ARGS, "bfloat16")
    (first, *_), *_ = stages(layer_linears(config, 0))
    with LinearInputs([first], ["mlp.linear_fc1"]).collecting(layer), pytest.raises(Reached):
        run_layer(layer, config, torch.randn(1, 4, config.hidden_size).bfloat16())
    run_layer(layer, config, torch.randn(1, 4, config.hidden_size).bfloat16())


def test_tokens_whose_residual_is_zero_weigh_nothing():
    config, layer = filled(ARGS, "bfloat16")
    *_, last = stages(layer_linears(config, 0))
    with torch.no_grad():
        for name in ("self_attention.linear_proj", "mlp.linear_fc2"):
            layer.get_submodule(name).weight.zero_()
    hidden = torch.randn(1, 6, config.hidden_size).bfloat16()
    hidden[:, 2] = 0
    found = LinearInputs(last, [])
    with found.collecting(layer):
        run_layer(layer, config, hidden)
    inputs = found.rows["mlp.linear_fc2"][0]
    rows = inputs.weighted(inputs.rows, torch.device("cpu"))
    assert rows.isfinite().all()
    assert (rows[2] == 0).all()
    assert (rows[[0, 1, 3]] != 0).any(1).all()
