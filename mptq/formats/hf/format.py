"""The Hugging Face format, for vLLM, SGLang, TensorRT-LLM and transformers. Importing it does not import torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.errors import RecipeError, UnsupportedModelError
from mptq.formats.hf.headers import read_headers
from mptq.formats.hf.layout import HfLayout
from mptq.formats.hf.quantization_config import DIALECTS
from mptq.formats.hf.verify import check_config
from mptq.formats.hf.warnings import warnings
from mptq.formats.protocol import Format, OpenedOutput
from mptq.model.architectures.registry import family_of, nearest_family
from mptq.model.checkpoint_keys import MTP
from mptq.model.tensors import hf_layer
from mptq.recipes.assignment import require_whole_groups
from mptq.recipes.recipe import load_recipe, recipe_names
from mptq.recipes.schemes import carried
from mptq.types import TensorSpec

if TYPE_CHECKING:
    import torch

    from mptq.formats.layout import Layout
    from mptq.formats.protocol import LoadedWeight, QuantizedCache, QuantizedLinear, Resumed, Stored, Writer, WriterOptions
    from mptq.model.tensors import LinearSpec, UnquantizedTensor
    from mptq.recipes.schemes import Scheme


class HfFormat(Format):
    """Writes safetensors shards, config.json with a quantization config, and the tokenizer files."""

    name = "hf"
    label = "Hugging Face"
    short = "HF"
    layout = HfLayout
    has_tokenizer = True
    is_sharded = True
    input_scale = ".input_scale"

    def check(self, layout: Layout) -> None:
        """Raises RecipeError or UnsupportedModelError for an output that no engine could load."""
        assert isinstance(layout, HfLayout)
        _require_family(layout)
        recipe, schemes = layout.assignment.recipe, layout.assignment.schemes
        require_whole_groups(recipe, layout.model, schemes)
        if not any(schemes.values()):
            return
        if recipe.misaligned == "error":
            _refuse_misaligned(layout)
        used = [scheme.name for scheme in layout.contents.groups]
        if not used:
            _refuse_nothing(layout)
        if not set(used) <= set(carried(layout.dialect_name)):
            raise RecipeError(
                f"{recipe.name}: no Hugging Face quantization format can mix {' and '.join(used)} weights: use one of these "
                "schemes, or --format megatron"
            )

    def warnings(self, layout: Layout) -> list[str]:
        """Returns warnings about how engines load the output."""
        assert isinstance(layout, HfLayout)
        return warnings(layout)

    def store_linear(self, layout: Layout, linear: QuantizedLinear) -> Stored:
        """Returns the weight and scales of each projection."""
        from mptq.formats.hf import store

        assert isinstance(layout, HfLayout)
        return store.store_linear(layout, linear)

    def store_unquantized(
        self, tensor: UnquantizedTensor, specs: Sequence[TensorSpec], values: torch.Tensor, first: int
    ) -> Stored:
        """Returns the tensor, or one tensor per projection."""
        from mptq.formats.hf import store

        return store.store_unquantized(tensor, specs, values, first)

    def store_kv_cache(self, layout: Layout, cache: QuantizedCache) -> Stored:
        """Returns k_scale and v_scale."""
        from mptq.formats.hf import store

        assert isinstance(layout, HfLayout)
        return store.store_kv_cache(layout, cache)

    def writer(self, layout: Layout, directory: Path, options: WriterOptions, resumed: Resumed) -> Writer:
        """Returns a writer of shards of at most `max_shard_bytes`."""
        from mptq.formats.hf.writer import HfWriter

        assert isinstance(layout, HfLayout)
        return HfWriter(directory, layout, options, resumed.names)

    def open(self, directory: Path) -> OpenedOutput:
        """Opens the safetensors files in `directory`."""
        return OpenedOutput(self.name, directory, read_headers(directory), _loader(directory))

    def scales(
        self, _canonical: str, weights: Sequence[Mapping[str, Any]], scheme: Scheme, manifest: Mapping[str, Any]
    ) -> Iterator[TensorSpec]:
        """Yields one scale tensor per projection."""
        dialect = DIALECTS[manifest["dialect"]]
        for weight in weights:
            yield dialect.scale(weight["name"].removesuffix(".weight"), scheme, *weight["shape"])

    def load_linear(self, layout: Layout, output: OpenedOutput, layer: int, linear: LinearSpec) -> Iterator[LoadedWeight]:
        """Yields the weight of each projection."""
        from mptq.formats.hf import store

        assert isinstance(layout, HfLayout)
        return store.load_linear(layout, output, layer, linear)

    def lacks(self, canonical: str) -> bool:
        """Whether the tensor belongs to multi-token prediction layers, which no Hugging Face architecture here has."""
        return canonical.startswith(MTP)

    def verify(self, output: OpenedOutput, manifest: Mapping[str, Any]) -> Iterator[str]:
        """Checks the index and the exclude list of config.json."""
        return check_config(output, manifest)


HF = HfFormat()


def _loader(directory: Path) -> Any:
    from safetensors import safe_open

    place: dict[str, Path] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="numpy") as tensors:
            place |= dict.fromkeys(tensors.keys(), file)

    def load(name: str) -> torch.Tensor:
        with safe_open(place[name], framework="pt") as tensors:
            tensor: torch.Tensor = tensors.get_tensor(name)
        return tensor

    return load


def _require_family(layout: HfLayout) -> None:
    if family_of(layout.model) is None:
        near = nearest_family(layout.model)
        raise UnsupportedModelError(
            f"no Hugging Face architecture that mptq writes can represent this model; the nearest, {near.name}, differs in "
            f"{'; '.join(near.missing(layout.model))}: use --format megatron"
        )


def _misaligned(layout: HfLayout) -> list[str]:
    """Returns the modules whose dimensions do not fit the recipe's scheme, in the first layer that has any."""
    for layer in range(layout.model.num_layers):
        found = [
            hf_layer(layout.model, layer) + name
            for linear in layout.assignment.layer(layer)
            if not layout.assignment.group_fits(layer, linear)
            for name in linear.hf
        ]
        if found:
            return found
    return []


def _refuse_misaligned(layout: HfLayout) -> None:
    found = _misaligned(layout)
    if found:
        raise RecipeError(
            f"{layout.assignment.recipe.name}: {', '.join(found)} (and the same modules in other layers) have sizes that are "
            "not multiples of the block size, and the recipe sets `misaligned: error`: use `misaligned: keep` or `per-channel`"
        )


def _refuse_nothing(layout: HfLayout) -> None:
    recipe, known = layout.assignment.recipe, map(load_recipe, recipe_names())
    alike = [one for one in known if one.scheme is not None and one.rounding == recipe.rounding]
    others = [one.name for one in alike if one.scheme is not None and one.scheme.unit == (1, 1)]
    sizes = sorted({size for _, linear in layout.assignment.linears() for _, shape in linear.members for size in shape})
    assert recipe.scheme is not None
    raise RecipeError(
        f"{recipe.name}: no linear of this model has sizes that are all multiples of "
        f"{max(recipe.scheme.unit)} (sizes {', '.join(map(str, sizes))}), so nothing would be quantized in the hf "
        f"output: use --recipe {' or '.join(others)}, or --format megatron"
    )
