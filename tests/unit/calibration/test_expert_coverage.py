"""Token counts of experts against the router's own choices, and fallback scales for experts that saw too few tokens."""

import pytest
import torch

from mptq.calibration.expert_coverage import ExpertCoverage, observed
from mptq.calibration.hidden_state_pair import HiddenStatePair
from mptq.errors import CheckpointError
from mptq.layers.forward import run_layer
from mptq.model.tensors import layer_linears
from mptq.plan.plan import make_plan
from mptq.recipes.recipe import Override, load_recipe
from tests.conftest import MIXTRAL, make_checkpoint, make_mixtral
from tests.support.driving import Driven, tokens_of
from tests.support.models import ARGS, MOE_ARGS
from tests.unit.layers.test_transformer_layer import filled


@pytest.fixture(scope="module")
def mixture():
    """A config, its layer, and its linears."""
    config, layer = filled(MOE_ARGS, "bfloat16")
    return config, layer, layer_linears(config, 0)


def counted(mixture, *shapes):
    """An ExpertCoverage that has counted random tokens, and how often the router chose each expert."""
    config, layer, linears = mixture
    coverage = ExpertCoverage(linears)
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
    assert coverage.complete({}, 0, ()) == {"tokens": chosen, "fallback": []}
    assert sum(chosen) == 19 * config.moe_topk
    assert len(chosen) == config.num_experts


def test_one_token_leaves_most_experts_at_zero(mixture):
    config, _, _ = mixture
    coverage, chosen = counted(mixture, (1, 1))
    row = coverage.complete({}, 16, ())
    assert row == {"tokens": chosen, "fallback": []}  # no linear is static here
    assert chosen.count(0) == config.num_experts - config.moe_topk


def magnitudes(linears, experts):
    """Made-up magnitudes of the linears of these experts: 10 * expert, plus 5 for the second linear."""
    return {
        linear.module: torch.tensor(10.0 * linear.expert + 5 * (linear.kind == "linear_fc2"))
        for linear in linears
        if linear.expert in experts
    }


def modules(linears):
    return [linear.module for linear in linears]


@pytest.mark.parametrize("minimum", [0, 1, 5, 12])
def test_experts_under_the_minimum_get_the_largest_of_the_others(mixture, minimum):
    _, _, linears = mixture
    coverage = ExpertCoverage(linears)
    tokens = [9, 4, 12, 0, 5, 20, 11, 3]
    coverage.tokens.update(dict(enumerate(tokens)))
    amax = magnitudes(linears, [expert for expert, count in enumerate(tokens) if count])
    amax["self_attention.linear_qkv"] = torch.tensor(1000.0)
    before = dict(amax)
    poor = [expert for expert, count in enumerate(tokens) if count < max(1, minimum)]
    rich = [expert for expert in range(8) if expert not in poor]
    assert coverage.complete(amax, minimum, modules(linears)) == {"tokens": tokens, "fallback": poor}
    assert len(amax) == 1 + 2 * 8
    for linear in linears:
        if linear.expert in rich or linear.module == "self_attention.linear_qkv":
            assert amax[linear.module] == before[linear.module]
        elif linear.expert is not None:
            assert float(amax[linear.module]) == 10 * max(rich) + 5 * (linear.kind == "linear_fc2")


def test_without_an_expert_that_saw_enough_the_largest_of_all_is_used(mixture):
    _, _, linears = mixture
    coverage = ExpertCoverage(linears)
    coverage.tokens.update({0: 2, 5: 3})
    amax = magnitudes(linears, [0, 5])
    assert coverage.complete(amax, 16, modules(linears)) == {"tokens": [2, 0, 0, 0, 0, 3, 0, 0], "fallback": list(range(8))}
    assert {float(value) for name, value in amax.items() if name.endswith("fc1")} == {50.0}
    assert {float(value) for name, value in amax.items() if name.endswith("fc2")} == {55.0}


def test_static_scales_of_one_linear_fall_back_alone(mixture):
    _, _, linears = mixture
    coverage = ExpertCoverage(linears)
    coverage.tokens.update(dict.fromkeys(range(7), 100))
    amax = {name: value for name, value in magnitudes(linears, range(7)).items() if name.endswith("linear_fc2")}
    static = [name for name in modules(linears) if name.endswith("linear_fc2")]
    assert coverage.complete(amax, 16, static)["fallback"] == [7]
    assert set(amax) == {linear.module for linear in linears if linear.expert is not None and linear.kind == "linear_fc2"}
    assert float(amax["mlp.experts.local_experts.7.linear_fc2"]) == 65


def test_a_dense_layer_has_no_experts():
    config, layer = filled(ARGS, "bfloat16")
    coverage = ExpertCoverage(layer_linears(config, 0))
    with coverage.counting(layer):
        run_layer(layer, config, torch.randn(1, 4, config.hidden_size).bfloat16())
    amax = {"mlp.linear_fc1": torch.tensor(1.0)}
    assert coverage.complete(amax, 16, amax) is None
    assert len(amax) == 1


@pytest.mark.parametrize("alone", range(8))
@pytest.mark.parametrize("tokens", [0, 3])
def test_an_expert_that_alone_is_static_borrows_from_those_that_need_no_scale(mixture, alone, tokens):
    _, _, linears = mixture
    static = [linear for linear in linears if linear.expert == alone]
    seen = observed(linears, static)
    assert seen == [linear for linear in linears if linear.expert is not None]
    coverage = ExpertCoverage(linears)
    coverage.tokens.update(dict.fromkeys(range(8), 100) | {alone: tokens})
    amax = magnitudes(linears, [expert for expert in range(8) if expert != alone or tokens])
    assert coverage.complete(amax, 16, modules(static))["fallback"] == [alone]
    largest = max({*range(8)} - {alone})
    assert [float(amax[linear.module]) for linear in static] == [10.0 * largest, 10.0 * largest + 5]


def test_what_is_observed_of_a_dense_linear_is_itself(mixture):
    _, _, linears = mixture
    dense = [linear for linear in linears if linear.expert is None]
    assert observed(linears, dense) == dense
    seconds = [linear for linear in linears if linear.expert is not None and linear.kind == "linear_fc2"]
    assert observed(linears, seconds[:1]) == seconds


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """A Megatron checkpoint of a Mixtral with eight experts, two per token."""
    folder = tmp_path_factory.mktemp("eight")
    hf = make_mixtral(folder / "hf", MIXTRAL | {"num_local_experts": 8}, seed=4)
    return make_checkpoint(hf, folder / "ckpt")


def input_amax(driven, expert):
    """The static input amax of an expert in the Megatron output, by layer and linear."""
    owner, ending = f".mlp.experts.experts.{expert}.", ".input_quantizer._amax"
    return {name: float(amax) for name, amax in driven.tensors["megatron"].items() if owner in name and name.endswith(ending)}


def test_any_one_of_eight_experts_alone_may_be_static(eight, tmp_path):
    """Some experts see three tokens. Each gets the same scale as when all experts are static."""
    tokens = tokens_of([], calibration=torch.tensor([[7, 77, 277]]))
    every = Driven(make_plan(eight, "fp8", ("megatron",)), tokens, tmp_path)
    counts = [row["experts"]["tokens"] for row in every.log.layers]
    assert [sum(layer) for layer in counts] == [6, 6]
    for expert in range(8):
        override = Override(pattern=f"*.mlp.experts.experts.{expert}.*", recipe="fp8")
        recipe = load_recipe("fp8-per-channel").model_copy(update={"overrides": (override,)})
        alone = Driven(make_plan(eight, recipe, ("megatron",)), tokens, tmp_path)
        found = input_amax(alone, expert)
        assert found == input_amax(every, expert)
        assert len(found) == 4
        assert sum(name.endswith("input_quantizer._amax") for name in alone.tensors["megatron"]) == 4
        fallback = [[expert] if layer[expert] == 0 else [] for layer in counts]
        assert [row["experts"]["fallback"] for row in alone.log.layers] == fallback
    assert any(0 in layer for layer in counts)


def test_only_the_static_expert_is_rounded(eight, tmp_path):
    """The inputs of the other experts are observed for it, but not rounded."""
    override = Override(pattern="*.mlp.experts.experts.3.*", recipe="fp8")
    recipe = load_recipe("fp8-per-channel").model_copy(update={"overrides": (override,)})
    calibrated = []

    class Watched(HiddenStatePair):
        def calibrate(self, *arguments):
            calibrated.append(super().calibrate(*arguments))
            return calibrated[-1]

    ids = torch.arange(60).view(4, 15)
    Driven(make_plan(eight, recipe, ("megatron",)), tokens_of(ids, calibration=ids), tmp_path, kind=Watched)
    rounded = tuple(f"mlp.experts.local_experts.3.linear_fc{part}" for part in (1, 2))
    assert [layer.rounded for layer in calibrated] == [rounded] * 2
    assert all(len(layer.amax) > 2 for layer in calibrated)


def test_a_static_linear_without_tokens_is_named(eight, tmp_path, monkeypatch):
    monkeypatch.setattr("mptq.calibration.hidden_state_pair.HiddenStatePair._collect", lambda *_arguments: None)
    with pytest.raises(CheckpointError, match=r"^decoder\.layers\.0\.[\w.]+: no token .* was routed to it"):
        Driven(make_plan(eight, "fp8", ("megatron",)), tokens_of([], calibration=torch.ones(1, 3).long()), tmp_path)
