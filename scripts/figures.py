"""Metrics of a quantized model against its reference, and the tokens of a run of mptq: for checks with other software.

The definitions are those of mptq's report, but the code is independent: KL divergence of the quantized from the
reference distribution of the next token (nats), perplexities, share of positions with the same most likely token;
standard errors over the sequences.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HEADER = """\
| model | KL (nats) | ± | perplexity of the reference | quantized | ratio | top-1 | KL against the report's |
|---|---|---|---|---|---|---|---|"""


def fast_bfloat16() -> None:
    """Compute BF16 products on a CPU as float32 sums that are rounded once: torch's precision, at four times its speed.

    Without BF16 instructions, torch's own products would take half an hour in these checks.
    """
    if torch.cuda.is_available():
        return
    linear, matmul = torch.nn.functional.linear, torch.matmul

    def fast_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if not x.dtype == weight.dtype == torch.bfloat16:
            return linear(x, weight, bias)
        return linear(x.float(), weight.float(), None if bias is None else bias.float()).bfloat16()

    def fast_matmul(left: torch.Tensor, right: torch.Tensor, **options: Any) -> torch.Tensor:
        if options or not left.dtype == right.dtype == torch.bfloat16:
            return matmul(left, right, **options)
        return matmul(left.float(), right.float()).bfloat16()

    torch.nn.functional.linear, torch.matmul = fast_linear, fast_matmul


def read_report(out: Path) -> dict[str, Any]:
    """report.json of an output."""
    report: dict[str, Any] = json.loads((out / "report.json").read_text())
    return report


def tokens(report: dict[str, Any], tokenizer: Path, datasets: list[str], calibrate: bool) -> tuple[list[Any], list[Any]]:
    """The held-out sequences of a run and its calibration sequences, int64 [length] each, as identified by its report.

    `datasets` are those of the run, none for the default data. Raises AssertionError if the tokens are not the report's.
    """
    from mptq.calibration.datasets.corpus import describe
    from mptq.calibration.datasets.options import DataOptions
    from mptq.calibration.tokens import load_tokens

    account = report["calibration"]
    options = DataOptions(
        tuple(datasets),
        calib_size=account["calibration"]["sequences"] or 1,
        eval_size=account["held_out"]["sequences"],
        **{name: account[name] for name in ("seq_length", "packed", "seed")},
    )
    found = load_tokens(options, tokenizer, report["model"]["vocab_size"], calibrate)
    assert describe(found.held_out) == account["held_out"], "the tokens differ from the report's: pass its --calib-dataset"
    assert not calibrate or describe(found.calibration) == account["calibration"]
    return [torch.from_numpy(ids) for ids in found.held_out], [torch.from_numpy(ids) for ids in found.calibration]


@dataclass(frozen=True)
class Figures:
    """Sums over the tokens of each sequence, float64 [sequences], and the numbers of tokens."""

    kl: torch.Tensor
    reference: torch.Tensor
    quantized: torch.Tensor
    agreement: torch.Tensor
    counts: torch.Tensor

    def mean(self, name: str) -> tuple[float, float]:
        """Mean over all tokens, and its standard error over the sequences, which must have the same length."""
        values = getattr(self, name) / self.counts
        return float(values.mean()), float(values.std()) / math.sqrt(len(values))

    def row(self, name: str, report: dict[str, Any] | None = None) -> str:
        """A row of the table; `report` is the report to compare with."""
        (kl, error), (top, _) = self.mean("kl"), self.mean("agreement")
        before, after = math.exp(self.mean("reference")[0]), math.exp(self.mean("quantized")[0])
        cells = [name, f"{kl:.6f}", f"{error:.6f}", f"{before:.4f}", f"{after:.4f}", f"{after / before:.5f}", f"{top:.4f}"]
        return "| " + " | ".join([*cells, against(kl, error, report) if report else "-"]) + " |"


def against(kl: float, error: float, report: dict[str, Any]) -> str:
    """The difference from the report's KL in percent, and in standard errors."""
    stated = report["fidelity"]["kl"]["mean"]
    return f"{100 * (kl / stated - 1):+.2f} %, {(kl - stated) / error:+.2f} standard errors"


def report_row(name: str, report: dict[str, Any]) -> str:
    """The report's own metrics as a row of the table."""
    fidelity = report["fidelity"]
    kl, perplexity = fidelity["kl"], fidelity["perplexity"]
    cells = [name, f"{kl['mean']:.6f}", f"{kl['standard_error']:.6f}", f"{perplexity['reference']:.4f}"]
    cells += [f"{perplexity['quantized']:.4f}", f"{perplexity['ratio']:.5f}", f"{fidelity['top1_agreement']['mean']:.4f}", "-"]
    return "| " + " | ".join(cells) + " |"


def measure(sequences: list[torch.Tensor], reference: list[torch.Tensor], quantized: list[torch.Tensor]) -> Figures:
    """Metrics from the logits [length, vocabulary] of both models on token ids [length], sequence by sequence."""
    rows = [_sums(*three) for three in zip(sequences, reference, quantized, strict=True)]
    return Figures(*torch.tensor(rows, dtype=torch.float64).unbind(1))


def _sums(ids: torch.Tensor, reference: torch.Tensor, quantized: torch.Tensor) -> list[float]:
    left, right = (torch.log_softmax(logits[:-1].float(), dim=-1) for logits in (reference, quantized))
    following = ids[1:]
    place = torch.arange(len(following)), following
    kl = torch.nn.functional.kl_div(right, left, reduction="none", log_target=True).sum(-1)
    same = left.argmax(-1) == right.argmax(-1)
    values = (kl, -left[place], -right[place], same)
    return [float(value.double().sum()) for value in values] + [len(following)]
