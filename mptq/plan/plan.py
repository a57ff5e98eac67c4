"""What a run will do, decided on metadata alone. No torch: `--dry-run` and `inspect` stop here."""

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
    """The decisions of a run: which checkpoint, which recipe, which formats, and what follows for each linear.

    What they come to is beside it: `units` (what is read and committed together), `estimates` (bytes, memory, warnings), and
    the layouts of the formats (names, dtypes and shapes of what is stored).
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
        """The layers' numbers, from 0."""
        return range(self.model.num_layers)

    @cached_property
    def assignment(self) -> Assignment:
        """Which linear gets which scheme of the recipe."""
        return Assignment(self.recipe, self.model)

    @cached_property
    def layouts(self) -> Mapping[str, Layout]:
        """What each format stores."""
        return {form: FORMATS[form].layout(self.source, self.assignment, self.passthrough) for form in self.formats}

    @cached_property
    def units(self) -> Units:
        """What is read, written and committed together, in order."""
        return Units(self.model, self.passthrough)

    @property
    def by_rows(self) -> bool:
        """Whether large tensors outside the layers are read and written some rows at a time."""
        return all(layout.takes_rows for layout in self.layouts.values())

    def linears(self, layer: int) -> tuple[LinearSpec, ...]:
        """The linears of a layer."""
        return self.assignment.layer(layer)

    def unquantized(self, layer: int) -> tuple[UnquantizedTensor, ...]:
        """The tensors of a layer that keep their precision."""
        return layer_copies(self.model, layer)

    @cached_property
    def passthrough(self) -> tuple[UnquantizedTensor, ...]:
        """The tensors outside of the model (multi-token prediction) that a format of the run stores as they are."""
        places = self.source.places
        stored = [name for name in passthrough_names(places) if not all(FORMATS[form].lacks(name) for form in self.formats)]
        return tuple(UnquantizedTensor(name, (), places[name][0].shape, places[name][0].shape[0]) for name in stored)

    @property
    def skipped(self) -> dict[str, str]:
        """Keys of the checkpoint that no output has, with the reason."""
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
        """Canonical names of the weights that the outputs cannot hold with the same numbers."""
        return [canonical_weight(*linear) for linear in self.assignment.linears() if not self.same_numbers(*linear)]

    def same_numbers(self, layer: int, linear: LinearSpec) -> bool:
        """Whether all outputs hold a linear with the same numbers."""
        schemes = {layout.scheme(layer, linear) for layout in self.layouts.values()}
        if len(schemes) > 1:
            return False
        (scheme,) = schemes
        split = {layout.splits for layout in self.layouts.values()}
        return scheme is None or len(split) == 1 or not linear.crosses(scheme.block)

    @property
    def runs(self) -> bool:
        """Whether activations can go through the layers; where nothing is quantized, they would find nothing."""
        return not self.model.not_run and self.recipe.scheme is not None

    def require_runnable(self) -> None:
        """Raise UnsupportedModelError where the recipe calibrates on data and the model does not run here."""
        if self.recipe.needs_data and self.model.not_run:
            raise UnsupportedModelError(
                f"recipe {self.recipe.name} calibrates on data, and this model has {'; '.join(self.model.not_run)}: use a "
                "recipe without data (see `mptq recipes`)"
            )


def make_plan(path: Path, recipe: Recipe | str, formats: Sequence[str] = ("hf",), options: SourceOptions | None = None) -> Plan:
    """Plan a run on the checkpoint at `path`, which `options` choose and describe further.

    Raises CheckpointError, OptionError, UnsupportedModelError or RecipeError when the run cannot succeed; reads metadata only.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise RecipeError(f"unknown format {', '.join(unknown) or '(none)'}: there are {', '.join(FORMATS)}")
    return plan_source(open_source(path, options), recipe, tuple(form for form in FORMATS if form in formats))


def plan_source(source: Source, recipe: Recipe, formats: tuple[str, ...]) -> Plan:
    """Plan a run on an opened checkpoint; raises RecipeError when the recipe does not fit the model."""
    plan = Plan(source, recipe, formats)
    if recipe.scheme is not None and not any(plan.assignment.schemes.values()):
        raise RecipeError(f"{recipe.name}: every linear is ignored, so nothing would be quantized")
    for form in reversed(formats):
        FORMATS[form].check(plan.layouts[form])
    return plan
