"""Names, dtypes and shapes of the tensors that a format stores for a model. Does not import torch."""

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
"""The two scales of a KV cache: for K and V as attention uses them (quantize/activation_quantizers.py)."""


@dataclass(frozen=True, eq=False)
class Layout(ABC):
    """The tensors of an output, by the canonical names of the source tensors.

    `passthrough` are tensors outside the model (multi-token prediction) that at least one format of the run copies.
    """

    source: Source
    assignment: Assignment
    passthrough: tuple[UnquantizedTensor, ...] = ()

    splits: ClassVar[bool] = False
    """Whether linears are stored as separate projections (q, k, v, gate, up) instead of Megatron's fused matrices."""
    takes_rows: ClassVar[bool] = False
    """Whether a large tensor outside the layers can be written in row slices."""

    @property
    def model(self) -> ModelConfig:
        """The model's config."""
        return self.source.model

    def scheme(self, layer: int, linear: LinearSpec) -> Scheme | None:
        """The scheme in which the output stores a linear, or None for an unquantized one: by default the recipe's."""
        return self.assignment.scheme(layer, linear)

    @abstractmethod
    def linear(self, layer: int, linear: LinearSpec) -> tuple[TensorSpec, ...]:
        """The tensors of a linear: weights, scales and static input scales."""

    def unquantized(self, tensor: UnquantizedTensor, layer: int | None = None) -> tuple[TensorSpec, ...]:
        """The tensors that store an unquantized tensor, by default itself; `layer` is None outside the layers."""
        name = ("" if layer is None else megatron_layer(layer)) + tensor.megatron
        return (TensorSpec(name, self.source.dtype(name), tensor.shape),)

    @abstractmethod
    def kv_cache(self, layer: int) -> tuple[TensorSpec, ...]:
        """The scales (or amax) of a layer's FP8 KV cache."""

    def cached(self, layer: int) -> tuple[str, ...]:
        """What the K and V scales of a layer's KV cache apply to; empty without scales."""
        return K_AND_V if self.assignment.has_cache(layer) else ()

    def weights(self, layer: int, linear: LinearSpec) -> tuple[str, ...]:
        """Names of the quantized weights, one per row in the report."""
        return (canonical_weight(layer, linear),)

    @property
    def facts(self) -> dict[str, Any]:
        """Facts about the output, other than its tensors, for the manifest and the report."""
        return {}

    def dtype(self, layer: int, linear: LinearSpec) -> str:
        """The dtype of a linear's weight in the output."""
        scheme = self.scheme(layer, linear)
        return self.source.dtype(canonical_weight(layer, linear)) if scheme is None else "float8_e4m3fn"

    def by_canonical_name(self) -> Iterator[tuple[str, tuple[TensorSpec, ...]]]:
        """All tensors by source name, in write order; KV cache scales are listed under their core attention."""
        before, after = outer_copies(self.model)
        layers = [(layer_copies(self.model, layer), layer_linears(self.model, layer)) for layer in range(self.model.num_layers)]
        for tensor in before:
            yield tensor.megatron, self.unquantized(tensor)
        for layer, (copies, linears) in enumerate(layers):
            prefix = megatron_layer(layer)
            for tensor in copies:
                yield prefix + tensor.megatron, self.unquantized(tensor, layer)
            for linear in linears:
                yield canonical_weight(layer, linear), self.linear(layer, linear)
            if self.assignment.has_cache(layer):
                yield prefix + CORE_ATTENTION, self.kv_cache(layer)
        for tensor in (*after, *self.passthrough):
            yield tensor.megatron, self.unquantized(tensor)

    @cached_property
    def specs(self) -> list[TensorSpec]:
        """All tensors, in write order."""
        return [spec for _, specs in self.by_canonical_name() for spec in specs]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.nbytes for spec in self.specs)


def canonical_weight(layer: int, linear: LinearSpec) -> str:
    """The canonical name of a linear's weight."""
    return f"{megatron_layer(layer)}{linear.megatron}.weight"
