"""Several processes, as torchrun starts them: the same bytes as of one."""

import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mptq import Options, make_plan, run
from mptq.calibration.datasets.options import DataOptions
from mptq.calibration.hidden_state_pair import HiddenStateOptions, HiddenStatePair
from mptq.calibration.tokens import load_tokens
from mptq.distributed import Ranks, is_first, shares, started
from mptq.errors import MptqError, StoppedError
from mptq.output.directory import partial_of
from mptq.output.journal import NAME as JOURNAL
from mptq.recipes.recipe import load_recipe
from mptq.report import read
from tests.conftest import ROOT
from tests.integration.test_resume import BOTH, PLAIN, stopped, whole
from tests.support.killing import check, comparable, contents


@given(st.dictionaries(st.integers(0, 50), st.integers(1, 1000)), st.integers(1, 8))
def test_shares_are_of_all_units_and_balanced(weights, size):
    found = shares(weights, size)
    assert sorted(unit for share in found for unit in share) == sorted(weights)
    loads = [sum(weights[unit] for unit in share) for share in found]
    assert max(loads) - min(loads) <= max(weights.values(), default=0)


def test_one_process_agrees_with_itself():
    ranks = Ranks()
    assert ranks.first
    assert ranks.broadcast_object(lambda: 7) == 7
    assert ranks.all_gather(7) == [7]
    assert ranks.all_reduce_max(torch.tensor([7.0])) == 7
    ranks.broadcast(torch.tensor([7.0]), 0)
    ranks.barrier()


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
def test_same_bytes_from_several_processes(mixtral, tmp_path, tmp_path_factory):
    checkpoint, size, out = mixtral, 3, tmp_path / "out"
    done = torchrun(size, checkpoint, *COMMON, "-o", out)
    assert done.returncode == 0, done.stderr
    plan = make_plan(checkpoint, "fp8-blockwise", BOTH)
    check(out, whole(plan, tmp_path_factory.mktemp("one")), apart=["report.json: ranks"])
    report = json.loads(done.stdout)  # one document: only rank 0 prints
    alone = run(plan, tmp_path_factory.mktemp("two") / "out", PLAIN)
    assert report["tensors"] == alone["tensors"]
    assert [share["rank"] for share in report["ranks"]] == list(range(size))
    assert sum(share["units"] for share in report["ranks"]) == len(plan.units)
    assert done.stderr.count("written to") == 1


@pytest.mark.slow
def test_another_number_of_processes_goes_on(crossing, tmp_path, tmp_path_factory):
    plan, out = make_plan(crossing, "fp8-blockwise", BOTH), tmp_path / "out"
    stopped(plan, out, 2)
    done = torchrun(2, crossing, *COMMON, "-o", out, "--resume")
    assert done.returncode == 0, done.stderr
    check(out, whole(plan, tmp_path_factory.mktemp("one")), apart=["report.json: ranks"])


DATA = ("--calib-seq-length", 32, "--calib-size", 11, "--calib-batch-size", 2, "--eval-size", 5, "--moe-min-tokens", 4)


def with_data(tokens, **more):
    """The options of `DATA`."""
    return Options(data=DataOptions((str(tokens),), 11, 5, 32), batch_size=2, moe_min_tokens=4, max_shard_bytes=200_000, **more)


FIGURES = [f"report.json: {key}" for key in ("calibration", "fidelity", "layers", "predicted_peak_bytes", "ranks")]
"""What the report says of the activations, of the memory that they take, and of who made what."""


def check_figures(report, alone):
    """What the activations say, which batches of other sizes round otherwise."""
    kl, expected = (document["fidelity"]["kl"]["mean"] for document in (report, alone))
    assert math.isclose(kl, expected, rel_tol=0.02)
    for layer, other in zip(report["layers"], alone["layers"], strict=True):
        assert layer["experts"] == other["experts"]
        assert layer["kv_cache"] == other["kv_cache"]
        assert math.isclose(layer["hidden_relative_error"], other["hidden_relative_error"], rel_tol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "size", "more"),
    [("mixtral", 3, ()), ("crossing", 2, ("--activation-memory", "1"))],
)
def test_samples_and_linears_are_shared_out(request, tokens, model, size, more, tmp_path, tmp_path_factory):
    checkpoint, out = request.getfixturevalue(model), tmp_path / "out"
    recipe = load_recipe("fp8").changed(kv_cache="fp8")
    arguments = ("--format", "hf,megatron", "--max-shard-size", 200000, "--json", "--kv-cache", "fp8")
    done = torchrun(size, checkpoint, "--recipe", "fp8", "--calib-dataset", tokens, *DATA, *arguments, *more, "-o", out)
    assert done.returncode == 0, done.stderr
    whole = tmp_path_factory.mktemp("one") / "out"
    alone = run(make_plan(checkpoint, recipe, BOTH), whole, with_data(tokens))
    check(out, comparable(whole), apart=FIGURES)
    report = json.loads(done.stdout)
    assert report["tensors"] == alone["tensors"]
    assert [share["rank"] for share in report["ranks"]] == list(range(size))
    check_figures(report, alone)


def calibrated(folder, how):
    """A static recipe that calibrates so."""
    path = folder / "recipe.yaml"
    path.write_text(f"description: d\nhf: modelopt\nweights: {{scale: tensor}}\nactivations: static\ncalibration: {{{how}}}\n")
    return path


@pytest.mark.slow
def test_another_number_of_processes_goes_on_with_activations(crossing, tokens, tmp_path, tmp_path_factory):
    recipe, out = calibrated(tmp_path_factory.mktemp("recipe"), "propagate: quantized"), tmp_path / "out"
    plan = make_plan(crossing, load_recipe(str(recipe)), BOTH)
    asked = iter((False, False, True))
    with pytest.raises(StoppedError):
        run(plan, out, with_data(tokens, stop=lambda: next(asked)))
    arguments = ("--format", "hf,megatron", "--max-shard-size", 200000, "--calib-dataset", tokens, *DATA, "--resume")
    done = torchrun(2, crossing, "--recipe", recipe, *arguments, "-o", out)
    assert done.returncode == 0, done.stderr
    whole = tmp_path_factory.mktemp("one") / "out"
    alone = run(plan, whole, with_data(tokens))
    check(out, comparable(whole), apart=FIGURES)
    check_figures(read(out), alone)


def start(size, *arguments):
    """The processes of a run, each started by itself."""
    environment = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "mptq", "quantize", *map(str, arguments)]
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]


def free_port():
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(journal, steps):
    """Until so many steps are in the journals."""
    limit = time.monotonic() + 120
    while sum(len(file.read_text().splitlines()) - 1 for file in journal.parent.glob(f"{journal.name}*")) < steps:
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_ranks_keep_their_parts_of_one_file(crossing, tokens, tmp_path, monkeypatch):
    """Also where each finds that there is none yet, and another makes it a moment later."""
    plan = make_plan(crossing, "fp8")
    data = load_tokens(DataOptions((str(tokens),), 11, 5, 32), None, plan.model.vocab_size, calibrate=True)
    settings = HiddenStateOptions(torch.device("cpu"), 2, 2**30, tmp_path)
    ranks = [HiddenStatePair(plan, data, replace(settings, ranks=Ranks(rank, 2))) for rank in range(2)]
    for rank, streams in enumerate(ranks):
        for states in (streams.reference.states, streams.quantized.states):
            states.fill_(rank + 1)
        with monkeypatch.context() as patched:
            patched.setattr(Path, "exists", lambda _: False)
            streams.save(tmp_path / "states")
    whole = HiddenStatePair(plan, data, settings)
    whole.load(tmp_path / "states")
    for kind in ("reference", "quantized"):
        states = getattr(whole, kind).states
        for rank, streams in enumerate(ranks):
            mine = [batch for batch in [*streams.held_out, *streams.calibration] if batch.tokens.stop <= len(states)]
            assert mine
            assert all((states[batch.tokens] == rank + 1).all() for batch in mine)


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "codes"), [(signal.SIGTERM, [75, 75]), (signal.SIGKILL, [1, -9])])
def test_ranks_that_go_together_end_together(aligned, tokens, tmp_path, sent, codes):
    out = tmp_path / "out"
    arguments = (aligned, "--recipe", "fp8-blockwise", "--calib-dataset", tokens, "--calib-seq-length", 32, "--eval-size", 30)
    ranks = start(2, *arguments, "--calib-batch-size", 1, "-o", out)
    wait_for(partial_of(out) / JOURNAL, 1)
    ranks[1].send_signal(sent)
    told = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == codes
    last = told[0].strip().splitlines()[-1]
    expected = "stopped after" if sent == signal.SIGTERM else "another process of the run has ended: see what it says"
    assert last.startswith(f"mptq: {expected}")
    assert "pass --resume to continue" in last
    assert not out.exists()


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_one_line(crossing, tokens, tmp_path):
    recipe = calibrated(tmp_path, "method: percentile, percentile: 99.9")
    done = torchrun(2, crossing, "--recipe", recipe, "--calib-dataset", tokens, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "mptq: a percentile is of all samples together" in done.stderr
    assert contents(tmp_path) == {"recipe.yaml": recipe.read_bytes()}
