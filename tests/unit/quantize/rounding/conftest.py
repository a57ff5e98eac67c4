"""Weights, inputs that depend on each other, and references in a few lines of float64."""

import torch

from mptq.quantize import quantizer
from mptq.quantize.fp8 import element_scales


def correlated(tokens, width, seed=0):
    """Inputs [tokens, width] with a few strong directions, and columns of different sizes."""
    torch.manual_seed(seed)
    common = torch.randn(tokens, 4) @ torch.randn(4, width)
    return (torch.randn(tokens, width) + common) * torch.exp2(torch.linspace(-2, 2, width))


def e4m3(values, scale):
    """The nearest multiples of `scale` by E4M3 numbers."""
    return (values / scale).float().clamp(-448, 448).to(torch.float8_e4m3fn).to(values.dtype) * scale


def element_scale(weight, scheme):
    """The scale of each element with rounding to nearest."""
    made, _ = quantizer.quantize(weight, scheme, "w")
    return element_scales(made, scheme)


def loss(weight, rounded, moment):
    """Sum of squared errors of the outputs."""
    difference = (weight - rounded).double()
    return float(((difference @ moment.double()) * difference).sum())
