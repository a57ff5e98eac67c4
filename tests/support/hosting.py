"""A host process for mptq, which has already imported and configured everything.

Run as `python -m tests.support.hosting CODE`.
"""

import gc
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings

import megatron.core.datasets.indexed_dataset
import modelopt.torch.quantization
import numpy as np
import torch
import transformers
from megatron.core.transformer.transformer_layer import TransformerLayer

HEAVY = megatron.core.datasets.indexed_dataset, modelopt.torch.quantization, transformers, TransformerLayer


def in_a_new_thread(ask):
    found = []
    thread = threading.Thread(target=lambda: found.append(ask()))
    thread.start()
    thread.join()
    return found[0]


def named(module):
    """The ids of a module's members by name, without submodules, which appear with imports."""
    held = vars(module).items()
    return {name: id(value) for name, value in held if not isinstance(value, type(sys)) and not name.startswith("__")}


def differing(left, right):
    """The differences between two states, in nested dicts."""
    if not isinstance(left, dict):
        return [left, right]
    return {key: differing(left.get(key), right.get(key)) for key in {*left, *right} if left.get(key) != right.get(key)}


class Host:
    """Settings of the host, none at its default, and a snapshot of them at any time."""

    def __init__(self):
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.DEBUG)
        warnings.simplefilter("always", DeprecationWarning)
        torch.set_num_threads(3)
        gc.set_threshold(777, 11, 12)
        gc.collect()
        gc.freeze()
        self.frozen = gc.get_freeze_count()
        loggers = logging.Logger.manager.loggerDict.items()
        self.loggers = ["", *(name for name, logger in loggers if isinstance(logger, logging.Logger))]
        self.modules = [name for name in sys.modules if name.startswith("megatron.core.")] + ["torch", "gc", "warnings"]

    def state(self):
        loggers = {name: logging.getLogger(name) for name in self.loggers}
        return {
            "modules": {name: named(sys.modules[name]) for name in self.modules},
            # Some of the frozen objects are freed meanwhile.
            "garbage collector": [gc.isenabled(), gc.get_threshold(), round(gc.get_freeze_count() / self.frozen, 1)],
            "logging": {name: [logger.level, logger.disabled, len(logger.handlers)] for name, logger in loggers.items()},
            "warnings": list(map(str, warnings.filters)),
            "threads": [torch.get_num_threads(), in_a_new_thread(torch.get_num_threads), threading.stack_size()],
            "torch": [str(torch.get_default_dtype()), torch.is_grad_enabled(), in_a_new_thread(torch.is_grad_enabled)],
            "randomness": [
                hash(random.getstate()),
                hash(str(np.random.get_state())),
                hash(str(torch.get_rng_state().tolist())),
            ],
            "environment": dict(os.environ),
            "signals": [str(signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)],
            "processes": multiprocessing.get_start_method(allow_none=True),
            "recursion": sys.getrecursionlimit(),
        }


if __name__ == "__main__":
    host = Host()
    before = host.state()
    exec(sys.argv[1])
    print(json.dumps(differing(before, host.state()), default=str))
