"""What an output format is: a folder here with a subclass of `Format`, and a row in `FORMATS` (formats/__init__.py).

No torch at import: planning, `--dry-run` and `inspect` use the layout alone.
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
    from mptq.quantize.projections import Quantized
    from mptq.recipes.schemes import Scheme
    from mptq.types import LayerOutput, TensorSpec


@dataclass(frozen=True, slots=True)
class Stored:
    """What a format stores: tensors in CPU memory, and byte items, by name."""

    tensors: Mapping[str, torch.Tensor]
    blobs: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class QuantizedLinear:
    """A linear on its way into a format.

    `source` is Megatron's fused weight [out, in]. `weights` are the quantized projections or the one fused matrix, as the
    layout splits it; None where the format keeps its precision. `input_amax` is float32 [], None without a static scale.
    """

    layer: int
    spec: LinearSpec
    source: torch.Tensor
    weights: Quantized | None
    input_amax: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class WriterOptions:
    """How an output is written: the largest file, the tokenizer to copy, and the ids with which generation begins and ends."""

    max_shard_bytes: int
    tokenizer: Path | None
    generation: Generation


@dataclass(frozen=True, slots=True)
class Resumed:
    """What an earlier run has written: names of tensors, and the writer's accounts by unit."""

    names: frozenset[str] = frozenset()
    accounts: Mapping[int, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OpenedOutput:
    """The files of one format of a complete output: what they hold, and how to load a tensor of it."""

    format: str
    directory: Path
    specs: Mapping[str, TensorSpec]
    load: Callable[[str], torch.Tensor]


@dataclass(frozen=True, slots=True)
class LoadedWeight:
    """A weight as a format stores it, under `name`; `scale` is None where it is not quantized."""

    name: str
    data: torch.Tensor
    scale: torch.Tensor | None


class Writer(ABC):
    """Writes the files of one format, unit by unit; several processes may write different units of the same output."""

    @property
    @abstractmethod
    def complete(self) -> list[Path]:
        """The files that an earlier run has completed."""

    @abstractmethod
    def write(self, output: LayerOutput) -> list[Path]:
        """Write tensors; the last of a unit's waits until they are on the disk. Returns the files that are complete now."""

    @abstractmethod
    def finish(self) -> Sequence[Path]:
        """Write what belongs to the whole (metadata, configs); return all files."""

    def prepare(self) -> None:
        """Make the files that several processes write."""

    def prepared(self) -> None:
        """They are made."""

    def account(self) -> Any:
        """What the journal must know of the unit that was written last, as plain data."""
        return None

    def join(self, accounts: Mapping[int, Any]) -> None:
        """All units are written, with these accounts, by whatever process."""

    def abort(self) -> None:
        """Close open files."""


class Format(ABC):
    """One output format. Methods that take tensors import torch; none keeps state."""

    name: ClassVar[str]
    """What `--format` and the manifest call it, and its directory in an output of several formats."""
    label: ClassVar[str]
    """For people; `short` where there is little room."""
    short: ClassVar[str]
    layout: ClassVar[type[Layout]]
    """What it stores of a model."""
    has_tokenizer: ClassVar[bool] = False
    """Whether it holds the tokenizer, and the ids with which generation begins and ends."""
    is_sharded: ClassVar[bool] = False
    """Whether its files are at most of the size that the user says."""
    input_scale: ClassVar[str] = ""
    """How the names of the calibrated scales (or largest magnitudes) of inputs end; "" where it has none."""
    needs_modelopt: ClassVar[bool] = False
    """Whether writing it imports megatron-core and ModelOpt."""

    def check(self, layout: Layout) -> None:
        """Raise RecipeError or UnsupportedModelError where the format cannot hold the model as the recipe says."""

    def warnings(self, _layout: Layout) -> list[str]:
        """What the user of the output should know before starting."""
        return []

    @abstractmethod
    def store_linear(self, layout: Layout, linear: QuantizedLinear) -> Stored:
        """What the format stores of a linear, quantized or as it is."""

    @abstractmethod
    def store_unquantized(
        self, tensor: UnquantizedTensor, specs: Sequence[TensorSpec], values: torch.Tensor, first: int
    ) -> Stored:
        """What it stores, as `specs`, of a tensor that keeps its precision; `values` are its rows from `first` on."""

    @abstractmethod
    def store_kv_cache(self, layout: Layout, layer: int, amax: Sequence[torch.Tensor]) -> Stored:
        """What it stores of a layer's KV cache, whose largest magnitudes float32 [] are `amax`, in the order of `cached`."""

    def store_rest(self, _layout: Layout) -> Stored:
        """What it stores beside the model's tensors."""
        return Stored({})

    @abstractmethod
    def writer(self, layout: Layout, directory: Path, options: WriterOptions, resumed: Resumed) -> Writer:
        """The writer of an output in `directory`."""

    @abstractmethod
    def open(self, directory: Path) -> OpenedOutput:
        """The output in `directory`; raises CheckpointError for files that are not whole."""

    @abstractmethod
    def scales(
        self, canonical: str, weights: Sequence[Mapping[str, Any]], scheme: Scheme, manifest: Mapping[str, Any]
    ) -> Iterator[TensorSpec]:
        """The scales that the weights of one linear (items of the manifest) must have."""

    @abstractmethod
    def load_linear(self, layout: Layout, output: OpenedOutput, layer: int, linear: LinearSpec) -> Iterator[LoadedWeight]:
        """The stored weights of a linear, projections or the fused matrix, in their order."""

    def lacks(self, _canonical: str) -> bool:
        """Whether the format has nothing of a tensor of the source, by its canonical name."""
        return False

    def verify(self, _output: OpenedOutput, _manifest: Mapping[str, Any]) -> Iterator[str]:
        """What is wrong with the files beside their tensors (configs, index), a line each."""
        return iter(())
