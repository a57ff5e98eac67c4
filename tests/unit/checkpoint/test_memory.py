"""The metadata of a trillion parameters."""

import re
import sys

import pytest

from tests.conftest import SCRIPTS, run


@pytest.mark.slow
def test_inspect_of_a_trillion_parameters(tmp_path):
    """300,000 chunks in far less than 1 GB; the time (3 s) is docs/security.md's, on a machine with nothing else to do."""
    run(sys.executable, SCRIPTS / "make_metadata.py", "--out", tmp_path / "ckpt")
    # By a process of its own: on Linux a child's peak begins with the memory of its parent, and this one is large.
    done = run(sys.executable, SCRIPTS / "bench_inspect.py", tmp_path / "ckpt", "--times", 1)
    peaks = [int(found) for found in re.findall(r"(\d+) MB", done.stdout)]
    assert len(peaks) == 2
    assert max(peaks) < 700
