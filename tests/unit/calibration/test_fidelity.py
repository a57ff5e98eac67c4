"""Fidelity figures against torch's own losses in float64, and against their formulas written out."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, kl_div

from mptq.calibration.fidelity import Deviation, Mean, NextTokens

VOCABULARY = 300


@pytest.fixture(scope="module")
def sequences():
    """Logits of both models and the tokens that follow, of sequences of different lengths."""
    torch.manual_seed(0)
    found = []
    for length in (1, 40, 17, 64):
        reference = torch.randn(length, VOCABULARY) * 4
        quantized = reference + torch.randn(length, VOCABULARY) * 0.5
        found.append((reference, quantized, torch.randint(0, VOCABULARY, (length,))))
    return found


def measured(sequences, size=1000):
    found = NextTokens()
    for parts in sequences:
        found.add(zip(*(part.split(size) for part in parts), strict=True))
    return found.document


def test_figures_equal_torch_losses_in_float64(sequences):
    found = measured(sequences)
    reference, quantized, following = (torch.cat(parts) for parts in zip(*sequences, strict=True))
    reference, quantized = reference.double(), quantized.double()
    kl = kl_div(quantized.log_softmax(-1), reference.log_softmax(-1), reduction="batchmean", log_target=True)
    losses = [float(cross_entropy(logits, following)) for logits in (reference, quantized)]
    # Float32 logarithms of sums of 300 terms: a few 2^-24 of values up to 30, averaged.
    assert found["kl"]["mean"] == pytest.approx(float(kl), rel=1e-5)
    assert found["perplexity"]["reference"] == pytest.approx(math.exp(losses[0]), rel=1e-5)
    assert found["perplexity"]["quantized"] == pytest.approx(math.exp(losses[1]), rel=1e-5)
    assert found["perplexity"]["ratio"] == pytest.approx(math.exp(losses[1] - losses[0]), rel=1e-5)
    agreement = (reference.argmax(-1) == quantized.argmax(-1)).double().mean()
    assert 0 < agreement < 1
    assert found["top1_agreement"]["mean"] == float(agreement)
    assert (found["tokens"], found["sequences"]) == (122, 4)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_figures_do_not_depend_on_the_size_of_pieces(sequences, size):
    whole, parts = measured(sequences), measured(sequences, size)
    assert parts.keys() == whole.keys()
    for name in ("kl", "perplexity", "top1_agreement"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-12)


def test_standard_errors_are_over_sequences(sequences):
    found = measured(sequences)
    reference, quantized = ([cross_entropy(part[i].double(), part[2], reduction="none") for part in sequences] for i in (0, 1))
    rises = [right - left for left, right in zip(reference, quantized, strict=True)]
    mean = float(torch.cat(rises).mean())
    spread = sum(float((rise - mean).sum()) ** 2 for rise in rises)
    error = math.sqrt(spread * 4 / 3) / 122
    # The derivative of exp is exp.
    assert found["perplexity"]["ratio_standard_error"] == pytest.approx(math.exp(mean) * error, rel=1e-4)
    assert found["kl"]["standard_error"] > 0
    assert found["top1_agreement"]["standard_error"] > 0


def test_a_model_compared_with_itself(sequences):
    found = measured([(reference, reference.clone(), following) for reference, _, following in sequences])
    assert found["kl"] == {"mean": 0, "standard_error": 0}
    assert found["perplexity"]["ratio"] == 1
    assert found["perplexity"]["ratio_standard_error"] == 0
    assert found["perplexity"]["reference"] == found["perplexity"]["quantized"]
    assert found["top1_agreement"] == {"mean": 1, "standard_error": 0}


@pytest.mark.parametrize(("factor", "finite"), [(1.0, True), (1e6, False), (float("inf"), False)])
def test_figures_that_are_not_finite_are_detected(sequences, factor, finite):
    found = NextTokens()
    for reference, quantized, following in sequences:
        found.add([(reference, quantized * factor, following)])
    assert found.finite == finite


def test_the_mean_is_that_of_sequences_weighted_by_length(sequences):
    found = measured(sequences)
    lengths = [len(following) for _, _, following in sequences]
    own = found["kl_of_sequences"]
    assert len(own) == len(sequences)
    assert found["kl"]["mean"] == pytest.approx(np.average(own, weights=lengths), rel=1e-12)


def test_one_sequence_has_no_standard_error(sequences):
    found = measured(sequences[1:2])
    assert found["kl"]["standard_error"] is None
    assert found["perplexity"]["ratio_standard_error"] is None
    assert found["top1_agreement"]["standard_error"] is None


def test_mean_and_standard_error_follow_their_formulas():
    rng = np.random.default_rng(0)
    values = [
        rng.normal(loc=shift, size=count) for shift, count in zip(rng.normal(size=60), rng.integers(5, 50, 60), strict=True)
    ]
    mean = Mean()
    for sequence in values:
        mean.add(float(sequence.sum()), len(sequence))
    totals, counts = np.array([part.sum() for part in values]), np.array([len(part) for part in values])
    ratio = totals.sum() / counts.sum()
    error = math.sqrt(((totals - ratio * counts) ** 2).sum() * 60 / 59) / counts.sum()
    assert mean.mean == pytest.approx(np.concatenate(values).mean(), rel=1e-12)
    assert mean.standard_error == pytest.approx(error, rel=1e-12)
    # Bootstrap over sequences. 4000 draws give a standard deviation within 1 %; the formula is exact to first order.
    drawn = rng.integers(0, 60, (4000, 60))
    assert mean.standard_error == pytest.approx((totals[drawn].sum(1) / counts[drawn].sum(1)).std(), rel=0.1)
    # Treating tokens as independent would halve it here.
    assert mean.standard_error > 1.5 * np.concatenate(values).std() / math.sqrt(counts.sum())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_deviation_equals_numpy_in_float64(dtype):
    torch.manual_seed(0)
    reference = (torch.randn(70, 33) * torch.randn(70, 1).exp()).to(dtype)
    quantized = (reference.float() + torch.randn(70, 33) / 5).to(dtype)
    deviation = Deviation()
    for left, right in zip(reference.split(20), quantized.split(20), strict=True):
        deviation.add(left, right)
    left, right = reference.double().numpy().ravel(), quantized.double().numpy().ravel()
    assert deviation.relative_error == pytest.approx(np.linalg.norm(right - left) / np.linalg.norm(left), rel=1e-6)
    assert deviation.cosine == pytest.approx(left @ right / np.linalg.norm(left) / np.linalg.norm(right), rel=1e-6)


def test_deviation_of_equal_and_of_zero_states():
    states = torch.randn(5, 7)
    deviation = Deviation()
    assert (deviation.relative_error, deviation.cosine) == (0, 1)
    deviation.add(states, states)
    assert deviation.relative_error == 0
    assert deviation.cosine == pytest.approx(1, rel=1e-12)
