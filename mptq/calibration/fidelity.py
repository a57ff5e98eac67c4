"""How far the quantized stream is from the reference: hidden states after a layer, and next-token distributions at the end."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

_LARGEST = math.log(sys.float_info.max)
"""The exponential of more is no float."""


@dataclass
class Deviation:
    """Relative error and cosine of hidden states against the reference's.

    Sums over batches, each in float64; their own sums are exact, so that they are the same in whatever order.
    """

    batches: list[tuple[float, float, float, float]] = field(default_factory=list)

    def add(self, reference: torch.Tensor, quantized: torch.Tensor) -> None:
        """Two tensors of hidden states of the same tokens."""
        left, right = reference.float(), quantized.float()
        products = (left - right).square(), left.square(), right.square(), left * right
        noise, signal, other, product = (float(part.sum(dtype=torch.float64)) for part in products)
        self.batches.append((noise, signal, other, product))

    @property
    def finite(self) -> bool:
        """Whether all sums are numbers."""
        return all(math.isfinite(part) for batch in self.batches for part in batch)

    @property
    def relative_error(self) -> float:
        """Norm of the difference over the norm of the reference."""
        noise, signal, _, _ = self._sums()
        return math.sqrt(noise / signal) if signal else 0.0

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, all tokens as one vector."""
        _, signal, other, product = self._sums()
        norms = math.sqrt(signal * other)
        return product / norms if norms else 1.0

    def _sums(self) -> list[float]:
        return [math.fsum(batch[column] for batch in self.batches) for column in range(4)]


@dataclass
class Mean:
    """Mean of values, with the standard error that their spread over sequences implies.

    Tokens of one sequence are not independent, so a sequence is one observation: the error is that of a ratio of sums
    (Cochran, Sampling Techniques, section 6.4), sqrt(sum over sequences of (sum - mean * count)^2 * n / (n - 1)) / count in
    all. None for a single sequence.
    """

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, total: float, count: int) -> None:
        """The sum of the values of one sequence, and how many there are."""
        self.sums.append(total)
        self.counts.append(count)

    @property
    def mean(self) -> float:
        """Sum of all values over their number."""
        return math.fsum(self.sums) / sum(self.counts)

    @property
    def standard_error(self) -> float | None:
        """Of the mean."""
        number = len(self.sums)
        if number < 2:
            return None
        spread = math.fsum((total - self.mean * count) ** 2 for total, count in zip(self.sums, self.counts, strict=True))
        return math.sqrt(spread * number / (number - 1)) / sum(self.counts)


@dataclass
class NextTokens:
    """Distributions of the next token by both streams, sequence by sequence.

    KL divergence of the quantized from the reference distribution (in nats, for every position that has a next token), the
    negative log likelihood of that token under both, and whether both find the same token the likeliest.
    """

    kl: Mean = field(default_factory=Mean)
    reference: Mean = field(default_factory=Mean)
    quantized: Mean = field(default_factory=Mean)
    rise: Mean = field(default_factory=Mean)
    agreement: Mean = field(default_factory=Mean)

    def add(self, sequence: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """One sequence in pieces: float32 logits of both streams [tokens, vocabulary], and the next tokens int64 [tokens]."""
        sums = torch.zeros(4, dtype=torch.float64)
        count = 0
        for reference, quantized, following in sequence:
            sums += _sums(reference, quantized, following)
            count += len(following)
        for mean, total in zip((self.kl, self.reference, self.quantized, self.agreement), sums.tolist(), strict=True):
            mean.add(total, count)
        self.rise.add(float(sums[2] - sums[1]), count)

    def join(self, others: Iterable[NextTokens]) -> None:
        """Add the sequences of `others`."""
        for other in others:
            for mine, more in ((getattr(self, name), getattr(other, name)) for name in vars(self)):
                mine.sums += more.sums
                mine.counts += more.counts

    @property
    def finite(self) -> bool:
        """Whether every figure is a number: NaN is in none of the comparisons, and perplexities are not beyond all floats."""
        return all(mean.mean < _LARGEST for mean in (self.kl, self.reference, self.quantized))

    @property
    def document(self) -> dict[str, Any]:
        """As plain data: the report's `fidelity`; for figures that are `finite`."""
        ratio = math.exp(self.rise.mean)
        error = self.rise.standard_error
        return {
            "tokens": sum(self.kl.counts),
            "sequences": len(self.kl.counts),
            "kl": {"mean": self.kl.mean, "standard_error": self.kl.standard_error},
            "perplexity": {
                "reference": math.exp(self.reference.mean),
                "quantized": math.exp(self.quantized.mean),
                "ratio": ratio,
                "ratio_standard_error": None if error is None else ratio * error,
            },
            "top1_agreement": {"mean": self.agreement.mean, "standard_error": self.agreement.standard_error},
        }


def _sums(reference: torch.Tensor, quantized: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """KL, both negative log likelihoods, agreements, summed over tokens: float64 [4]."""
    left, right = reference.log_softmax(-1), quantized.log_softmax(-1)
    kl = (left.exp() * (left - right)).sum(-1)
    place = following[:, None]
    agreement = reference.argmax(-1) == quantized.argmax(-1)
    columns = (kl, -left.gather(1, place)[:, 0], -right.gather(1, place)[:, 0], agreement.float())
    return torch.stack(columns).sum(-1, dtype=torch.float64).cpu()
