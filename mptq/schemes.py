"""Which linear gets which scheme: the recipe's own, and those of the overrides whose patterns match. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from mptq.arch import naming
from mptq.arch.config import ModelConfig
from mptq.errors import RecipeError
from mptq.recipe import Override, Recipe, Scheme


def schemes_by_linear(recipe: Recipe, config: ModelConfig) -> Mapping[tuple[int, str], Scheme | None]:
    """(layer, Megatron module) -> what the recipe says of the linear, None for one that keeps its precision.

    Raises RecipeError for a pattern that matches no linear, and for patterns that tear apart projections which engines fuse.
    """
    own = [(override, override.scheme) for override in recipe.overrides]
    unused = [override for override in recipe.overrides if not override.optional]
    found: dict[tuple[int, str], Scheme | None] = {}
    for layer in range(config.num_layers):
        for linear in naming.layer_linears(config, layer):
            found[layer, linear.megatron] = recipe.scheme
            if own:
                fused = naming.megatron_layer(layer) + linear.megatron
                members = {naming.hf_layer(config, layer) + member: recipe.scheme for member in linear.hf}
                found[layer, linear.megatron] = _scheme(recipe, own, fused, members, unused)
    if unused:
        patterns = ", ".join(repr(override.pattern) for override in unused)
        first = naming.layer_linears(config, 0)[0]
        raise RecipeError(
            f"{recipe.name}: {patterns} matches no linear of the {config.num_layers} layers: patterns are of names such as "
            f"{naming.megatron_layer(0)}{first.megatron} or {naming.hf_layer(config, 0)}{first.hf[0]}"
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
            f"{recipe.name}: the overrides give {', '.join(members)} different schemes, and engines fuse them: let the "
            "patterns match all of them or none"
        )
    return next(iter(members.values()))
