"""Every file of examples/ is run."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mptq import make_plan, run
from mptq.formats import FORMATS
from mptq.report import read
from tests.support.processes import checked, python

EXAMPLES = Path(__file__).parents[2] / "examples"
BIN = Path(sys.executable).parent


def script(path, text):
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Stand-ins for Slurm's commands: `srun` starts one process, `scontrol` records what it is asked."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script(folder / "scontrol", f'echo "$@" >>{tmp_path}/asked; echo localhost')
    script(folder / "srun", 'SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"')
    monkeypatch.setenv("PATH", f"{folder}:{BIN}:{os.environ['PATH']}")
    for name, value in {"NODELIST": "localhost", "ID": "7", "NUM_NODES": "1"}.items():
        monkeypatch.setenv(f"SLURM_JOB_{name}", value)
    monkeypatch.setenv("SLURM_NTASKS", "1")
    return folder


def bash(name, *arguments):
    command = ["bash", EXAMPLES / name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_a_slurm_job_quantizes(cluster, aligned, tmp_path):
    checked(bash("slurm.sh", aligned, tmp_path / "out", "fp8-per-channel", "--eval-size", 0, "--device", "cpu"))
    assert read(tmp_path / "out")["recipe"]["name"] == "fp8-per-channel"


def test_a_slurm_job_that_was_stopped_is_queued_again(cluster, tmp_path):
    script(cluster / "mptq", f'echo "$RANK $WORLD_SIZE $LOCAL_WORLD_SIZE $*" >{tmp_path}/called; exit 75')
    assert bash("slurm.sh", "ckpt", "out", "fp8", "--calib-size", 8).returncode == 75
    assert (tmp_path / "called").read_text() == "0 1 1 quantize ckpt -o out --recipe fp8 --resume --calib-size 8\n"
    assert (tmp_path / "asked").read_text().splitlines() == ["show hostnames localhost", "requeue 7"]
    script(cluster / "mptq", "exit 1")
    assert bash("slurm.sh", "ckpt", "out").returncode == 1
    assert "requeue" not in (tmp_path / "asked").read_text().splitlines()[-1]


@pytest.mark.slow
def test_several_processes(aligned, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
    checked(bash("torchrun.sh", aligned, tmp_path / "out", "fp8-blockwise", "--eval-size", 0, "--device", "cpu", "--quiet"))
    assert len(read(tmp_path / "out")["ranks"]) == 2


@pytest.mark.slow
def test_a_layer_by_hand_has_the_bytes_of_a_run(aligned, options, tmp_path):
    done = checked(python(EXAMPLES / "quantize_layer.py", aligned, "--layer", 1, "--save", tmp_path / "layer.pt"))
    assert "self_attention.linear_qkv.weight" in done.stdout
    assert "float8_e4m3fn" in done.stdout
    assert "relative error of the output: 0.0" in done.stdout
    plan = make_plan(aligned, "fp8-blockwise", ("megatron",))
    run(plan, tmp_path / "out", options)
    stored, by_hand = FORMATS["megatron"].open(tmp_path / "out"), torch.load(tmp_path / "layer.pt")
    for linear in plan.linears(1):
        parts = FORMATS["megatron"].load_linear(plan.layouts["megatron"], stored, 1, linear)
        assert torch.equal(by_hand[linear.module], torch.cat([part.data.view(torch.uint8) for part in parts]))


def test_a_layer_or_checkpoint_that_does_not_exist_is_one_line(aligned, tmp_path):
    done = python(EXAMPLES / "quantize_layer.py", aligned, "--layer", 99)
    assert done.returncode == 2
    assert "--layer 99: the model has layers 0 to" in done.stderr
    done = python(EXAMPLES / "quantize_layer.py", tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("quantize_layer.py: ")


@pytest.mark.parametrize("measured", [True, False])
def test_the_notebook_reads_a_report(aligned, options, measured, tmp_path):
    options = options if measured else replace(options, data=replace(options.data, eval_size=0))
    run(make_plan(aligned, "fp8-blockwise"), tmp_path / "out", options)
    notebook = json.loads((EXAMPLES / "read_report.ipynb").read_text())
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells)
    program = "\n".join("".join(cell["source"]) for cell in cells)
    place = {"MPTQ_OUTPUT": str(tmp_path / "out"), "MPLBACKEND": "agg"}
    done = checked(
        subprocess.run([sys.executable, "-c", program], env=os.environ | place, capture_output=True, text=True, check=False)
    )
    assert "fp8-blockwise - E4M3 weights" in done.stdout
    assert ("KL 0." if measured else "not measured") in done.stdout
    assert "model.layers.0" in done.stdout
