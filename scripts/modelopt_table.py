"""Prints the table of ModelOpt's general recipes and configs in docs/recipes.md: what each becomes, or why it is refused.

python scripts/modelopt_table.py
"""

import re

import modelopt.torch.quantization as mtq

from mptq.errors import RecipeError
from mptq.recipes.modelopt import built_in_names
from mptq.recipes.recipe import load_recipe

_HAS = re.compile(r"^\*.* has (a )?")
"""The names of quantizers in a reason."""


def row(name: str) -> str:
    """The table's row of a recipe or config."""
    try:
        recipe = load_recipe(name)
    except RecipeError as error:
        reasons = str(error).partition(f"{name}: ")[2].split("; ")
        return f"| `{name}` | refused: {'; '.join(_HAS.sub('', reason) for reason in reasons)} |"
    assert recipe.scheme is not None
    cache = ", FP8 KV cache" if recipe.kv_cache == "fp8" else ""
    return f"| `{name}` | {recipe.scheme.words}{cache}; `hf: {recipe.hf}` |"


def table() -> str:
    """The whole table, those that run first."""
    names = [name for name in built_in_names() if name.startswith("general/")]
    rows = [row(name) for name in [*names, *(name for name in dir(mtq) if name.endswith("_CFG"))]]
    rows.sort(key=lambda line: "| refused: " in line)
    return "\n".join(["| ModelOpt's name | with mptq |", "|---|---|", *rows])


if __name__ == "__main__":
    print(table())
