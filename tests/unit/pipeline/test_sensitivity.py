"""The choice of what is kept: the groups that cost most per byte, as far as they fit."""

from dataclasses import replace

import pytest

from mptq import make_plan
from mptq.errors import DataError
from mptq.model import tensors
from mptq.pipeline.sensitivity import Group, choose, groups, kept


def group(name, nbytes, cost):
    return Group((name,), nbytes, cost)


FOUND = [group("a", 100, 1.0), group("b", 10, 0.5), group("c", 50, 2.0), group("d", 40, 0.0)]


@pytest.mark.parametrize(
    ("share", "chosen"),
    [(0, ()), (0.05, ("b",)), (0.3, ("b", "c")), (0.25, ("b", "d")), (0.8, ("b", "c", "a")), (1, ("b", "c", "a", "d"))],
)
def test_groups_that_cost_most_per_byte_are_kept(share, chosen):
    assert choose(FOUND, share) == chosen


def test_groups_of_all_layers(mixtral):
    plan = make_plan(mixtral, "fp8-blockwise")
    layers = {layer: tensors.groups(plan.linears(layer)) for layer in range(plan.model.num_layers)}
    rows = [{"layer": layer, "sensitivity": dict.fromkeys(found, 0.1)} for layer, found in layers.items()]
    found = groups(plan, rows)
    everything = sum(linear.shape[0] * linear.shape[1] for _, linear in plan.assignment.linears())
    assert sum(one.nbytes for one in found) == 2 * everything
    # The patterns match these linears, and no others.
    (first, *_) = found
    recipe = plan.recipe.changed(first.patterns)
    assignment = make_plan(mixtral, recipe).assignment
    kept_now = [linear.megatron for layer, linear in assignment.linears() if assignment.scheme(layer, linear) is None]
    assert kept_now == ["self_attention.linear_qkv"]


def test_without_held_out_data_it_is_refused(aligned, options, tmp_path):
    plan, none = make_plan(aligned, "fp8-blockwise"), replace(options, data=replace(options.data, eval_size=0))
    with pytest.raises(DataError, match="--keep-bytes measures the cost on held-out sequences, but --eval-size is 0"):
        kept(plan, tmp_path / "out", none, 0.1)
    with pytest.raises(DataError, match="--keep-bytes needs forward passes, but recipe none quantizes nothing"):
        kept(make_plan(aligned, "none"), tmp_path / "out", options, 0.1)
    unread = replace(options, data=replace(options.data, datasets=()))
    with pytest.raises(DataError, match="--keep-bytes measures the cost on held-out sequences: pass --tokenizer DIR"):
        kept(plan, tmp_path / "out", unread, 0.1)
    assert not list(tmp_path.iterdir())
