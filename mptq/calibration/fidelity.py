"""How far the quantized stream is from the reference: hidden states of each layer, and next-token distributions."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch

_LARGEST = math.log(sys.float_info.max)
"""The exponential of anything larger overflows a float."""


@dataclass
class Deviation:
    """Relative error and cosine of hidden states against the reference.

    Keeps float64 sums for each batch. These are added exactly, so the order of batches does not matter.
    """

    batches: list[tuple[float, float, float, float]] = field(default_factory=list)
    tokens: list[tuple[float, int]] = field(default_factory=list)

    def add(self, reference: torch.Tensor, quantized: torch.Tensor) -> None:
        """Adds a batch: the hidden states of the same tokens in both streams, of the same shape."""
        left, right = reference.float(), quantized.float()
        products = (left - right).square(), left.square(), right.square(), left * right
        noise, signal, other, product = (float(part.sum(dtype=torch.float64)) for part in products)
        self.batches.append((noise, signal, other, product))
        self.tokens.append((token_error(left, right), left.shape[:-1].numel()))

    def join(self, others: Iterable[Deviation]) -> None:
        """Adds the batches of `others`."""
        for other in others:
            self.batches += other.batches
            self.tokens += other.tokens

    @property
    def finite(self) -> bool:
        """Whether all sums are finite."""
        return all(math.isfinite(part) for batch in self.batches for part in batch)

    @property
    def relative_error(self) -> float:
        """Norm of the difference divided by the norm of the reference; 0 if the latter is 0."""
        noise, signal, _, _ = self._sums()
        return math.sqrt(noise / signal) if signal else 0.0

    @property
    def token_error(self) -> float:
        """Root mean square over tokens of the error relative to the token's own norm."""
        return math.sqrt(math.fsum(error for error, _ in self.tokens) / sum(count for _, count in self.tokens))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between the two, with all tokens as one vector."""
        _, signal, other, product = self._sums()
        norms = math.sqrt(signal * other)
        return product / norms if norms else 1.0

    def _sums(self) -> list[float]:
        return [math.fsum(batch[column] for batch in self.batches) for column in range(4)]


def token_error(reference: torch.Tensor, other: torch.Tensor) -> float:
    """Returns the sum over tokens of the squared error of hidden states [..., hidden], each relative to its own norm."""
    left = reference.float()
    errors, norms = (left - other.float()).square().sum(-1), left.square().sum(-1)
    return float(torch.where(norms > 0, errors / norms, 0.0).sum(dtype=torch.float64))


@dataclass
class Mean:
    """Mean over tokens, with the standard error estimated from the spread over sequences.

    The tokens of a sequence are not independent, so each sequence is one observation: the error is that of a ratio of
    sums (Cochran, Sampling Techniques, section 6.4), sqrt(sum over sequences of (sum - mean * count)^2 * n / (n - 1)) /
    total count. None for a single sequence.
    """

    sums: list[float] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def add(self, total: float, count: int) -> None:
        """Adds a sequence: the sum of its values, and their number."""
        self.sums.append(total)
        self.counts.append(count)

    @property
    def mean(self) -> float:
        """Sum of all values divided by their number."""
        return math.fsum(self.sums) / sum(self.counts)

    @property
    def standard_error(self) -> float | None:
        """Standard error of the mean; None for fewer than two sequences."""
        number = len(self.sums)
        if number < 2:
            return None
        spread = math.fsum((total - self.mean * count) ** 2 for total, count in zip(self.sums, self.counts, strict=True))
        return math.sqrt(spread * number / (number - 1)) / sum(self.counts)


@dataclass
class NextTokens:
    """Next-token distributions of both streams, sequence by sequence, over the positions that have a next token.

    `kl` is the divergence of the quantized from the reference distribution, KL(reference || quantized), in nats.
    `reference` and `quantized` are the negative log likelihoods of the next token in nats, `rise` their difference,
    quantized minus reference, and `agreement` the share of positions where both streams have the same most likely
    token.
    """

    kl: Mean = field(default_factory=Mean)
    reference: Mean = field(default_factory=Mean)
    quantized: Mean = field(default_factory=Mean)
    rise: Mean = field(default_factory=Mean)
    agreement: Mean = field(default_factory=Mean)

    def add(self, sequence: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> None:
        """Adds a sequence in pieces: float32 logits of both [tokens, vocabulary], next token ids int64 [tokens]."""
        sums = torch.zeros(4, dtype=torch.float64)
        count = 0
        for reference, quantized, following in sequence:
            sums += _sums(reference, quantized, following)
            count += len(following)
        for mean, total in zip((self.kl, self.reference, self.quantized, self.agreement), sums.tolist(), strict=True):
            mean.add(total, count)
        self.rise.add(float(sums[2] - sums[1]), count)

    def join(self, others: Iterable[NextTokens]) -> None:
        """Adds the sequences of `others`."""
        for other in others:
            for mine, more in ((getattr(self, name), getattr(other, name)) for name in vars(self)):
                mine.sums += more.sums
                mine.counts += more.counts

    def __bool__(self) -> bool:
        return bool(self.kl.sums)

    @property
    def finite(self) -> bool:
        """Whether all figures are finite: no mean is NaN (which fails the comparison), and no perplexity overflows."""
        return all(mean.mean < _LARGEST for mean in (self.kl, self.reference, self.quantized))

    @property
    def document(self) -> dict[str, Any]:
        """The report's `fidelity`, as plain data. Requires that the figures are `finite`."""
        ratio = math.exp(self.rise.mean)
        error = self.rise.standard_error
        return {
            "tokens": sum(self.kl.counts),
            "sequences": len(self.kl.counts),
            "kl": {"mean": self.kl.mean, "standard_error": self.kl.standard_error},
            "kl_of_sequences": [total / count for total, count in zip(self.kl.sums, self.kl.counts, strict=True)],
            "perplexity": {
                "reference": math.exp(self.reference.mean),
                "quantized": math.exp(self.quantized.mean),
                "ratio": ratio,
                "ratio_standard_error": None if error is None else ratio * error,
            },
            "top1_agreement": {"mean": self.agreement.mean, "standard_error": self.agreement.standard_error},
        }


def _sums(reference: torch.Tensor, quantized: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Returns KL divergence, both negative log likelihoods and agreement, each summed over tokens: float64 [4]."""
    left, right = reference.log_softmax(-1), quantized.log_softmax(-1)
    kl = (left.exp() * (left - right)).sum(-1)
    place = following[:, None]
    agreement = reference.argmax(-1) == quantized.argmax(-1)
    columns = (kl, -left.gather(1, place)[:, 0], -right.gather(1, place)[:, 0], agreement.float())
    return torch.stack(columns).sum(-1, dtype=torch.float64).cpu()
