"""Importing megatron-core and ModelOpt without their warnings, leaving the host's warnings and logging unchanged."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silences warnings about optional packages and a missing GPU; restores warning filters and log levels on exit."""
    logger = logging.getLogger("torch.utils.cpp_extension")  # it logs on a machine with a CUDA toolkit but no GPU
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
