"""Assigns a scheme to each linear of a model: the recipe's, or that of the last override that matches. No torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property

from mptq.errors import RecipeError
from mptq.model import engines, tensors
from mptq.model.config import ModelConfig
from mptq.model.tensors import LinearSpec
from mptq.recipes.recipe import Override, Recipe
from mptq.recipes.schemes import Scheme


@dataclass(frozen=True, eq=False)
class Assignment:
    """The scheme that a recipe assigns to each linear of a model, before formats check its dimensions."""

    recipe: Recipe
    model: ModelConfig

    @cached_property
    def schemes(self) -> Mapping[tuple[int, str], Scheme | None]:
        """(layer, Megatron module) -> scheme, as in `schemes_by_linear`; raises RecipeError for invalid patterns."""
        return schemes_by_linear(self.recipe, self.model)

    def scheme(self, layer: int, linear: LinearSpec) -> Scheme | None:
        """Returns the scheme of a linear, None if it keeps its precision."""
        return self.schemes[layer, linear.megatron]

    def layer(self, layer: int) -> tuple[LinearSpec, ...]:
        """Returns the linears of a layer, in the order of the forward pass."""
        return tensors.layer_linears(self.model, layer)

    def linears(self) -> Iterator[tuple[int, LinearSpec]]:
        """Yields (layer, linear) for the linears of all layers."""
        return ((layer, linear) for layer in range(self.model.num_layers) for linear in self.layer(layer))

    def group_fits(self, layer: int, linear: LinearSpec) -> bool:
        """Whether a linear, and all that engines fuse with it, can be loaded in whole cells of its scheme."""
        scheme = self.scheme(layer, linear)
        return scheme is None or engines.groups(self.model, layer)[linear.megatron].fits(scheme.unit)

    def sharing(self, layer: int, linear: LinearSpec) -> tuple[LinearSpec, ...]:
        """Returns the linears that share a scale with this one, and itself: fused linears in a per-tensor scheme."""
        scheme, group = self.scheme(layer, linear), engines.groups(self.model, layer)[linear.megatron]
        if scheme is None or not scheme.shared or not group.fused:
            return (linear,)
        return tuple(other for other in group.linears if self.scheme(layer, other) == scheme)

    @property
    def kv_cache(self) -> bool:
        """Whether the outputs have scales for an FP8 KV cache."""
        return self.recipe.kv_cache == "fp8"

    def has_cache(self, layer: int) -> bool:
        """Whether the outputs have scales for this layer's KV cache."""
        return self.kv_cache and self.model.kinds[layer].mixer in tensors.CACHED


def schemes_by_linear(recipe: Recipe, config: ModelConfig) -> Mapping[tuple[int, str], Scheme | None]:
    """Returns (layer, Megatron module) -> the scheme of the linear, None if it keeps its precision.

    Raises RecipeError if a pattern matches no linear, or if patterns assign different schemes to projections of one
    linear.
    """
    own = [(override, override.scheme) for override in recipe.overrides]
    unused = [override for override in recipe.overrides if not override.optional]
    found: dict[tuple[int, str], Scheme | None] = {}
    for layer in range(config.num_layers):
        for linear in tensors.layer_linears(config, layer):
            found[layer, linear.megatron] = recipe.scheme
            if own:
                fused = tensors.megatron_layer(layer) + linear.megatron
                members = {tensors.hf_layer(config, layer) + member: recipe.scheme for member in linear.hf}
                found[layer, linear.megatron] = _scheme(recipe, own, fused, members, unused)
    if unused:
        patterns = ", ".join(repr(override.pattern) for override in unused)
        first = tensors.layer_linears(config, 0)[0]
        raise RecipeError(
            f"{recipe.name}: {patterns} matches no linear of the {config.num_layers} layers: patterns must match names such as "
            f"{tensors.megatron_layer(0)}{first.megatron} or {tensors.hf_layer(config, 0)}{first.hf[0]}"
        )
    return found


def _scheme(
    recipe: Recipe,
    own: list[tuple[Override, Scheme | None]],
    fused: str,
    members: dict[str, Scheme | None],
    unused: list[Override],
) -> Scheme | None:
    """Returns the scheme of all members of the linear `fused`; removes the overrides that matched from `unused`."""
    for member in members:
        for override, scheme in own:
            if any(fnmatchcase(name, override.pattern) for name in (fused, member)):
                members[member] = scheme
                if override in unused:
                    unused.remove(override)
    if len(set(members.values())) > 1:
        raise RecipeError(
            f"{recipe.name}: the overrides assign different schemes to {', '.join(members)}, but these are one fused linear in "
            f"Megatron and in engines: use {fused!r}, which matches all of them"
        )
    return next(iter(members.values()))


def require_whole_groups(recipe: Recipe, config: ModelConfig, found: Mapping[tuple[int, str], Scheme | None]) -> None:
    """Raises RecipeError if patterns assign different schemes to linears that engines hold in one module.

    In Megatron these are separate linears, so its output can have a different scheme for each.
    """
    if not recipe.overrides:
        return
    for layer in range(config.num_layers):
        for group in dict.fromkeys(engines.groups(config, layer).values()):
            torn: dict[Scheme | None, LinearSpec] = {}
            for linear in group.linears:
                torn.setdefault(found[layer, linear.megatron], linear)
            if len(torn) > 1:
                prefix = tensors.hf_layer(config, layer)
                raise RecipeError(
                    f"{recipe.name}: the overrides assign different schemes to "
                    f"{' and '.join(prefix + linear.hf[0] for linear in torn.values())}, but engines hold them in one module: "
                    f"use patterns that match all of it, such as {' and '.join(map(repr, group.patterns))}, or none of it, or "
                    "use --format megatron"
                )
