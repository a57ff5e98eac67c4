"""Builds the outputs of a unit from what each format stores."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mptq.formats import FORMATS
from mptq.types import LayerOutput

if TYPE_CHECKING:
    import torch

    from mptq.formats.protocol import Stored
    from mptq.model.tensors import UnquantizedTensor
    from mptq.plan.plan import Plan
    from mptq.plan.units import Unit


def empty(plan: Plan, unit: Unit, first: int = 0, *, last: bool = False) -> LayerOutput:
    """Returns an output of a unit, without tensors."""
    return LayerOutput(unit.number, {form: {} for form in plan.formats}, {form: {} for form in plan.formats}, last, first)


def add(output: LayerOutput, form: str, stored: Stored) -> None:
    """Adds what a format stores."""
    output.tensors[form] |= stored.tensors
    output.blobs[form] |= stored.blobs


def store_unquantized(
    plan: Plan, output: LayerOutput, tensor: UnquantizedTensor, values: torch.Tensor, layer: int | None = None
) -> None:
    """Adds what each format stores of an unquantized tensor; `values` are its rows from `output.first` on."""
    for form, layout in plan.layouts.items():
        specs = layout.unquantized(tensor, layer)
        add(output, form, FORMATS[form].store_unquantized(tensor, specs, values, output.first))
