"""The plans that megatron-core adds to `.metadata` are skipped if they come last; other orders are read too."""

import itertools
import pickle

import pytest
import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, StorageMeta

from mptq.checkpoint.metadata import read_entries
from mptq.errors import CheckpointError
from tests.support.synthetic_checkpoints import small

PLANS = "all_local_plans"
KEY = b"\x8c\x0f" + PLANS.encode()
"""The key as encoded in a pickle."""


def fields(**more):
    """Returns the state of a Metadata as megatron-core writes it: its fields in order, then the plans in `more`."""
    made = small()
    state = {"state_dict_metadata": made.metadata.state_dict_metadata, "planner_data": {"a": ("a",)}}
    return state | {"storage_data": made.metadata.storage_data, "storage_meta": StorageMeta(), "version": "1"} | more


def entries(folder, state, protocol=pickle.DEFAULT_PROTOCOL):
    """Pickles a Metadata with this state, in its order, and returns what mptq reads from it."""
    metadata = Metadata.__new__(Metadata)
    metadata.__dict__.update(state)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata, protocol))
    return read_entries(folder / ".metadata")


@pytest.fixture
def expected(tmp_path):
    tensors, blobs = found = entries(tmp_path, fields())
    assert (len(tensors), len(blobs)) == (3, 1)
    return found


def test_plans_at_the_end_are_not_read(tmp_path, expected):
    assert entries(tmp_path, fields(all_local_plans=[bytes(3 << 20)])) == expected
    file = tmp_path / ".metadata"
    file.write_bytes(file.read_bytes()[: -(1 << 20)])
    assert read_entries(file) == expected


def test_fields_may_come_in_any_order(tmp_path, expected):
    state = fields(all_local_plans=["plan"])
    for order in itertools.permutations(state):
        assert entries(tmp_path, {name: state[name] for name in order}) == expected, order


@pytest.mark.parametrize("protocol", range(2, 6))
def test_protocols(tmp_path, expected, protocol):
    assert entries(tmp_path, fields(all_local_plans=["plan"]), protocol) == expected


ODD = {
    "the three fields of torch 2.2": lambda state: {name: state[name] for name in list(state)[:3]} | {PLANS: []},
    "fields of a version to come": lambda state: {"first": 1} | state | {PLANS: [], "last": torch.Size([1])},
    "a planner's key": lambda state: state | {"planner_data": {PLANS: 1, "b": 2}},
    "a planner's keys, even": lambda state: state | {"planner_data": {"b": 2, PLANS: 1}},
    "a planner's bytes": lambda state: state | {"planner_data": KEY + b"ub."},
    "a planner that is a Metadata": lambda state: state | {"planner_data": nested(small().metadata)},
    "another Metadata with other entries": lambda state: state | {"planner_data": nested(Metadata({}, storage_data={}))},
    "a key that was there before": lambda state: {"planner_data": [PLANS]} | state | {PLANS: []},
}


def nested(metadata):
    metadata.all_local_plans = []
    return metadata


@pytest.mark.parametrize("change", ODD.values(), ids=ODD)
@pytest.mark.parametrize("plans", [{}, {PLANS: ["plan"]}], ids=["", "and plans"])
def test_the_name_of_the_plans_may_be_anywhere(tmp_path, expected, change, plans):
    assert entries(tmp_path, change(fields()) | plans) == expected


@pytest.mark.parametrize("plans", [{}, {PLANS: ["plan"]}], ids=["", "and plans"])
def test_a_tensor_may_have_the_name_of_the_plans(tmp_path, plans):
    made = small()
    made.tensor(PLANS, torch.ones(2))
    made.blob(f"{PLANS}/shard_0_1", b"x")
    state = {"state_dict_metadata": made.metadata.state_dict_metadata, "storage_data": made.metadata.storage_data}
    tensors, blobs = entries(tmp_path, state | plans)
    assert tensors[PLANS].spec.shape == (2,)
    assert sorted(blobs) == [f"{PLANS}/shard_0_1", "common_state/shard_0_1"]


def test_a_missing_field_is_a_one_line_error(tmp_path):
    for missing in ("state_dict_metadata", "storage_data"):
        state = fields(all_local_plans=[])
        del state[missing]
        with pytest.raises(CheckpointError, match=f"is not the metadata of a torch_dist checkpoint .KeyError.'{missing}'"):
            entries(tmp_path, state)
    state = fields(all_local_plans=[])
    state["state_dict_metadata"]["more"] = BytesStorageMetadata()
    with pytest.raises(CheckpointError, match="is not the metadata of a torch_dist checkpoint .KeyError.'more'"):
        entries(tmp_path, state)
