"""What a run is predicted to take, and what its process takes."""

import re
import sys

import pytest

from tests.conftest import SCRIPTS, run


@pytest.mark.slow
def test_runs_take_what_was_predicted(tmp_path):
    """Within 15 %, without activations and with them; larger models are in docs/benchmarks.md."""
    modes = ["dense-768 weights", "dense-768 activations of 1 x 512 tokens"]
    # By a process of its own: on Linux a child's peak begins with the memory of its parent, and this one is large.
    done = run(sys.executable, SCRIPTS / "bench_memory.py", "--work", tmp_path, "--only", *modes)
    ratios = [float(ratio) for ratio in re.findall(r"\| ([\d.]+) \|$", done.stdout, re.MULTILINE)]
    assert len(ratios) == 3
    assert all(0.85 < ratio < 1.15 for ratio in ratios), done.stdout
    assert not list(tmp_path.glob("ckpt-*"))
