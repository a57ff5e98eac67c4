"""Memory needed to read the metadata of a trillion parameters."""

import re
import sys

import pytest

from tests.conftest import SCRIPTS, run


@pytest.mark.slow
def test_inspect_of_a_trillion_parameters(tmp_path):
    """300,000 chunks need far less than 1 GB. The time (3 s on an idle machine) is in docs/security.md."""
    run(sys.executable, SCRIPTS / "make_metadata.py", "--out", tmp_path / "ckpt")
    # In a separate process: on Linux a child's peak memory starts at its parent's memory, and this process is large.
    done = run(sys.executable, SCRIPTS / "bench_inspect.py", tmp_path / "ckpt", "--times", 1)
    peaks = [int(found) for found in re.findall(r"(\d+) MB", done.stdout)]
    assert len(peaks) == 2
    assert max(peaks) < 700
