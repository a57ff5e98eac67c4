import collections
import contextlib
import os
import pickle
import subprocess
import sys
import tracemalloc
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptq.checkpoint.pickles import Inert, foreign, load_pickle
from mptq.checkpoint.torch_zip import load_torch_file
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


def test_namespaces_enums_and_dtypes_keep_their_values():
    loaded = load_pickle(pickle.dumps(Namespace(a=1, dtype=torch.bfloat16, size=torch.Size([2, 3]))), "file")
    assert loaded.state["a"] == 1
    assert loaded.state["size"].args == ((2, 3),)
    assert "bfloat16" in (
        loaded.state["dtype"].__name__ if isinstance(loaded.state["dtype"], type) else repr(loaded.state["dtype"])
    )


def test_tensors_of_a_torch_file_stay_inert(tmp_path):
    torch.save({"args": Namespace(x=1), "weight": torch.ones(3)}, tmp_path / "file.pt")
    loaded = load_torch_file(tmp_path / "file.pt", "file")
    assert loaded["args"].state == {"x": 1}
    assert isinstance(loaded["weight"], Inert)


HEAD = b"\x80\x04"
HARMLESS_HERE = {
    "posix.system": b"cposix\nsystem\n(X\x04\x00\x00\x00exittR.",
    "builtins.eval": b"cbuiltins\neval\n(X\x01\x00\x00\x001tR.",
    "os.system": HEAD + b"\x8c\x02os\x8c\x06system\x93\x8c\x04exit\x85R.",
    "builtins.bytearray": b"cbuiltins\nbytearray\n\x8a\x06\x00\x00\x00\x00\x00\x01\x85R.",
    "torch.hub.load": b"ctorch.hub\nload\n(X\x01\x00\x00\x00xtR.",
    "builtins.getattr": b"cbuiltins\ngetattr\n(X\x01\x00\x00\x00xX\x09\x00\x00\x00__class__tR.",
    "numpy.frombuffer": b"cnumpy\nfrombuffer\n)\x81N}X\x09\x00\x00\x00__class__Ns\x86b.",
}


@pytest.mark.parametrize("name", HARMLESS_HERE)
def test_hostile_calls_become_records_of_their_names(name):
    found = load_pickle(HARMLESS_HERE[name], "file")
    assert (type(found).__bases__, found.global_name) == ((Inert,), name)
    assert not hasattr(found, "__dict__")


REFUSED = {
    "a memo index of 2 ** 31": HEAD + b"Nr\x00\x00\x00\x7f.",
    "a text memo index": b"Np2147483647\n.",
    "an extension code": HEAD + b"\x82\x01.",
    "a bytearray of a terabyte": HEAD + b"\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "text of 4 exabytes": HEAD + b"\x8d" + (1 << 62).to_bytes(8, "little") + b".",
    "a frame of 4 exabytes": HEAD + b"\x95" + (1 << 62).to_bytes(8, "little") + b"N.",
    "an integer of a megabyte": HEAD + b"\x8b" + (1 << 20).to_bytes(4, "little") + b"\1" * (1 << 20) + b".",
    "an out-of-band buffer": HEAD + b"\x97.",
    "100,000 empty sets": HEAD + b"(" + b"\x8f" * 100_000 + b"t.",
    "a list copied into 1000 sets": HEAD + b"](" + b"N" * 1000 + b"e\x94cbuiltins\nset\n\x94" + b"h\1h\0\x85R0" * 1000 + b"N.",
    "a state for a function": b"ccollections\nOrderedDict\n}X\1\0\0\0aNsb.",
    "defaults for a function": b"cbuiltins\nset\nN}X\x0c\0\0\0__defaults__)s\x86b.",
    "a state for a class": b"ca\nb\n}X\1\0\0\0aNsb.",
    "a call of a value that is not a function": HEAD + b"N)R.",
    "a dict as a key": HEAD + b"}}Ns.",
    "5000 globals": b"(" + b"".join(b"ca\nb%d\n" % number for number in range(5000)) + b"t.",
}


@pytest.mark.parametrize("data", REFUSED.values(), ids=REFUSED)
def test_pickles_that_cost_more_than_their_bytes_are_refused(data):
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"^file is not a readable pickle \(.*\): the checkpoint is damaged$"):
            load_pickle(data, "file")
        assert tracemalloc.get_traced_memory()[1] < 300 * len(data) + (1 << 20)
    finally:
        tracemalloc.stop()


def test_constructors_are_not_changed_by_a_pickle():
    before = load_pickle(pickle.dumps([{1, 2}, collections.OrderedDict(a=1), frozenset("x")], 2), "file")
    for data in REFUSED.values():
        with contextlib.suppress(CheckpointError):
            load_pickle(data, "file")
    assert before == [{1, 2}, {"a": 1}, frozenset("x")]
    assert load_pickle(pickle.dumps([{1, 2}, collections.OrderedDict(a=1), frozenset("x")], 2), "file") == before


@pytest.mark.parametrize(
    "data",
    [
        HEAD + b"})" + b"\x85" * 1_000_000 + b"Ns.",  # a dict key, hashed by unguarded recursion in CPython
        HEAD + b"\x8f()" + b"\x85" * 1_000_000 + b"\x90.",  # the same in a set
        HEAD + b"]" * 1_000_000 + b"a" * 999_999 + b".",
        HEAD + b"ca\nb\n\x94" + b"h\0" * 300_000 + b")" + b"\x85R" * 300_000 + b".",
    ],
    ids=["key", "set", "lists", "objects"],
)
def test_deep_nesting_does_not_crash_the_process(data):
    script = (
        "import sys; from mptq.checkpoint.pickles import load_pickle; load_pickle(sys.stdin.buffer.read(), 'x'); print('done')"
    )
    done = subprocess.run([sys.executable, "-c", script], input=data, capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"done\n", b"")


integers = st.integers(-(1 << 128), (1 << 128) - 1)
plain = st.recursive(
    st.none() | st.booleans() | integers | st.floats(allow_nan=False) | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | integers, inner) | st.tuples(inner, inner) | st.sets(integers),
    max_leaves=30,
)


@given(plain, st.sampled_from([2, 3, 4, 5]))
def test_plain_data_round_trips(value, protocol):
    raw = pickle.dumps(value, protocol)
    loaded = load_pickle(raw, "file")
    assert loaded == value or b"_codecs" in raw or b"bytes" in raw  # protocol 2 writes bytes as calls


@given(plain, st.data())
def test_any_changed_byte_is_data_or_damage(value, data):
    raw = bytearray(pickle.dumps(value, data.draw(st.sampled_from([2, 4]))))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CheckpointError):
        load_pickle(bytes(raw), "file")


@pytest.mark.parametrize("data", [b"", b"garbage", pickle.dumps({"a": [1, 2, 3]})[:-4], b"\x80\x05\x95\xff"])
def test_damage_is_a_one_line_error(data, tmp_path):
    with pytest.raises(CheckpointError, match="somewhere/.metadata is not a readable pickle"):
        load_pickle(data, "somewhere/.metadata")
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(CheckpointError, match=r"x was not written by torch\.save"):
        load_torch_file(tmp_path / "x", "x")


class Code:
    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


def named(value):
    names = set()
    load_pickle(pickle.dumps(value), "here", names=names)
    return foreign(names)


def test_globals_of_settings_and_states_are_not_foreign():
    import datetime
    import functools
    import signal
    import types

    import numpy as np
    from megatron.core.activations import squared_relu
    from megatron.core.transformer.enums import AttnBackend
    from torch.distributed.checkpoint.metadata import Metadata

    plain = [
        {1},
        frozenset({1}),
        bytearray(b"a"),
        1j,
        collections.OrderedDict(a=1),
        collections.deque([1]),
        collections.Counter(),
    ]
    library = [
        Path("x"),
        Namespace(a=1),
        signal.SIGTERM,
        types.SimpleNamespace(),
        datetime.datetime(2026, 1, 1),
        datetime.timedelta(1),
    ]
    arrays = [np.float32(1), np.arange(3), np.dtype("int64"), np.random.get_state(), torch.Size([1])]
    dtypes = [torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.device("cpu"), torch.strided]
    functions = [torch.nn.functional.silu, torch.nn.functional.gelu, squared_relu, AttnBackend.auto, Metadata({})]
    for value in [*plain, *library, *arrays, *dtypes, *functions]:
        assert named(value) == [], value
    assert named(functools.partial(squared_relu)) == ["functools.partial"]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (os.system, "posix.system"),
        (eval, "builtins.eval"),
        (getattr, "builtins.getattr"),
        (subprocess.Popen, "subprocess.Popen"),
        (torch.load, "torch.serialization.load"),
        (torch.hub.load, "torch.hub.load"),
    ],
)
def test_foreign_code_is_named(function, name):
    assert named({"a": [Code(function, "x")]}) == [name]


def test_names_of_foreign_code_can_be_printed():
    assert foreign({"torch.Size", "a.b\x1b[2J", "os.\ud800", "\u202ex.y"}) == ["\\u202ex.y", "a.b\\x1b[2J", "os.\\ud800"]


def test_frozen_objects_stay_frozen():
    """A run freezes the objects created by its imports, and loads a pickle for every tensor that it reads."""
    import gc

    kept = [[] for _ in range(1000)]  # other frozen objects may be freed meanwhile by another thread or a weak reference
    gc.freeze()
    try:
        load_pickle(pickle.dumps({"a": [1, 2]}), "here")
        assert gc.get_freeze_count() >= len(kept)
        assert gc.isenabled()
    finally:
        gc.unfreeze()
