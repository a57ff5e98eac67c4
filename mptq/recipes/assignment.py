"""Which linear of a model gets which scheme: the recipe's own, or that of the last override whose pattern matches. No torch."""

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
    """The scheme that a recipe gives to each linear of a model, before a format looks at its dimensions."""

    recipe: Recipe
    model: ModelConfig

    @cached_property
    def schemes(self) -> Mapping[tuple[int, str], Scheme | None]:
        """(layer, canonical module) -> scheme; raises RecipeError for bad patterns."""
        return schemes_by_linear(self.recipe, self.model)

    def scheme(self, layer: int, linear: LinearSpec) -> Scheme | None:
        """The scheme of a linear, None for one that keeps its precision."""
        return self.schemes[layer, linear.megatron]

    def layer(self, layer: int) -> tuple[LinearSpec, ...]:
        """The linears of a layer, in the order of the forward pass."""
        return tensors.layer_linears(self.model, layer)

    def linears(self) -> Iterator[tuple[int, LinearSpec]]:
        """The linears of all layers, with their layers."""
        return ((layer, linear) for layer in range(self.model.num_layers) for linear in self.layer(layer))

    def group_fits(self, layer: int, linear: LinearSpec) -> bool:
        """Whether engines read the scheme of a linear, and of all that they fuse with it, in whole cells."""
        scheme = self.scheme(layer, linear)
        return scheme is None or engines.groups(self.model, layer)[linear.megatron].fits(scheme.unit)

    def sharing(self, layer: int, linear: LinearSpec) -> tuple[LinearSpec, ...]:
        """The linears that have one scale together, this one among them: fused ones, where a scale belongs to a tensor."""
        scheme, group = self.scheme(layer, linear), engines.groups(self.model, layer)[linear.megatron]
        if scheme is None or not scheme.shared or not group.fused:
            return (linear,)
        return tuple(other for other in group.linears if self.scheme(layer, other) == scheme)

    @property
    def kv_cache(self) -> bool:
        """Whether the outputs hold scales of an FP8 KV cache."""
        return self.recipe.kv_cache == "fp8"

    def has_cache(self, layer: int) -> bool:
        """Whether a layer's KV cache has scales in the outputs."""
        return self.kv_cache and self.model.kinds[layer].mixer in tensors.CACHED


def schemes_by_linear(recipe: Recipe, config: ModelConfig) -> Mapping[tuple[int, str], Scheme | None]:
    """(layer, Megatron module) -> what the recipe says of the linear, None for one that keeps its precision.

    Raises RecipeError for a pattern that matches no linear, and for patterns that tear apart the projections of one linear.
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
            f"{recipe.name}: {patterns} matches no linear of the {config.num_layers} layers: patterns are of names such as "
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
    """The scheme of all members of the linear `fused`; takes the overrides that matched out of `unused`."""
    for member in members:
        for override, scheme in own:
            if any(fnmatchcase(name, override.pattern) for name in (fused, member)):
                members[member] = scheme
                if override in unused:
                    unused.remove(override)
    if len(set(members.values())) > 1:
        raise RecipeError(
            f"{recipe.name}: the overrides give {', '.join(members)} different schemes, and they are one linear of "
            f"Megatron's, which engines fuse again: use {fused!r}, which matches all of them"
        )
    return next(iter(members.values()))


def require_whole_groups(recipe: Recipe, config: ModelConfig, found: Mapping[tuple[int, str], Scheme | None]) -> None:
    """Raise RecipeError for patterns that give linears different schemes which engines hold in one module.

    Those are linears of their own to Megatron, and its output can hold each as it likes.
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
                    f"{recipe.name}: the overrides give {' and '.join(prefix + linear.hf[0] for linear in torn.values())} "
                    "different schemes, and engines hold them in one module: let the patterns match all of it, as "
                    f"{' and '.join(map(repr, group.patterns))} would, or none of it, or use --format megatron"
                )
