"""Which linear gets which scheme: the recipe's own, and those of the overrides whose patterns match. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase

from mptq.errors import RecipeError
from mptq.model import engines, tensors
from mptq.model.config import ModelConfig
from mptq.model.tensors import LinearSpec
from mptq.recipes.recipe import Override, Recipe, Scheme


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
