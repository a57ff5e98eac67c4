import io
import os
import pickle
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

from mptq.checkpoint.pickles import Inert, load_pickle, load_torch_zip
from mptq.errors import CheckpointError


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_in_a_pickle_is_called(tmp_path):
    hostile = pickle.dumps({"args": Bomb(tmp_path / "boom"), "x": [eval, subprocess.Popen]})
    loaded = load_pickle(hostile, "file")
    assert not (tmp_path / "boom").exists()
    assert isinstance(loaded["args"], Inert)
    assert loaded["args"].global_name in ("posix.mkdir", "nt.mkdir")
    assert issubclass(loaded["x"][0], Inert)


def test_nothing_named_in_a_pickle_is_imported():
    data = b"cantigravity_is_not_here\nThing\n)\x81."
    assert load_pickle(data, "file").global_name == "antigravity_is_not_here.Thing"
    assert "antigravity_is_not_here" not in sys.modules


def test_namespaces_enums_and_dtypes_keep_what_they_say():
    loaded = load_pickle(pickle.dumps(Namespace(a=1, dtype=torch.bfloat16, size=torch.Size([2, 3]))), "file")
    assert loaded.state["a"] == 1
    assert loaded.state["size"].args == ((2, 3),)
    assert "bfloat16" in (
        loaded.state["dtype"].__name__ if isinstance(loaded.state["dtype"], type) else repr(loaded.state["dtype"])
    )


def test_tensors_of_a_torch_file_stay_inert():
    buffer = io.BytesIO()
    torch.save({"args": Namespace(x=1), "weight": torch.ones(3)}, buffer)
    loaded = load_torch_zip(buffer.getvalue(), "file")
    assert loaded["args"].state == {"x": 1}
    assert isinstance(loaded["weight"], Inert)


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps({"a": [1, 2, 3]})[:-4], b"\x80\x05\x95\xff"])
def test_damage_is_one_line(data):
    with pytest.raises(CheckpointError, match="somewhere/.metadata is not a readable pickle"):
        load_pickle(data, "somewhere/.metadata")
    with pytest.raises(CheckpointError, match=r"x was not written by torch\.save"):
        load_torch_zip(data, "x")
