"""Which data are wanted. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataOptions:
    """What is calibrated on.

    `datasets` are "NAME" or "NAME:WEIGHT"; none: text and code that Python carries. `calib_size` and `eval_size` count
    sequences of `seq_length` tokens: to calibrate on, and held out. `packed` sets documents end to end into full
    sequences; else a document is a sequence, cut at `seq_length` and never padded. `trust_remote_code` lets a
    tokenizer run the Python code in its directory; no dataset ever runs code.
    """

    datasets: tuple[str, ...] = ()
    calib_size: int = 64
    eval_size: int = 8
    seq_length: int = 512
    packed: bool = True
    seed: int = 0
    trust_remote_code: bool = False
