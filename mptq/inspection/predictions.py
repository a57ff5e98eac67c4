"""Predicts output size and memory of each built-in recipe from checkpoint metadata. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from mptq.errors import RecipeError, UnsupportedModelError
from mptq.formats import FORMATS
from mptq.model.source import Source
from mptq.model.tensors import LAYERS, megatron_layer
from mptq.plan import estimates
from mptq.plan.plan import plan_source
from mptq.recipes.recipe import Recipe, load_recipe, recipe_names


class Representatives:
    """A reduced model with one layer of each kind; `counts` are the numbers of layers of these kinds in the model.

    A recipe treats layers of a kind alike. A mixture-of-experts model with a trillion parameters has 47,000 linears but only
    two kinds of layers.
    """

    def __init__(self, source: Source) -> None:
        groups: dict[Any, list[int]] = {}
        for layer, alike in enumerate(_signatures(source)):
            groups.setdefault(alike, []).append(layer)
        chosen = [layers[0] for layers in groups.values()]
        self.counts = [len(layers) for layers in groups.values()]
        # Keep the features of the whole model, such as which of its layers have experts.
        model = replace(source.model, num_layers=len(chosen), kinds=tuple(source.model.kinds[layer] for layer in chosen))
        places = {name: parts for name, parts in source.places.items() if not name.startswith(LAYERS)}
        for number, layer in enumerate(chosen):
            old, new = megatron_layer(layer), megatron_layer(number)
            places |= {new + name.removeprefix(old): at for name, at in source.places.items() if name.startswith(old)}
        self.source = Source(source.checkpoint, model, places)

    def predict(self, recipe: Recipe, form: str) -> tuple[int, int]:
        """Returns the tensor bytes of the output in format `form`, and peak memory in bytes without activations.

        Raises RecipeError or UnsupportedModelError if the recipe cannot be applied.
        """
        plan = plan_source(self.source, recipe, (form,))
        total = 0
        for inner, specs in plan.layouts[form].by_canonical_name():
            prefix, layer, _ = inner.partition(LAYERS)
            count = self.counts[int(inner.split(".")[2])] if layer and not prefix else 1
            total += count * sum(spec.nbytes for spec in specs)
        return total, estimates.peak_memory(plan)


def _signatures(source: Source) -> Iterator[Any]:
    """Yields for each layer what determines how a recipe treats it: its kind and the dtypes of its tensors."""
    dtypes: list[list[str]] = [[] for _ in source.model.kinds]
    for name in source.places:
        if name.startswith(LAYERS):
            dtypes[int(name.split(".", 3)[2])].append(source.dtype(name))
    return ((kind, tuple(found)) for kind, found in zip(source.model.kinds, dtypes, strict=True))


def predictions(source: Source) -> list[dict[str, Any]]:
    """Returns one row per built-in recipe: bytes or problem per format, and the larger peak memory of the formats."""
    short = Representatives(source)
    return [_row(short, load_recipe(name)) for name in recipe_names()]


def _row(short: Representatives, recipe: Recipe) -> dict[str, Any]:
    row: dict[str, Any] = {"recipe": recipe.name, "description": recipe.description, "peak_bytes": None}
    row |= {"needs_data": recipe.needs_data, "bytes": {}, "problems": {}}
    for form in FORMATS:
        try:
            row["bytes"][form], peak = short.predict(recipe, form)
            row["peak_bytes"] = max(peak, row["peak_bytes"] or 0)
        except (RecipeError, UnsupportedModelError) as error:
            row["problems"][form] = str(error)
    return row
