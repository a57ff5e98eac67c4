"""The Megatron format: a torch_dist checkpoint for megatron-core with ModelOpt. Importing it does not import torch."""

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
    from mptq.formats.protocol import LoadedWeight, QuantizedCache, QuantizedLinear, Resumed, Stored, Writer, WriterOptions
    from mptq.model.tensors import LinearSpec
    from mptq.recipes.schemes import Scheme


class MegatronFormat(Format):
    """Writes one file per unit, with the tensors and state of a model that ModelOpt compressed."""

    name = "megatron"
    label = short = "Megatron"
    layout = MegatronLayout
    input_scale = ".input_quantizer._amax"

    def check(self, layout: Layout) -> None:
        """Raises RecipeError for a recipe that only converts: the checkpoint is already in Megatron format."""
        recipe = layout.assignment.recipe
        if recipe.scheme is None:
            raise RecipeError(
                f"{recipe.name} converts to Hugging Face, but the checkpoint is already in Megatron format: use --format hf"
            )

    def warnings(self, layout: Layout) -> list[str]:
        """Warns if ModelOpt's KV cache quantizers apply to other tensors than the ones that engines cache."""
        kinds, assignment = layout.model.kinds, layout.assignment
        if not any(kind.mixer == "mla" and assignment.has_cache(layer) for layer, kind in enumerate(kinds)):
            return []
        return [
            "KV cache scales in the megatron output are for decompressed K and V, which ModelOpt quantizes: engines cache "
            "latents, whose scales are only in the hf output"
        ]

    def store_linear(self, layout: Layout, linear: QuantizedLinear) -> Stored:
        """Returns the fused matrix, with the state of its quantizers."""
        from mptq.formats.megatron import store

        assert isinstance(layout, MegatronLayout)
        return store.store_linear(layout, linear)

    def store_kv_cache(self, _layout: Layout, cache: QuantizedCache) -> Stored:
        """Returns the amax of ModelOpt's K and V quantizers."""
        from mptq.formats.megatron import store

        return store.store_kv_cache(cache)

    def store_rest(self, layout: Layout) -> Stored:
        """Returns the training arguments."""
        from mptq.formats.megatron import store

        return store.store_rest(layout.source)

    def writer(self, layout: Layout, directory: Path, _options: WriterOptions, resumed: Resumed) -> Writer:
        """Returns a writer of `iter_*` under `directory`."""
        from mptq.formats.megatron.store import rest_of_files
        from mptq.formats.megatron.writer import MegatronWriter

        assert isinstance(layout, MegatronLayout)
        iteration = layout.source.checkpoint.location.iteration
        return MegatronWriter(directory, iteration, partial(rest_of_files, layout), resumed.accounts)

    def open(self, directory: Path) -> OpenedOutput:
        """Opens the checkpoint in `directory`."""
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
        """Yields one scale tensor for all parts of the fused matrix."""
        grid = scheme.grid(sum(weight["shape"][0] for weight in weights), weights[0]["shape"][1])
        yield TensorSpec(f"{canonical.removesuffix('weight')}weight_quantizer._scale", scheme.scale_dtype, grid)

    def load_linear(self, layout: Layout, output: OpenedOutput, layer: int, linear: LinearSpec) -> Iterator[LoadedWeight]:
        """Yields the fused matrix."""
        from mptq.formats.megatron import store

        return store.load_linear(layout, output, layer, linear)

    def verify(self, output: OpenedOutput, _manifest: Mapping[str, Any]) -> Iterator[str]:
        """Checks that each stored amax matches its scale: ModelOpt restores from either."""
        from mptq.formats.megatron import store

        return store.check_magnitudes(output)


MEGATRON = MegatronFormat()
