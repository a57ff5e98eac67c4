"""Threads of the strip pool, each with a single torch thread."""

import subprocess
import sys

import pytest

STRIPS = (
    "import numpy; from mptq.quantize import quantizer; "
    "quantizer.require_finite(torch.from_numpy(numpy.ones((3000, 3000), numpy.float32)), 'w')"  # not torch.ones
)


def threads_after(work, first=True):
    """The number of torch threads in the main thread of a process that has done `work`, or in a new thread."""
    ask = "print(torch.get_num_threads())"
    later = f"import threading; threading.Thread(target=lambda: {ask}).start()"
    program = f"import torch; {work}; {ask if first else later}"
    return int(subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("work", [STRIPS, f"torch.ones(3000, 3000).sum(); {STRIPS}"], ids=["at first", "later"])
def test_the_calling_thread_keeps_its_number_of_torch_threads(work):
    """Forward passes come after the first strips: torch gives new threads the number that was set last."""
    assert threads_after(work) == threads_after("pass")


@pytest.mark.parametrize("before", ["pass", "torch.set_num_threads(3)"])
def test_new_threads_get_the_default_number_of_torch_threads(before):
    assert threads_after(f"{before}; {STRIPS}", first=False) == threads_after(before, first=False)
