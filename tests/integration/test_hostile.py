"""Checkpoints that would execute code if anything in them were unpickled, and runs that may not open a connection."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from mptq import inspect, make_plan
from mptq.checkpoint.index import open_checkpoint
from mptq.plan.estimates import warnings
from tests.conftest import mptq
from tests.support.synthetic_checkpoints import saved

TENSOR = "decoder.layers.mlp.linear_fc2.weight"


class Bomb:
    """Creates a directory when it is unpickled by a loader that executes pickles."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class TorchBomb(Bomb):
    """The same through a torch function, which writes a file."""

    def __reduce__(self):
        return torch.save, (1, self.path)


@pytest.fixture
def copy(aligned, tmp_path):
    root = shutil.copytree(aligned, tmp_path / "ckpt")
    return root, root / "iter_0000100"


@pytest.fixture
def boom(tmp_path):
    return tmp_path / "boom"


def replace_record(directory, key, raw, layer=None):
    """Replace an entry of the metadata (a byte item, or a layer's chunk) by the record `raw`, appended to its shard."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    found = [
        info
        for index, info in metadata.storage_data.items()
        if index.fqn == key and (layer is None or index.offset[0] == layer)
    ]
    info = found[0]
    shard = directory / info.relative_path
    info.offset, info.length = shard.stat().st_size, len(raw)
    with shard.open("ab") as file:
        file.write(raw)
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def rewritten(raw, content):
    """A `torch.save` file with another data.pkl."""
    import io

    source, target = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for info in source.infolist():
            archive.writestr(info.filename, content if info.filename.endswith("data.pkl") else source.read(info))
    return target.getvalue()


def hostile_metadata(directory, bomb):
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.planner_data = bomb
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def hostile_plans(directory, bomb):
    """In the part of the file after what mptq reads."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    metadata.all_local_plans = [bomb]
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def hostile_common_pt(directory, bomb):
    (directory / "common.pt").write_bytes(saved({"args": bomb, "iteration": 100}))


def hostile_common_state(directory, bomb):
    replace_record(directory, "common_state/shard_0_1", saved([{"args": bomb}]))


def hostile_extra_state(directory, bomb):
    keys = [key for key in open_checkpoint(directory).blobs if "_extra_state" in key]
    replace_record(directory, keys[0], saved(bomb))


def hostile_tensor(directory, bomb):
    raw = saved(torch.zeros(1, 256, 384, dtype=torch.bfloat16))
    replace_record(directory, TENSOR, rewritten(raw, pickle.dumps(bomb)), layer=1)


def hostile_modelopt_state(directory, bomb):
    (directory / "modelopt_state").mkdir()
    (directory / "modelopt_state" / "common.pt").write_bytes(saved(bomb))


# The last is refused because a checkpoint with ModelOpt's state is already quantized.
REFUSED = [hostile_common_pt, hostile_common_state, hostile_tensor, hostile_modelopt_state]
PLACES = [*REFUSED, hostile_metadata, hostile_plans, hostile_extra_state]


@pytest.mark.parametrize("kind", [Bomb, TorchBomb])
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_nothing_in_a_checkpoint_is_executed(copy, boom, place, kind):
    root, directory = copy
    place(directory, kind(boom))
    for command in (["inspect"], ["quantize", "--recipe", "fp8-blockwise", "--dry-run"]):
        done = mptq(command[0], root, *command[1:])
        assert done.returncode in (0, 1)
        assert "Traceback" not in done.stderr
    assert not boom.exists()


@pytest.mark.parametrize("place", [hostile_metadata, hostile_common_pt, hostile_common_state], ids=lambda place: place.__name__)
@pytest.mark.parametrize(("kind", "name"), [(Bomb, "posix.mkdir"), (TorchBomb, "torch.serialization.save")], ids=str)
def test_references_to_code_are_one_warning(copy, boom, place, kind, name):
    root, directory = copy
    place(directory, kind(boom))
    (document,) = inspect(root)
    assert document["warnings"] == [
        f"the checkpoint's metadata refers to code that Megatron checkpoints do not need: {name}; mptq never runs it, but "
        "loading the checkpoint in Megatron may: make sure that you trust its origin"
    ]
    if place is hostile_metadata:  # the others have no arguments, so their architecture is unknown
        assert warnings(make_plan(root, "fp8-blockwise"))[:1] == document["warnings"]
        assert f"warning     {document['warnings'][0]}" in mptq("inspect", root).stdout
        done = mptq("quantize", root, "--recipe", "fp8-blockwise", "--dry-run")
        assert done.returncode == 0
        assert done.stdout.count(name) == 1


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES, ids=lambda place: place.__name__)
def test_nothing_is_executed_by_a_whole_run(copy, boom, place, tmp_path):
    root, directory = copy
    place(directory, Bomb(boom))
    done = mptq(
        "quantize", root, "--recipe", "fp8-blockwise", "-o", tmp_path / "out", "--eval-size", 0, "--format", "hf,megatron"
    )
    assert not boom.exists()
    assert "Traceback" not in done.stderr
    assert done.returncode == (1 if place in REFUSED else 0), done.stderr
    assert (tmp_path / "out").exists() == (place not in REFUSED)
    if place is hostile_metadata:
        told = json.loads((tmp_path / "out" / "report.json").read_text())["warnings"]
        assert [("posix.mkdir" in text) for text in told].count(True) == done.stderr.count("posix.mkdir") == 1
    if place is hostile_tensor:
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"mptq: {TENSOR} in ")
        assert "is not a plain tensor (ValueError('it is a posix.mkdir')): the checkpoint is damaged" in last


def test_plain_torch_executes_what_mptq_does_not(copy, boom):
    """The exploits work: torch's own reader executes them."""
    from torch.distributed.checkpoint import FileSystemReader

    _, directory = copy
    hostile_metadata(directory, Bomb(boom))
    FileSystemReader(directory).read_metadata()
    assert boom.is_dir()


NO_CONNECTION = """
import sys
def forbid(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto"):
        sys.stderr.write(f"FORBIDDEN {event} {args}\\n")
        raise OSError("no connection is allowed")
sys.addaudithook(forbid)
sys.argv = ["mptq", *sys.argv[1:]]
from mptq.cli.app import main
main()
"""


def without_network(*arguments):
    environment = {key: value for key, value in os.environ.items() if "OFFLINE" not in key}
    command = [sys.executable, "-c", NO_CONNECTION, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_inspect_opens_no_connection(aligned):
    done = without_network("inspect", aligned)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_quantize_and_verify_open_no_connection(aligned, tokens, tokenizer, tmp_path):
    out = tmp_path / "out"
    data = ["--calib-dataset", tokens, "--calib-size", 4, "--eval-size", 2, "--calib-seq-length", 32]
    done = without_network("quantize", aligned, "--recipe", "fp8", "-o", out, "--tokenizer", tokenizer, *data)
    assert done.returncode == 0, done.stderr
    assert "FORBIDDEN" not in done.stderr
    done = without_network("verify", out, "--against", aligned)
    assert done.returncode == 0, done.stderr
    assert "FORBIDDEN" not in done.stderr


def test_the_audit_hook_forbids_connections():
    script = NO_CONNECTION.partition("sys.argv")[0] + "import socket; socket.create_connection(('127.0.0.1', 9))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert "FORBIDDEN socket.getaddrinfo" in done.stderr


@pytest.mark.parametrize("command", ["inspect", "quantize"])
def test_damage_is_one_line_and_exit_code_1(copy, command):
    root, directory = copy
    metadata = directory / ".metadata"
    metadata.write_bytes(metadata.read_bytes()[:-100])
    done = mptq(command, root, *(["--recipe", "fp8-blockwise"] if command == "quantize" else []))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"mptq: {metadata} is not a readable pickle (")
    assert done.stderr.count("\n") == 1
