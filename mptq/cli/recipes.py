"""`mptq recipes`."""

from __future__ import annotations

from typing import Annotated

import typer

from mptq.cli import console


def recipes(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Recipe to show in full.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List recipes, or show one."""
    from mptq.recipes.recipe import load_recipe, recipe_names

    if name is not None:
        recipe = load_recipe(name)
        if as_json:
            console.document(recipe.model_dump())
        else:
            import yaml

            console.result(yaml.safe_dump(recipe.model_dump(exclude_none=True), sort_keys=False).rstrip())
        return
    found = [load_recipe(known) for known in recipe_names()]
    if as_json:
        console.document({"recipes": [recipe.model_dump() for recipe in found]})
        return
    width = max(len(recipe.name) for recipe in found)
    for recipe in found:
        console.result(f"{recipe.name:<{width}}  {recipe.description}")
