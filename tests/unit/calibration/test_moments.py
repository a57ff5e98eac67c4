"""Second moments of inputs in batches."""

import pytest
import torch

from mptq.calibration.linear_inputs import Inputs
from mptq.calibration.moments import MOST, Batches, moments, withheld
from mptq.distributed import Ranks

CPU = torch.device("cpu")


def of(inputs, batches):
    """Moments of inputs in batches."""
    rows = {number: Inputs(part) for number, part in enumerate(inputs.chunk(batches))}
    return moments(Batches(batches, inputs.shape[1], rows), CPU, Ranks())


def test_moments_are_sums_over_batches_of_which_every_eighth_is_withheld():
    inputs = torch.randn(1600, 24)
    found = of(inputs, 16)
    parts = inputs.double().chunk(16)
    held = [number for number in range(16) if withheld(number, 16)]
    assert held == [7, 15]
    assert found.tokens == 1400
    expected = sum(parts[number].T @ parts[number] for number in set(range(16)) - set(held))
    assert torch.allclose(found.fitted.double(), expected, rtol=1e-4, atol=1e-3)
    assert torch.equal(found.withheld.rows, torch.cat([inputs.chunk(16)[number] for number in held]))
    assert found.shift is found.residual is found.withheld.shift is None


@pytest.mark.parametrize(("batches", "held"), [(2, [1]), (3, [2]), (9, [7]), (32, [7, 15, 23, 31]), (100, [24, 49, 74, 99])])
def test_an_eighth_of_the_batches_is_withheld_but_only_a_few(batches, held):
    assert [number for number in range(batches) if withheld(number, batches)] == held
    assert len(held) <= MOST


def test_a_single_batch_serves_for_both():
    inputs = torch.randn(1600, 24)
    found = of(inputs, 1)
    assert found.tokens == 1600
    assert torch.equal(found.withheld.rows, inputs)


@pytest.mark.parametrize("added", [0, 5])
def test_both_streams_with_weights_for_their_tokens(added):
    torch.manual_seed(0)
    rows, other, weights = torch.randn(80, 24).bfloat16(), torch.randn(80, 24).bfloat16(), torch.rand(80, 1)
    stream, reference_stream = torch.randn(80, 5).bfloat16(), torch.randn(80, 5).bfloat16()
    mine, theirs = {}, {}
    for number, part in enumerate(torch.arange(80).chunk(4)):
        residuals = (stream[part], reference_stream[part]) if added else (None, None)
        mine[number] = Inputs(rows[part], weights[part] if added else None, residuals[0])
        theirs[number] = Inputs(other[part], None, residuals[1])
    found = moments(Batches(4, 24, mine, theirs, added), CPU, Ranks())
    weight = weights.double() if added else torch.ones(80, 1).double()
    x, shift, residual = (
        one.double() * weight for one in (rows, other.double() - rows.double(), reference_stream.double() - stream.double())
    )
    fitted, held = slice(60), slice(60, 80)
    assert torch.allclose(found.fitted.double(), x[fitted].T @ x[fitted], atol=1e-4)
    assert torch.allclose(found.shift.double(), shift[fitted].T @ x[fitted], atol=1e-4)
    assert torch.allclose(found.withheld.shift.double(), shift[held], atol=1e-5)
    if added:
        assert torch.allclose(found.residual.double(), residual[fitted].T @ x[fitted], atol=1e-4)
        assert torch.allclose(found.withheld.residual.double(), residual[held], atol=1e-5)
    else:
        assert found.residual is found.withheld.residual is None


def test_batches_without_tokens_count_nothing():
    rows = {0: Inputs(torch.ones(3, 2)), 2: Inputs(torch.ones(5, 2))}
    found = moments(Batches(4, 2, rows), CPU, Ranks())
    assert (found.tokens, float(found.fitted[0, 0]), len(found.withheld.rows)) == (8, 8.0, 0)
