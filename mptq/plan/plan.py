"""Decides what a run will do, from metadata only. Does not import torch: `--dry-run` and `inspect` need no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mptq.errors import RecipeError, UnsupportedModelError
from mptq.formats import FORMATS
from mptq.formats.layout import Layout, canonical_weight
from mptq.model.checkpoint_keys import passthrough_names
from mptq.model.config import ModelConfig
from mptq.model.source import Source, SourceOptions, open_source
from mptq.model.tensors import LinearSpec, UnquantizedTensor, layer_copies
from mptq.plan.units import Units
from mptq.recipes.assignment import Assignment
from mptq.recipes.recipe import Recipe, load_recipe


@dataclass(frozen=True)
class Plan:
    """The decisions of a run: checkpoint, recipe, formats, and the resulting scheme of each linear.

    What follows from them is in units.py (what is read and committed together), estimates.py (bytes, memory, warnings)
    and the layouts of the formats (names, dtypes and shapes of stored tensors).
    """

    source: Source
    recipe: Recipe
    formats: tuple[str, ...]

    @property
    def model(self) -> ModelConfig:
        """The model's config."""
        return self.source.model

    @property
    def layers(self) -> range:
        """The numbers of the layers, from 0."""
        return range(self.model.num_layers)

    @cached_property
    def assignment(self) -> Assignment:
        """The scheme that the recipe assigns to each linear."""
        return Assignment(self.recipe, self.model)

    @cached_property
    def layouts(self) -> Mapping[str, Layout]:
        """What each format stores, by format."""
        return {form: FORMATS[form].layout(self.source, self.assignment, self.passthrough) for form in self.formats}

    @cached_property
    def units(self) -> Units:
        """What is read, written and committed together, in order."""
        return Units(self.model, self.passthrough)

    @property
    def by_rows(self) -> bool:
        """Whether large tensors outside the layers are read and written in blocks of rows."""
        return all(layout.takes_rows for layout in self.layouts.values())

    def linears(self, layer: int) -> tuple[LinearSpec, ...]:
        """Returns the linears of a layer."""
        return self.assignment.layer(layer)

    def unquantized(self, layer: int) -> tuple[UnquantizedTensor, ...]:
        """Returns the tensors of a layer that keep their precision."""
        return layer_copies(self.model, layer)

    @cached_property
    def passthrough(self) -> tuple[UnquantizedTensor, ...]:
        """The tensors outside the model (multi-token prediction) that a format of the run stores unchanged."""
        places = self.source.places
        stored = [name for name in passthrough_names(places) if not all(FORMATS[form].lacks(name) for form in self.formats)]
        return tuple(UnquantizedTensor(name, (), places[name][0].shape, places[name][0].shape[0]) for name in stored)

    @property
    def skipped(self) -> dict[str, str]:
        """Keys of the checkpoint that are in no output, with the reason."""
        stored = {tensor.megatron for tensor in self.passthrough}
        keys = (
            part.key
            for name in passthrough_names(self.source.places)
            if name not in stored
            for part in self.source.places[name]
        )
        return self.source.skipped | dict.fromkeys(keys, "multi-token prediction, which only the Megatron output has")

    @property
    def differing(self) -> list[str]:
        """Canonical names of the weights whose quantized numbers differ between the outputs."""
        return [canonical_weight(*linear) for linear in self.assignment.linears() if not self.same_numbers(*linear)]

    def same_numbers(self, layer: int, linear: LinearSpec) -> bool:
        """Whether all outputs have the same quantized numbers for a linear."""
        schemes = {layout.scheme(layer, linear) for layout in self.layouts.values()}
        if len(schemes) > 1:
            return False
        (scheme,) = schemes
        split = {layout.splits for layout in self.layouts.values()}
        return scheme is None or len(split) == 1 or not linear.crosses(scheme.block)

    @property
    def runs(self) -> bool:
        """Whether forward passes are possible and useful: the model is supported, and something is quantized."""
        return not self.model.not_run and self.recipe.scheme is not None

    def require_runnable(self) -> None:
        """Raises UnsupportedModelError if the recipe calibrates on data, but mptq cannot run the model."""
        if self.recipe.needs_data and self.model.not_run:
            raise UnsupportedModelError(
                f"recipe {self.recipe.name} calibrates on data, but mptq cannot run this model, which has "
                f"{'; '.join(self.model.not_run)}: use a recipe without data (see `mptq recipes`)"
            )


def make_plan(path: Path, recipe: Recipe | str, formats: Sequence[str] = ("hf",), options: SourceOptions | None = None) -> Plan:
    """Plans a run on the checkpoint at `path`; `options` select the iteration and correct the architecture.

    Raises CheckpointError, OptionError, UnsupportedModelError or RecipeError if the run cannot succeed. Reads metadata
    only.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise RecipeError(f"unknown format {', '.join(unknown) or '(none)'}: there are {', '.join(FORMATS)}")
    return plan_source(open_source(path, options), recipe, tuple(form for form in FORMATS if form in formats))


def plan_source(source: Source, recipe: Recipe, formats: tuple[str, ...]) -> Plan:
    """Plans a run on an opened checkpoint; raises RecipeError if the recipe does not fit the model."""
    plan = Plan(source, recipe, formats)
    if recipe.scheme is not None and not any(plan.assignment.schemes.values()):
        raise RecipeError(f"{recipe.name}: every linear is ignored, so nothing would be quantized")
    for form in reversed(formats):
        FORMATS[form].check(plan.layouts[form])
    return plan
