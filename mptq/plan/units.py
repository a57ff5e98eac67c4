"""The units of a run: what is read, written and committed together. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import overload

from mptq.model.config import ModelConfig
from mptq.model.tensors import LAYERS, UnquantizedTensor, outer_copies


class UnitKind(Enum):
    """What a unit consists of."""

    BEFORE = "embedding"
    LAYER = "layer"
    AFTER = "output layer"
    PASSTHROUGH = "passthrough"


@dataclass(frozen=True, slots=True)
class Unit:
    """The tensors before the layers, one layer, the tensors after the layers, or one tensor that is passed through.

    `number` is the position in the order of the run, and identifies the unit in the journal and in names of Megatron
    files. `layer` is the number of a layer, from 0.
    """

    number: int
    kind: UnitKind
    layer: int | None = None

    @property
    def hands_on(self) -> bool:
        """Whether it produces hidden states, the input of the next unit."""
        return self.kind in (UnitKind.BEFORE, UnitKind.LAYER)

    @property
    def flows(self) -> bool:
        """Whether hidden states pass through it: all ranks then work on it together."""
        return self.kind is not UnitKind.PASSTHROUGH

    def __str__(self) -> str:
        return f"layer {self.layer}" if self.kind is UnitKind.LAYER else self.kind.value


@dataclass(frozen=True, eq=False)
class Units(Sequence[Unit]):
    """The units of a run, in order."""

    model: ModelConfig
    passthrough: tuple[UnquantizedTensor, ...] = ()

    @cached_property
    def _units(self) -> tuple[Unit, ...]:
        layers = [(UnitKind.LAYER, layer) for layer in range(self.model.num_layers)]
        kinds = [(UnitKind.BEFORE, None), *layers, (UnitKind.AFTER, None)]
        kinds += [(UnitKind.PASSTHROUGH, None)] * len(self.passthrough)
        return tuple(Unit(number, kind, layer) for number, (kind, layer) in enumerate(kinds))

    def __len__(self) -> int:
        return len(self._units)

    @overload
    def __getitem__(self, number: int) -> Unit: ...
    @overload
    def __getitem__(self, number: slice) -> tuple[Unit, ...]: ...
    def __getitem__(self, number: int | slice) -> Unit | tuple[Unit, ...]:
        return self._units[number]

    def tensors(self, unit: Unit) -> tuple[UnquantizedTensor, ...]:
        """Returns the tensors of a unit outside the layers."""
        before, after = outer_copies(self.model)
        if unit.kind is UnitKind.PASSTHROUGH:
            return (self.passthrough[unit.number - self._after.number - 1],)
        return {UnitKind.BEFORE: before, UnitKind.AFTER: after}[unit.kind]

    def of(self, name: str) -> Unit:
        """Returns the unit of a tensor, by its canonical name."""
        if name.startswith(LAYERS):
            return self._layers[int(name.removeprefix(LAYERS).partition(".")[0])]
        return self._outer[name]

    @cached_property
    def _after(self) -> Unit:
        return next(unit for unit in self._units if unit.kind is UnitKind.AFTER)

    @cached_property
    def _layers(self) -> dict[int, Unit]:
        return {unit.layer: unit for unit in self._units if unit.layer is not None}

    @cached_property
    def _outer(self) -> dict[str, Unit]:
        return {tensor.megatron: unit for unit in self._units if unit.layer is None for tensor in self.tensors(unit)}
