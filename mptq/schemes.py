"""Which linear gets which scheme: the recipe's own, and those of the overrides whose patterns match. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from mptq.arch import naming
from mptq.arch.naming import Linear
from mptq.errors import RecipeError
from mptq.recipe import Override, Recipe, Scheme


def schemes_by_linear(recipe: Recipe, layers: int, linears: Sequence[Linear]) -> Mapping[tuple[int, str], Scheme | None]:
    """(layer, Megatron module) -> what the recipe says of the linear, None for one that keeps its precision.

    Raises RecipeError for a pattern that matches no linear, and for patterns that tear apart projections which engines fuse.
    """
    own = [(override, override.scheme) for override in recipe.overrides]
    unused = [override for override in recipe.overrides if not override.optional]
    found: dict[tuple[int, str], Scheme | None] = {}
    for layer in range(layers):
        for linear in linears:
            found[layer, linear.megatron] = recipe.scheme
            if own:
                found[layer, linear.megatron] = _scheme(recipe, own, layer, linear, unused)
    if unused:
        patterns = ", ".join(repr(override.pattern) for override in unused)
        example = f"{naming.megatron_layer(0)}{linears[0].megatron}"
        raise RecipeError(
            f"{recipe.name}: {patterns} matches no linear of the {layers} layers: patterns are of names such as {example} or "
            f"{naming.hf_layer(0)}{linears[0].hf[0]}"
        )
    return found


def _scheme(
    recipe: Recipe, own: list[tuple[Override, Scheme | None]], layer: int, linear: Linear, unused: list[Override]
) -> Scheme | None:
    """The scheme of all members of a linear; takes the overrides that matched out of `unused`."""
    fused = naming.megatron_layer(layer) + linear.megatron
    members: dict[str, Scheme | None] = {}
    for member in linear.hf:
        names = fused, naming.hf_layer(layer) + member
        members[member] = recipe.scheme
        for override, scheme in own:
            if any(fnmatchcase(name, override.pattern) for name in names):
                members[member] = scheme
                if override in unused:
                    unused.remove(override)
    if len(set(members.values())) > 1:
        alike = ", ".join(name.rpartition(".")[2] for name in linear.hf)
        raise RecipeError(
            f"{recipe.name}: the overrides give {alike} of layer {layer} different schemes, and engines fuse them: let the "
            "patterns match all of them or none"
        )
    return next(iter(members.values()))
