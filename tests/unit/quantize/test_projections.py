"""Projections and the fused matrix have the same numbers, whichever is computed from the other."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mptq.model.fused import Fusion
from mptq.quantize import quantizer
from mptq.quantize.projections import fused_members, member_pieces, quantized_members
from mptq.recipes.schemes import SCHEMES


@settings(max_examples=60)
@given(
    st.integers(1, 3),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.integers(1, 9),
    st.sampled_from(["block", "row", "tensor", "mx"]),
    st.sampled_from([1 << 10, 1 << 20]),
    st.integers(0, 99),
)
def test_the_fused_matrix_from_its_members(groups, widths, columns, kind, strip, seed):
    torch.manual_seed(seed)
    fusion = Fusion(groups, tuple(width * (128 if kind == "block" else 3) for width in widths))
    source, scheme = torch.randn(sum(fusion.rows), columns * 32), SCHEMES[kind]
    source[: len(source) // 3] *= 1e-3
    linear = SimpleNamespace(fusion=fusion, members=[(str(member), None) for member in range(len(widths))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(quantizer._STRIP, "cpu", strip)  # members are copied, or quantized in place
        amax = source.abs().amax() if kind == "tensor" else None
        members = quantized_members(member_pieces(source, linear, scheme), linear, scheme, "w", amax)
    found, error = fused_members(members, fusion, scheme)
    whole, measured = quantizer.quantize(source, scheme, "w")
    assert torch.equal(found.data.view(torch.uint8), whole.data.view(torch.uint8))
    assert torch.equal(found.scale, whole.scale)
    assert (found.amax is whole.amax is None) or torch.equal(found.amax, whole.amax)
    assert dataclasses.asdict(error) == pytest.approx(dataclasses.asdict(measured), rel=1e-12)


def test_errors_known_to_another_rank():
    fusion, scheme = Fusion(1, (128, 128)), SCHEMES["block"]
    members = [(quantizer.quantize(part, scheme, "w")[0], None) for part in torch.randn(2, 128, 64)]
    fused, error = fused_members(members, fusion, scheme)
    assert fused.data.shape == (256, 64)
    assert error is None


def test_no_error_at_all():
    fusion, scheme = Fusion(1, (128, 128)), SCHEMES["block"]
    source = torch.zeros(256, 64)
    members = [quantizer.quantize(part, scheme, "w") for part in source.split(128)]
    assert fused_members(members, fusion, scheme)[1] == quantizer.quantize(source, scheme, "w")[1]
