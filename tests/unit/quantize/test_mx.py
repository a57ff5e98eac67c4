import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from modelopt.torch.quantization.qtensor import MXFP8QTensor

from mptq.quantize import mx, quantizer
from mptq.recipes.schemes import SCHEMES
from tests.support import reference


def quantize(weight):
    return quantizer.quantize(weight, SCHEMES["mx"], "w")[0]


@st.composite
def weights(draw):
    """Float32 matrices of many magnitudes, with powers of two, ties, zeros of both signs and all-zero blocks."""
    rows, columns = draw(st.integers(1, 5)), 32 * draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    weight = torch.randn(rows, columns) * 2.0 ** draw(st.integers(-140, 100))
    if draw(st.booleans()):
        weight = torch.exp2(torch.randint(-20, 20, (rows, columns)).float()) * (torch.randint(0, 33, (rows, columns)) / 16)
        weight *= torch.randint(0, 2, (rows, columns)) * 2 - 1
    if draw(st.booleans()):
        weight[0, :32] = 0
    return weight


@settings(max_examples=80)
@given(weights())
def test_equals_a_reference_in_exact_fractions(weight):
    found = quantize(weight)
    data, scale = reference.mx(weight)
    assert torch.equal(found.scale, scale)
    assert torch.equal(found.data.view(torch.uint8), data)


def test_no_element_saturates_at_the_edge_of_an_exponent():
    for amax, byte in (
        (448.0, 127),
        (448.0001, 128),
        (896.0, 128),
        (2.0**-133, 88),
        (3.4e38, 247),
        (1e-45, 88),
        (448 * 2.0**-38.5, 89),
    ):
        weight = torch.full((1, 32), amax)
        assert mx.scales(weight).item() == byte, amax
        assert (quantize(weight).data.float().abs() <= 448).all()
    assert mx.scales(torch.zeros(2, 64)).tolist() == [[127, 127]] * 2


@settings(max_examples=40)
@given(st.integers(1, 300), st.integers(1, 8), st.integers(0, 2**31))
def test_equals_modelopts_tensor_away_from_the_edges(rows, columns, seed):
    torch.manual_seed(seed)
    weight = torch.randn(rows, columns * 32)
    theirs, scale = MXFP8QTensor.quantize(weight)
    ours = quantize(weight)
    edge = mx.scales(weight) != scale  # ModelOpt computes the exponent with a rounded logarithm
    assert edge.float().mean() < 1e-2
    same = ~edge.repeat_interleave(32, 1)
    assert torch.equal(ours.data.view(torch.uint8)[same], theirs._quantized_data.view(torch.uint8)[same])
