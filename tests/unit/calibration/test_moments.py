"""Second moments of inputs in batches."""

import torch

from mptq.calibration.moments import moments, withheld
from mptq.distributed import Ranks

CPU = torch.device("cpu")


def of(inputs, batches):
    """Moments of inputs in batches."""
    return moments(dict(enumerate(inputs.chunk(batches))), batches, inputs.shape[1], CPU, Ranks())


def test_moments_are_sums_over_batches_of_which_every_eighth_is_withheld():
    inputs = torch.randn(1600, 24)
    found = of(inputs, 16)
    parts = inputs.double().chunk(16)
    held = [number for number in range(16) if withheld(number, 16)]
    assert held == [7, 15]
    assert found.tokens == 1400
    for moment, numbers in ((found.fitted, set(range(16)) - set(held)), (found.withheld, held)):
        assert torch.allclose(moment.double(), sum(parts[number].T @ parts[number] for number in numbers), rtol=1e-4, atol=1e-3)
    assert [number for number in range(3) if withheld(number, 3)] == [2]
    assert of(inputs, 1).withheld is None
    assert of(inputs, 1).tokens == 1600


def test_batches_without_tokens_count_nothing():
    found = moments({0: torch.ones(3, 2), 2: torch.ones(5, 2)}, 4, 2, CPU, Ranks())
    assert (found.tokens, float(found.fitted[0, 0]), float(found.withheld[0, 0])) == (8, 8.0, 0.0)
