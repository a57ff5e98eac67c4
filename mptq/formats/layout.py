"""What an output of one format stores of a model: the names, dtypes and shapes of its tensors. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from mptq.model.config import ModelConfig
from mptq.model.source import Source
from mptq.model.tensors import (
    CORE_ATTENTION,
    LinearSpec,
    UnquantizedTensor,
    layer_copies,
    layer_linears,
    megatron_layer,
    outer_copies,
)
from mptq.recipes.assignment import Assignment
from mptq.recipes.schemes import Scheme
from mptq.types import TensorSpec

K_AND_V = ("key", "value")
"""A KV cache's two scales, of K and of V as attention computes with them (quantize/activation_quantizers.py)."""


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    """The tensors of an output, by the canonical names of what they are made from.

    `passthrough` are tensors outside of the model (multi-token prediction) that some format of the run stores as they are.
    """

    source: Source
    assignment: Assignment
    passthrough: tuple[UnquantizedTensor, ...] = ()

    splits: ClassVar[bool] = False
    """Whether the logical projections (q, k, v, gate, up) of a linear are stored each by itself, or Megatron's fused matrix."""
    takes_rows: ClassVar[bool] = False
    """Whether a large tensor outside the layers can be written some rows at a time."""

    @property
    def model(self) -> ModelConfig:
        """The model's config."""
        return self.source.model

    @abstractmethod
    def scheme(self, layer: int, linear: LinearSpec) -> Scheme | None:
        """How the output holds a linear, or None for one that keeps its precision."""

    @abstractmethod
    def linear(self, layer: int, linear: LinearSpec) -> tuple[TensorSpec, ...]:
        """The tensors of a linear: weights, scales and static input scales."""

    @abstractmethod
    def unquantized(self, tensor: UnquantizedTensor, layer: int | None = None) -> tuple[TensorSpec, ...]:
        """The tensors that one which keeps its precision becomes; `layer` is None outside the layers."""

    @abstractmethod
    def kv_cache(self, layer: int) -> tuple[TensorSpec, ...]:
        """The scales (or largest magnitudes) of a layer's FP8 KV cache."""

    def cached(self, layer: int) -> tuple[str, ...]:
        """What the scales of a layer's KV cache are of, k's and v's; nothing where it has none."""
        return K_AND_V if self.assignment.has_cache(layer) else ()

    def weights(self, layer: int, linear: LinearSpec) -> tuple[str, ...]:
        """Names of the quantized weights that the report has a row of."""
        return (canonical_weight(layer, linear),)

    @property
    def facts(self) -> dict[str, Any]:
        """What the manifest and the report say of the output beside its tensors."""
        return {}

    def dtype(self, layer: int, linear: LinearSpec) -> str:
        """The dtype of a linear's weight in the output."""
        scheme = self.scheme(layer, linear)
        return self.source.dtype(canonical_weight(layer, linear)) if scheme is None else "float8_e4m3fn"

    def by_canonical_name(self) -> Iterator[tuple[str, tuple[TensorSpec, ...]]]:
        """All tensors, in the order in which they are written; scales of a KV cache by the name of their attention."""
        before, after = outer_copies(self.model)
        for tensor in before:
            yield tensor.megatron, self.unquantized(tensor)
        for layer in range(self.model.num_layers):
            prefix = megatron_layer(layer)
            for tensor in layer_copies(self.model, layer):
                yield prefix + tensor.megatron, self.unquantized(tensor, layer)
            for linear in layer_linears(self.model, layer):
                yield canonical_weight(layer, linear), self.linear(layer, linear)
            if self.assignment.has_cache(layer):
                yield prefix + CORE_ATTENTION, self.kv_cache(layer)
        for tensor in (*after, *self.passthrough):
            yield tensor.megatron, self.unquantized(tensor)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """All tensors, in the order in which they are written."""
        return [spec for _, specs in self.by_canonical_name() for spec in specs]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs)


def canonical_weight(layer: int, linear: LinearSpec) -> str:
    """The canonical name of a linear's weight."""
    return f"{megatron_layer(layer)}{linear.megatron}.weight"
