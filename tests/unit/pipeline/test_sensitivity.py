"""The choice of what is kept: the groups that cost most per byte, as far as they fit."""

from dataclasses import replace

import pytest

from mptq import make_plan
from mptq.errors import DataError, OptionError, OutputError, StoppedError
from mptq.model import tensors
from mptq.pipeline.sensitivity import MeasuredGroup, choose, kept, measured
from mptq.recipes.recipe import load_recipe


def group(name, nbytes, cost):
    return MeasuredGroup((name,), nbytes, cost)


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
    found = measured(plan, rows)
    everything = sum(linear.shape[0] * linear.shape[1] for _, linear in plan.assignment.linears())
    assert sum(one.nbytes for one in found) == 2 * everything
    # The patterns match these linears, and no others.
    (first, *_) = found
    recipe = plan.recipe.changed(first.patterns)
    assignment = make_plan(mixtral, recipe).assignment
    kept_now = [linear.megatron for layer, linear in assignment.linears() if assignment.scheme(layer, linear) is None]
    assert kept_now == ["self_attention.linear_qkv"]


def test_groups_that_are_not_quantized_are_left_out(mixtral):
    plan = make_plan(mixtral, load_recipe("fp8-blockwise").changed(("*experts*",)))
    rows = [{"layer": 0, "sensitivity": dict.fromkeys(tensors.groups(plan.linears(0)), 0.1)}]
    found = measured(plan, rows)
    assert [one.patterns for one in found] == [
        ("decoder.layers.0.*linear_qkv",),
        ("decoder.layers.0.*linear_proj",),
    ]


@pytest.mark.parametrize("share", [0.0, 1.0, 1.5, -0.1])
def test_a_share_that_keeps_nothing_or_all_is_refused(aligned, options, share, tmp_path):
    with pytest.raises(OptionError, match=r"^--keep-bytes -?[0-9]+%: use more than 0 and less than 100 %"):
        kept(make_plan(aligned, "fp8-blockwise"), tmp_path / "out", options, share)


def test_a_stop_is_seen_between_layers(aligned, options, tmp_path):
    stopping = replace(options, stop=lambda: True)
    with pytest.raises(StoppedError, match="^stopped while measuring for --keep-bytes: nothing was written"):
        kept(make_plan(aligned, "fp8-blockwise"), tmp_path / "out", stopping, 0.1)
    assert not list(tmp_path.iterdir())


def test_an_output_that_exists_is_refused_before_measuring(aligned, options, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "file").touch()
    with pytest.raises(OutputError, match="--overwrite"):
        kept(make_plan(aligned, "fp8-blockwise"), tmp_path / "out", options, 0.1)


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
