"""Several processes, as started by torchrun, give the same bytes as one."""

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
from tests.conftest import ROOT, mptq
from tests.conftest import run as run_command
from tests.integration.test_resume import BOTH, PLAIN, stopped, whole
from tests.support.killing import check, comparable, contents


@given(st.dictionaries(st.integers(0, 50), st.integers(1, 1000)), st.integers(1, 8))
def test_shares_cover_all_units_and_are_balanced(weights, size):
    found = shares(weights, size)
    assert sorted(unit for share in found for unit in share) == sorted(weights)
    loads = [sum(weights[unit] for unit in share) for share in found]
    assert max(loads) - min(loads) <= max(weights.values(), default=0)


def test_collectives_of_one_process_return_their_input():
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
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE is 'x', which is not a number of processes"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "the processes cannot connect to each other .*RANK.*: start them with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"}, "cannot connect to each other"),
    ],
)
def test_an_incomplete_torchrun_environment_is_one_line(variables, message, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(MptqError, match=message) as caught:
        started()
    assert "\n" not in str(caught.value)


def test_a_single_process_is_first_whatever_its_rank(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.setenv("RANK", "1")
    assert is_first()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_first()


def quantize_in(size, *arguments):
    """Run the command in several processes; return the finished ones as one."""
    return mptq("quantize", *arguments, processes=size)


COMMON = ("--recipe", "fp8-blockwise", "--eval-size", "0", "--format", "hf,megatron", "--max-shard-size", "200000", "--json")


@pytest.mark.slow
def test_same_bytes_from_several_processes(mixtral, tmp_path, tmp_path_factory):
    checkpoint, size, out = mixtral, 3, tmp_path / "out"
    done = quantize_in(size, checkpoint, *COMMON, "-o", out)
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
def test_another_number_of_processes_resumes_a_run(crossing, tmp_path, tmp_path_factory):
    plan, out = make_plan(crossing, "fp8-blockwise", BOTH), tmp_path / "out"
    stopped(plan, out, 2)
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "mptq", "quantize")
    run_command(sys.executable, *torchrun, crossing, *COMMON, "-o", out, "--resume")
    check(out, whole(plan, tmp_path_factory.mktemp("one")), apart=["report.json: ranks"])


DATA = ("--calib-seq-length", 32, "--calib-size", 11, "--calib-batch-size", 2, "--eval-size", 5, "--moe-min-tokens", 4)


def with_data(tokens, **more):
    """The options corresponding to `DATA`."""
    return Options(data=DataOptions((str(tokens),), 11, 5, 32), batch_size=2, moe_min_tokens=4, max_shard_bytes=200_000, **more)


FIGURES = [f"report.json: {key}" for key in ("calibration", "fidelity", "layers", "predicted_peak_bytes", "ranks")]
"""Parts of the report that depend on activations, their memory, or which rank made what."""


def check_figures(report, alone):
    """Check the metrics from activations, which round differently in batches of other sizes."""
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
def test_samples_and_linears_are_distributed(request, tokens, model, size, more, tmp_path, tmp_path_factory):
    checkpoint, out = request.getfixturevalue(model), tmp_path / "out"
    recipe = load_recipe("fp8").changed(kv_cache="fp8")
    arguments = ("--format", "hf,megatron", "--max-shard-size", 200000, "--json", "--kv-cache", "fp8")
    done = quantize_in(size, checkpoint, "--recipe", "fp8", "--calib-dataset", tokens, *DATA, *arguments, *more, "-o", out)
    assert done.returncode == 0, done.stderr
    whole = tmp_path_factory.mktemp("one") / "out"
    alone = run(make_plan(checkpoint, recipe, BOTH), whole, with_data(tokens))
    check(out, comparable(whole), apart=FIGURES)
    report = json.loads(done.stdout)
    assert report["tensors"] == alone["tensors"]
    assert [share["rank"] for share in report["ranks"]] == list(range(size))
    check_figures(report, alone)


def calibrated(folder, how):
    """Write a static recipe with this calibration."""
    path = folder / "recipe.yaml"
    path.write_text(f"description: d\nhf: modelopt\nweights: {{scale: tensor}}\nactivations: static\ncalibration: {{{how}}}\n")
    return path


@pytest.mark.slow
def test_another_number_of_processes_resumes_a_run_with_activations(crossing, tokens, tmp_path, tmp_path_factory):
    recipe, out = calibrated(tmp_path_factory.mktemp("recipe"), "propagate: quantized"), tmp_path / "out"
    plan = make_plan(crossing, load_recipe(str(recipe)), BOTH)
    asked = iter((False, False, True))
    with pytest.raises(StoppedError):
        run(plan, out, with_data(tokens, stop=lambda: next(asked)))
    arguments = ("--format", "hf,megatron", "--max-shard-size", 200000, "--calib-dataset", tokens, *DATA, "--resume")
    done = quantize_in(2, crossing, "--recipe", recipe, *arguments, "-o", out)
    assert done.returncode == 0, done.stderr
    whole = tmp_path_factory.mktemp("one") / "out"
    alone = run(plan, whole, with_data(tokens))
    check(out, comparable(whole), apart=FIGURES)
    check_figures(read(out), alone)


def start(size, *arguments):
    """Start the processes of a run, each separately."""
    environment = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    command = [sys.executable, "-m", "mptq", "quantize", *map(str, arguments)]
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]


def free_port():
    """An unused port."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def wait_for(journal, steps):
    """Wait until the journals have this number of steps."""
    limit = time.monotonic() + 120
    while sum(len(file.read_text().splitlines()) - 1 for file in journal.parent.glob(f"{journal.name}*")) < steps:
        assert time.monotonic() < limit
        time.sleep(0.005)


def test_ranks_save_their_parts_in_one_file(crossing, tokens, tmp_path, monkeypatch):
    """Also if each finds that there is no file yet, and another creates it a moment later."""
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
def test_ranks_that_run_together_end_together(aligned, tokens, tmp_path, sent, codes):
    out = tmp_path / "out"
    arguments = (aligned, "--recipe", "fp8-blockwise", "--calib-dataset", tokens, "--calib-seq-length", 32, "--eval-size", 30)
    ranks = start(2, *arguments, "--calib-batch-size", 1, "-o", out)
    wait_for(partial_of(out) / JOURNAL, 1)
    ranks[1].send_signal(sent)
    told = [rank.communicate(timeout=60)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == codes
    last = told[0].strip().splitlines()[-1]
    expected = "stopped after" if sent == signal.SIGTERM else "another process of the run has exited: see its error message"
    assert last.startswith(f"mptq: {expected}")
    assert "pass --resume to continue" in last
    assert not out.exists()


@pytest.mark.slow
def test_a_percentile_with_several_processes_is_refused_in_one_line(crossing, tokens, tmp_path):
    recipe = calibrated(tmp_path, "method: percentile, percentile: 99.9")
    done = quantize_in(2, crossing, "--recipe", recipe, "--calib-dataset", tokens, "-o", tmp_path / "out")
    assert done.returncode == 1
    assert "mptq: percentile calibration needs all samples in one process" in done.stderr
    assert contents(tmp_path) == {"recipe.yaml": recipe.read_bytes()}
