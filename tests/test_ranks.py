"""Several processes, as torchrun starts them: the same bytes as of one."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mptq import make_plan, run
from mptq.errors import MptqError
from mptq.pipeline import default_output
from mptq.ranks import Ranks, is_first, shares, started
from tests.conftest import ROOT
from tests.killing import check, contents
from tests.test_resume import BOTH, PLAIN, stopped, whole


@given(st.dictionaries(st.integers(0, 50), st.integers(1, 1000)), st.integers(1, 8))
def test_shares_are_of_all_units_and_balanced(weights, size):
    found = shares(weights, size)
    assert sorted(unit for share in found for unit in share) == sorted(weights)
    loads = [sum(weights[unit] for unit in share) for share in found]
    assert max(loads) - min(loads) <= max(weights.values(), default=0)


def test_one_process_agrees_with_itself():
    ranks = Ranks()
    assert ranks.first
    assert ranks.agree(lambda: 7) == 7
    ranks.wait()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x' in the environment, and must be a number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "there are 2 processes, which do not find each other .*RANK.*: start them with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "do not find each other"),
    ],
)
def test_an_environment_that_is_half_of_torchruns_is_one_line(variables, message, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MptqError, match=message) as caught:
        started()
    assert "\n" not in str(caught.value)


def test_a_rank_that_is_alone_is_the_first(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert is_first()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_first()


def torchrun(size, *arguments):
    """The command in several processes; the finished process."""
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={size}", "-m", "mptq", "quantize", *arguments]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, check=False)


COMMON = ("--recipe", "fp8-blockwise", "--eval-size", "0", "--format", "hf,megatron", "--max-shard-size", "200000", "--json")


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), [("crossing", 2), ("mixtral", 3)])
def test_same_bytes_from_several_processes(request, model, size, tmp_path, tmp_path_factory):
    checkpoint, out = request.getfixturevalue(model), tmp_path / "out"
    done = torchrun(size, checkpoint, *COMMON, "-o", out)
    assert done.returncode == 0, done.stderr
    plan = make_plan(checkpoint, "fp8-blockwise", BOTH)
    check(out, whole(plan, tmp_path_factory.mktemp("one")))
    report = json.loads(done.stdout)  # one document: only rank 0 prints
    alone = run(plan, tmp_path_factory.mktemp("two") / "out", PLAIN)
    assert report["tensors"] == alone["tensors"]
    assert [share["rank"] for share in report["ranks"]] == list(range(size))
    assert sum(share["units"] for share in report["ranks"]) == plan.outputs
    assert done.stderr.count("written to") == 1


@pytest.mark.slow
def test_another_number_of_processes_goes_on(crossing, tmp_path, tmp_path_factory):
    plan, out = make_plan(crossing, "fp8-blockwise", BOTH), tmp_path / "out"
    stopped(plan, out, 2)
    done = torchrun(2, crossing, *COMMON, "-o", out, "--resume")
    assert done.returncode == 0, done.stderr
    check(out, whole(plan, tmp_path_factory.mktemp("one")))


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_one_line(crossing, tokens, tmp_path):
    done = torchrun(2, crossing, "--recipe", "fp8", "--calib-dataset", tokens, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "mptq: activations are not shared out among processes" in done.stderr
    assert not default_output(make_plan(crossing, "fp8"), crossing).exists()
    assert contents(tmp_path) == {}
