"""The predicted memory of a run, and that of its process."""

import re
import sys

import pytest

from tests.conftest import SCRIPTS, run


@pytest.mark.slow
def test_runs_take_the_predicted_memory(tmp_path):
    """Within 15 %, with and without activations; larger models are in docs/benchmarks.md."""
    modes = ["dense-768 weights", "dense-768 activations of 1 x 512 tokens"]
    # In a separate process: on Linux a child's peak starts at the memory of its parent, and this process is large.
    done = run(sys.executable, SCRIPTS / "bench_memory.py", "--work", tmp_path, "--only", *modes)
    ratios = [float(ratio) for ratio in re.findall(r"\| ([\d.]+) \|$", done.stdout, re.MULTILINE)]
    assert len(ratios) == 3
    assert all(0.85 < ratio < 1.15 for ratio in ratios), done.stdout
    assert not list(tmp_path.glob("ckpt-*"))
