"""How many tokens each expert saw, against the router's own choices, and what stands in for those that saw too few."""

import pytest
import torch

from mptq.arch.forward import run_layer
from mptq.arch.naming import layer_linears
from mptq.experts import Coverage
from tests.arch.models import ARGS, MOE_ARGS
from tests.arch.test_layer import filled


@pytest.fixture(scope="module")
def mixture():
    """A config, its layer, and its linears."""
    config, layer = filled(MOE_ARGS, "bfloat16")
    return config, layer, layer_linears(config, 0)


def counted(mixture, *shapes):
    """A coverage that has counted random tokens, and how often the router chose each expert."""
    config, layer, linears = mixture
    coverage = Coverage(linears)
    chosen = torch.zeros(config.num_experts, dtype=torch.int64)

    def choose(_module, _arguments, out):
        chosen.add_(out[1].sum(0))

    hook = layer.mlp.router.register_forward_hook(choose)
    torch.manual_seed(1)
    batches = [torch.randn(*shape, config.hidden_size).bfloat16() for shape in shapes]
    with coverage.counting(layer):
        outs = [run_layer(layer, config, batch) for batch in batches]
    hook.remove()
    assert torch.equal(run_layer(layer, config, batches[0]), outs[0])
    return coverage, chosen.tolist()


def test_counts_are_the_routers_choices(mixture):
    config, _, _ = mixture
    coverage, chosen = counted(mixture, (2, 5), (1, 9))
    assert coverage.complete({}, 0) == {"tokens": chosen, "fallback": []}
    assert sum(chosen) == 19 * config.moe_topk
    assert len(chosen) == config.num_experts


def test_one_token_leaves_most_experts_at_zero(mixture):
    config, _, _ = mixture
    coverage, chosen = counted(mixture, (1, 1))
    row = coverage.complete({}, 16)
    assert row == {"tokens": chosen, "fallback": []}  # nothing is static here
    assert chosen.count(0) == config.num_experts - config.moe_topk


def magnitudes(linears, experts):
    """Made-up magnitudes of the linears of these experts: 10 * expert, and 5 more of the second linear."""
    return {
        linear.module: torch.tensor(10.0 * linear.expert + 5 * (linear.kind == "linear_fc2"))
        for linear in linears
        if linear.expert in experts
    }


@pytest.mark.parametrize("minimum", [0, 1, 5, 12])
def test_experts_under_the_minimum_get_the_largest_of_the_others(mixture, minimum):
    _, _, linears = mixture
    coverage = Coverage(linears)
    tokens = [9, 4, 12, 0, 5, 20, 11, 3]
    coverage.tokens.update(dict(enumerate(tokens)))
    amax = magnitudes(linears, [expert for expert, count in enumerate(tokens) if count])
    amax["self_attention.linear_qkv"] = torch.tensor(1000.0)
    before = dict(amax)
    poor = [expert for expert, count in enumerate(tokens) if count < max(1, minimum)]
    rich = [expert for expert in range(8) if expert not in poor]
    assert coverage.complete(amax, minimum) == {"tokens": tokens, "fallback": poor}
    assert len(amax) == 1 + 2 * 8
    for linear in linears:
        if linear.expert in rich or linear.module == "self_attention.linear_qkv":
            assert amax[linear.module] == before[linear.module]
        elif linear.expert is not None:
            assert float(amax[linear.module]) == 10 * max(rich) + 5 * (linear.kind == "linear_fc2")


def test_without_an_expert_that_saw_enough_the_largest_of_all_stands_in(mixture):
    _, _, linears = mixture
    coverage = Coverage(linears)
    coverage.tokens.update({0: 2, 5: 3})
    amax = magnitudes(linears, [0, 5])
    assert coverage.complete(amax, 16) == {"tokens": [2, 0, 0, 0, 0, 3, 0, 0], "fallback": list(range(8))}
    assert {float(value) for name, value in amax.items() if name.endswith("fc1")} == {50.0}
    assert {float(value) for name, value in amax.items() if name.endswith("fc2")} == {55.0}


def test_static_scales_of_one_linear_fall_back_alone(mixture):
    _, _, linears = mixture
    coverage = Coverage(linears)
    coverage.tokens.update(dict.fromkeys(range(7), 100))
    amax = {name: value for name, value in magnitudes(linears, range(7)).items() if name.endswith("linear_fc2")}
    assert coverage.complete(amax, 16)["fallback"] == [7]
    assert set(amax) == {linear.module for linear in linears if linear.expert is not None and linear.kind == "linear_fc2"}
    assert float(amax["mlp.experts.local_experts.7.linear_fc2"]) == 65


def test_a_dense_layer_has_no_experts():
    config, layer = filled(ARGS, "bfloat16")
    coverage = Coverage(layer_linears(config, 0))
    with coverage.counting(layer):
        run_layer(layer, config, torch.randn(1, 4, config.hidden_size).bfloat16())
    amax = {"mlp.linear_fc1": torch.tensor(1.0)}
    assert coverage.complete(amax, 16) is None
    assert len(amax) == 1
