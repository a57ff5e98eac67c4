"""Importing megatron-core and ModelOpt without their warnings, and without changing how the host warns and logs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_imports() -> Iterator[None]:
    """Silence what imports say of optional packages and a missing GPU; filters and levels are as before afterwards."""
    logger = logging.getLogger("torch.utils.cpp_extension")  # on a machine with a CUDA toolkit and no GPU
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
