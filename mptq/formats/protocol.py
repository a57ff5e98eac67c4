"""The interface of an output format: a package here with a `Format` subclass, listed in `FORMATS` (__init__.py).

Importing it does not import torch: planning, `--dry-run` and `inspect` use only the layout.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import torch

    from mptq.formats.layout import Layout
    from mptq.model.generation import Generation
    from mptq.model.tensors import LinearSpec, UnquantizedTensor
    from mptq.quantize.compressed_linears import Compressed
    from mptq.recipes.schemes import Scheme
    from mptq.types import LayerOutput, TensorSpec


@dataclass(frozen=True, slots=True)
class Stored:
    """Tensors (in CPU memory) and byte items to store, by name."""

    tensors: Mapping[str, torch.Tensor]
    blobs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A linear to store.

    `source` is Megatron's fused weight [out, in]. `weights` are the compressed projections, or the fused matrix if the layout
    does not split it; None if the format does not quantize it. `modules` are ModelOpt's, in the same order, also if they
    are left alone. `input_amax` is float32 [], None without a static scale.
    """

    layer: int
    spec: LinearSpec
    source: torch.Tensor
    weights: Sequence[Compressed] | None
    modules: Sequence[Any] = ()
    input_amax: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class QuantizedCache:
    """The KV cache of a layer to store: float32 [] amax, in the order of `Layout.cached`, and its core attention.

    `attention` is ModelOpt's module, whose quantizers have been calibrated.
    """

    layer: int
    amax: Sequence[torch.Tensor]
    attention: Any


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How to write an output: maximum file size in bytes, tokenizer to copy, and generation settings (bos/eos ids)."""

    max_shard_bytes: int
    tokenizer: Path | None
    generation: Generation


@dataclass(frozen=True, slots=True)
class Resumed:
    """What an earlier run has written: tensor names, and the writer's accounts by unit."""

    names: frozenset[str] = frozenset()
    accounts: Mapping[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenedOutput:
    """The files of one format of a complete output: their tensor specs, and a function that loads a tensor."""

    format: str
    directory: Path
    specs: Mapping[str, TensorSpec]
    load: Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """A weight as stored under `name`; `scale` is None if it is not quantized."""

    name: str
    data: torch.Tensor
    scale: torch.Tensor | None


class Writer(ABC):
    """Writes the files of one format, unit by unit; several processes may write different units of one output."""

    @property
    @abstractmethod
    def complete(self) -> list[Path]:
        """The files that an earlier run completed."""

    @abstractmethod
    def write(self, output: LayerOutput) -> list[Path]:
        """Writes tensors and returns the files that are now complete.

        After the last tensors of a unit, waits until all of it is on disk.
        """

    @abstractmethod
    def finish(self) -> Sequence[Path]:
        """Writes the files of the whole output (metadata, configs) and returns all files."""

    def prepare(self) -> None:
        """Creates the files that several processes write."""

    def prepared(self) -> None:
        """Called in processes for which another process has run `prepare`."""

    def account(self) -> Any:
        """The data of the last written unit that the journal must keep, as JSON-compatible data."""
        return None

    def join(self, accounts: Mapping[int, Any]) -> None:
        """Called with the accounts of all units once all processes have written theirs."""

    def abort(self) -> None:
        """Closes open files."""


class Format(ABC):
    """An output format. Stateless; only methods that handle tensors import torch."""

    name: ClassVar[str]
    """Name in `--format` and the manifest, and the subdirectory in an output of several formats."""
    label: ClassVar[str]
    """Display name; `short` is used in narrow tables."""
    short: ClassVar[str]
    layout: ClassVar[type[Layout]]
    """The tensors that it stores for a model."""
    has_tokenizer: ClassVar[bool] = False
    """Whether it includes the tokenizer and the generation settings."""
    is_sharded: ClassVar[bool] = False
    """Whether `--max-shard-size` limits its files."""
    input_scale: ClassVar[str] = ""
    """Name suffix of static input scales (or input amax); "" if it has none."""

    def check(self, layout: Layout) -> None:
        """Raises RecipeError or UnsupportedModelError if the format cannot store the model with this recipe."""

    def warnings(self, _layout: Layout) -> list[str]:
        """Returns warnings to show before a run starts."""
        return []

    @abstractmethod
    def store_linear(self, layout: Layout, linear: QuantizedLinear) -> Stored:
        """Returns what the format stores for a linear, quantized or not."""

    def store_unquantized(
        self, _tensor: UnquantizedTensor, specs: Sequence[TensorSpec], values: torch.Tensor, _first: int
    ) -> Stored:
        """Returns what it stores, as `specs`, for an unquantized tensor; `values` are its rows from `first` on.

        By default these are all rows, divided among the specs.
        """
        parts = values.split([spec.shape[0] for spec in specs])
        return Stored({spec.name: part for spec, part in zip(specs, parts, strict=True)})

    @abstractmethod
    def store_kv_cache(self, layout: Layout, cache: QuantizedCache) -> Stored:
        """Returns what it stores for the scales of a layer's KV cache."""

    def store_rest(self, _layout: Layout) -> Stored:
        """Returns what it stores in addition to the model's tensors."""
        return Stored({})

    @abstractmethod
    def writer(self, layout: Layout, directory: Path, options: WriterOptions, resumed: Resumed) -> Writer:
        """Returns a writer for an output in `directory`."""

    @abstractmethod
    def open(self, directory: Path) -> OpenedOutput:
        """Opens the output in `directory`; raises CheckpointError for invalid files."""

    @abstractmethod
    def scales(
        self, canonical: str, weights: Sequence[Mapping[str, Any]], scheme: Scheme, manifest: Mapping[str, Any]
    ) -> Iterator[TensorSpec]:
        """Yields the scale tensors that the weights of one linear (items of the manifest) must have."""

    @abstractmethod
    def load_linear(self, layout: Layout, output: OpenedOutput, layer: int, linear: LinearSpec) -> Iterator[LoadedWeight]:
        """Yields the stored weights of a linear: its projections in order, or the fused matrix."""

    def lacks(self, _canonical: str) -> bool:
        """Whether the format omits a source tensor, given by its canonical name."""
        return False

    def verify(self, _output: OpenedOutput, _manifest: Mapping[str, Any]) -> Iterator[str]:
        """Yields a line for each problem in the files other than tensors (configs, index)."""
        return iter(())
