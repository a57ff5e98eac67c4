"""Importing megatron-core and ModelOpt quickly and without their warnings, leaving the host's settings unchanged."""

from __future__ import annotations

import gc
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences warnings about optional packages and a missing GPU; restores warning filters and log levels on exit.

    Garbage is not collected meanwhile: imports make objects that stay, and searching them takes a fifth of ModelOpt's.
    """
    logger = logging.getLogger("torch.utils.cpp_extension")  # it logs on a machine with a CUDA toolkit but no GPU
    level = logger.level
    logger.setLevel(logging.ERROR)
    collects = gc.isenabled()
    gc.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if collects:
            gc.enable()
        logger.setLevel(level)
