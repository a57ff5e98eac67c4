"""The Megatron format: a torch_dist checkpoint that plain megatron-core and ModelOpt restore. No torch at import."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.checkpoint.index import open_checkpoint
from mptq.errors import RecipeError
from mptq.formats.megatron.layout import MegatronLayout
from mptq.formats.protocol import Format, OpenedOutput
from mptq.types import TensorSpec

if TYPE_CHECKING:
    import torch

    from mptq.formats.layout import Layout
    from mptq.formats.protocol import LoadedWeight, QuantizedLinear, Resumed, Stored, Writer, WriterOptions
    from mptq.model.tensors import LinearSpec, UnquantizedTensor
    from mptq.recipes.schemes import Scheme


class MegatronFormat(Format):
    """A file a unit, in the per-layer form of a model that ModelOpt compressed, with ModelOpt's state."""

    name = "megatron"
    label = short = "Megatron"
    layout = MegatronLayout
    input_scale = ".input_quantizer._amax"
    needs_modelopt = True

    def check(self, layout: Layout) -> None:
        """Raise RecipeError for a recipe that only converts: the checkpoint is Megatron's already."""
        recipe = layout.assignment.recipe
        if recipe.scheme is None:
            raise RecipeError(
                f"{recipe.name} converts to Hugging Face's form, and the checkpoint is Megatron's: use --format hf"
            )

    def warnings(self, layout: Layout) -> list[str]:
        """Scales of a KV cache that are not of what engines cache, because ModelOpt's quantizers see something else."""
        kinds, assignment = layout.model.kinds, layout.assignment
        if not any(kind.mixer == "mla" and assignment.has_cache(layer) for layer, kind in enumerate(kinds)):
            return []
        return [
            "the megatron output's cache scales are of decompressed K and V, which ModelOpt's quantizers see there: engines "
            "cache latents, whose scales only the hf output has"
        ]

    def store_linear(self, layout: Layout, linear: QuantizedLinear) -> Stored:
        """The fused matrix, with the state of its quantizers."""
        from mptq.formats.megatron import store

        assert isinstance(layout, MegatronLayout)
        return store.store_linear(layout, linear)

    def store_unquantized(
        self, _tensor: UnquantizedTensor, specs: Sequence[TensorSpec], values: torch.Tensor, _first: int
    ) -> Stored:
        """The tensor, or its parts."""
        from mptq.formats.megatron import store

        return store.store_unquantized(specs, values)

    def store_kv_cache(self, _layout: Layout, layer: int, amax: Sequence[torch.Tensor]) -> Stored:
        """The amax of ModelOpt's quantizers of K and V."""
        from mptq.formats.megatron import store

        return store.store_kv_cache(layer, amax)

    def store_rest(self, layout: Layout) -> Stored:
        """The training arguments."""
        from mptq.formats.megatron import store

        return store.store_rest(layout.source)

    def writer(self, layout: Layout, directory: Path, _options: WriterOptions, resumed: Resumed) -> Writer:
        """`iter_*` under `directory`."""
        from mptq.formats.megatron.store import rest_of_files
        from mptq.formats.megatron.writer import MegatronWriter

        assert isinstance(layout, MegatronLayout)
        iteration = layout.source.checkpoint.location.iteration
        return MegatronWriter(directory, iteration, partial(rest_of_files, layout), resumed.accounts)

    def open(self, directory: Path) -> OpenedOutput:
        """The checkpoint in `directory`."""
        checkpoint = open_checkpoint(directory)

        def load(name: str) -> torch.Tensor:
            import torch

            from mptq.checkpoint.reader import Reader

            spec = checkpoint.tensors[name].spec
            return Reader(checkpoint).read(name, torch.empty(spec.shape, dtype=getattr(torch, spec.dtype)))

        return OpenedOutput(self.name, directory, checkpoint.specs, load)

    def scales(
        self, canonical: str, weights: Sequence[Mapping[str, Any]], scheme: Scheme, _manifest: Mapping[str, Any]
    ) -> Iterator[TensorSpec]:
        """One tensor for all parts."""
        grid = scheme.grid(sum(weight["shape"][0] for weight in weights), weights[0]["shape"][1])
        yield TensorSpec(f"{canonical.removesuffix('weight')}weight_quantizer._scale", scheme.scale_dtype, grid)

    def load_linear(self, layout: Layout, output: OpenedOutput, layer: int, linear: LinearSpec) -> Iterator[LoadedWeight]:
        """The fused matrix."""
        from mptq.formats.megatron import store

        return store.load_linear(layout, output, layer, linear)

    def verify(self, output: OpenedOutput, _manifest: Mapping[str, Any]) -> Iterator[str]:
        """ModelOpt's magnitudes beside the scales are theirs: it restores by either."""
        from mptq.formats.megatron import store

        return store.check_magnitudes(output)


MEGATRON = MegatronFormat()
