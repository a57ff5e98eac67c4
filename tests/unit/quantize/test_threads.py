"""The threads of strips, each of which computes alone."""

import subprocess
import sys

import pytest

STRIPS = (
    "import numpy; from mptq.quantize import quantizer; "
    "quantizer.require_finite(torch.from_numpy(numpy.ones((3000, 3000), numpy.float32)), 'w')"  # torch.ones would ask
)


def threads_after(work, first=True):
    """The threads that torch uses in the first thread of a process that has done `work`, or in a new one."""
    ask = "print(torch.get_num_threads())"
    later = f"import threading; threading.Thread(target=lambda: {ask}).start()"
    program = f"import torch; {work}; {ask if first else later}"
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("work", [STRIPS, f"torch.ones(3000, 3000).sum(); {STRIPS}"], ids=["at first", "later"])
def test_who_asks_keeps_the_threads_of_torch(work):
    """Forward passes come after the first strips: torch gives the threads that it has not seen the number that was set last."""
    assert threads_after(work) == threads_after("pass")


@pytest.mark.parametrize("before", ["pass", "torch.set_num_threads(3)"])
def test_new_threads_get_what_they_would_have_got(before):
    assert threads_after(f"{before}; {STRIPS}", first=False) == threads_after(before, first=False)
