"""The metadata of a trillion parameters."""

import sys

import pytest
from bench_inspect import measure

from tests.conftest import SCRIPTS, run


@pytest.mark.slow
def test_inspect_of_a_trillion_parameters(tmp_path):
    """300,000 chunks in far less than 1 GB; the time (3 s) is docs/security.md's, on a machine with nothing else to do."""
    run(sys.executable, SCRIPTS / "make_metadata.py", "--out", tmp_path / "ckpt")
    seconds, peak = measure([sys.executable, "-m", "mptq", "inspect", str(tmp_path / "ckpt")])
    assert peak < 700e6
    assert seconds < 30
