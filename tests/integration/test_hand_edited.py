"""Outputs whose JSON was edited by hand: `mptq verify` and `mptq report` report the problem, without other exceptions."""

import contextlib
import copy
import functools
import json
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mptq.cli import tables
from mptq.errors import MptqError, OutputError
from mptq.report import read
from mptq.verification import structure
from mptq.verification.structure import verify
from tests.conftest import mptq, read_json
from tests.support.report_documents import Shape
from tests.support.report_documents import document as make

ODD = [
    None,
    True,
    -1,
    0,
    1.5,
    2**70,
    "",
    "x",
    "[/x]",
    "../../dev/zero",
    "/etc/passwd",
    [],
    [None],
    [[1]],
    {},
    {"x": 1},
    {"name": {}},
]


def places(value, path=()):
    """Yield the path of every value in a JSON document."""
    yield path
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in inside:
        yield from places(item, (*path, key))


def edited(document, draw):
    """The document with one or two values replaced by odd ones, or removed."""
    changed = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 2))):
        found = list(places(changed))[1:]
        if not found:
            break
        # Draw the depth first: otherwise nearly all places would be in the lists of tensors.
        depth = draw(st.integers(1, max(map(len, found))))
        *way, last = draw(st.sampled_from([path for path in found if len(path) == depth]))
        holder = functools.reduce(lambda value, key: value[key], way, changed)
        if draw(st.booleans()) and isinstance(holder, dict):
            del holder[last]
        else:
            holder[last] = copy.deepcopy(draw(st.sampled_from(ODD)))
    return changed


@pytest.fixture(scope="module")
def out(quantized, tmp_path_factory):
    """A copy to edit, in both formats."""
    return shutil.copytree(quantized["crossing", "fp8-per-channel"], tmp_path_factory.mktemp("edited") / "out")


fuzzing = settings(max_examples=100)


@given(data=st.data())
@fuzzing
def test_manifests(out, crossing, data, monkeypatch):
    original = read_json(out / "manifest.json")
    # Hashes are checked in test_verification.py; here edits must get past them.
    monkeypatch.setattr(structure, "check_files", lambda *_: iter(()))
    try:
        (out / "manifest.json").write_text(json.dumps(edited(original, data.draw)))
        with contextlib.suppress(MptqError):
            verify(out, crossing)
    finally:
        (out / "manifest.json").write_text(json.dumps(original))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@given(data=st.data())
@settings(max_examples=40)
def test_configs(out, name, data, monkeypatch):
    monkeypatch.setattr(structure, "check_files", lambda *_: iter(()))
    path = out / "hf" / name
    before = path.read_text() if path.is_file() else None
    original = json.loads(before) if before else {"metadata": {}, "weight_map": {"a": "b"}}
    try:
        path.write_text(json.dumps(edited(original, data.draw)))
        with contextlib.suppress(MptqError):
            verify(out)
    finally:
        path.write_text(before) if before else path.unlink()


@given(data=st.data())
@fuzzing
def test_reports(tmp_path, data):
    original = make(Shape(layers=3, experts=data.draw(st.sampled_from([0, 4])), formats=("hf", "megatron")))
    (tmp_path / "report.json").write_text(json.dumps(edited(original, data.draw)))
    with contextlib.suppress(MptqError):
        document = read(tmp_path)
        tables.summary(document)
        for row in document["tensors"]:
            tables.tensor_line(row)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("files", "../x"), {"bytes": 1, "sha256": "0" * 64}, r"files\.\.\./x.*outside of the output"),
        (("files", "hf/config.json", "bytes"), "1", r"files\.hf/config\.json\.bytes: Input should be a valid integer"),
        (("formats",), ["gguf"], r"formats\.0: .*unknown format, expected one of hf, megatron"),
        (("dialect",), "mine", "unknown dialect 'mine', expected one of"),
        (("tensors", "decoder.final_layernorm.weight", "hf"), [3], r"tensors\.decoder\.final_layernorm\.weight\.hf\.0: "),
        (("recipe",), [], "recipe: Input should be a valid dictionary"),
    ],
)
def test_one_line_and_exit_code_1(quantized, tmp_path, path, value, said):
    folder = tmp_path / "out"
    folder.mkdir()
    document = read_json(quantized["crossing", "fp8-per-channel"] / "manifest.json")
    functools.reduce(lambda inside, key: inside[key], path[:-1], document)[path[-1]] = value
    (folder / "manifest.json").write_text(json.dumps(document))
    with pytest.raises(OutputError, match=said):
        verify(folder)
    done = mptq("verify", folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("mptq: ")
    assert done.stderr.count("\n") == 1


def test_json_that_nests_too_deeply_is_one_line(tmp_path):
    for name, command in (("manifest.json", "verify"), ("report.json", "report")):
        (tmp_path / name).write_text("[" * 100_000)
        done = mptq(command, tmp_path)
        assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
