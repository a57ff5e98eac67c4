"""Options of the calibration data. Does not import torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DataOptions:
    """The calibration and held-out data.

    `datasets` are "NAME" or "NAME:WEIGHT"; if empty, mptq's own texts are used. `calib_size` and `eval_size` are the
    numbers of calibration and held-out sequences, of `seq_length` tokens. `unseen_size` is that of sequences of a kind
    of text that never calibrates; None is `eval_size` if the run calibrates, else 0. `packed` joins documents end to
    end into full sequences; otherwise each document is a sequence, cut at `seq_length` and never padded.
    `trust_remote_code` lets a tokenizer run the Python code in its directory; datasets never run code.
    """

    datasets: tuple[str, ...] = ()
    calib_size: int = 64
    eval_size: int = 8
    seq_length: int = 512
    packed: bool = True
    seed: int = 0
    trust_remote_code: bool = False
    unseen_size: int | None = None

    def unseen(self, calibrate: bool) -> int:
        """Returns the number of sequences of the unseen kind, for a run that does `calibrate` or does not."""
        if self.unseen_size is not None:
            return self.unseen_size
        return self.eval_size if calibrate else 0
