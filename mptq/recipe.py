"""One typed recipe; the registry is the listing of configs/: the file's name is the recipe's name."""

from __future__ import annotations

import difflib
import hashlib
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from mptq.errors import RecipeError


class Weights(BaseModel):
    """How the weights of the layers' linears are quantized: E4M3, scale = amax / 448 over a block, a row or a fused group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Literal["block", "row", "tensor"]
    block_size: Literal[128] | None = None

    @model_validator(mode="after")
    def _block_size_with_blocks(self) -> Self:
        if (self.scale == "block") != (self.block_size is not None):
            raise ValueError("block_size goes with `scale: block`, and only with it")
        return self


class Recipe(BaseModel):
    """What to do to a model. `hf` names the dialect of the Hugging Face output (mptq/writers/dialects.py)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = Field(min_length=1)
    weights: Weights
    hf: Literal["deepseek-fp8", "compressed-tensors"]

    @model_validator(mode="after")
    def _dialect_carries_scales(self) -> Self:
        carried = {"deepseek-fp8": ("block",), "compressed-tensors": ("tensor", "row")}[self.hf]
        if self.weights.scale not in carried:
            raise ValueError(f"`hf: {self.hf}` carries `scale: {' or '.join(carried)}` weights, not {self.weights.scale}")
        return self

    @property
    def block(self) -> int | None:
        """Rows and columns of a block, or None for scales that are not of blocks."""
        return self.weights.block_size

    def grid(self, rows: int, columns: int) -> tuple[int, ...]:
        """Shape of the scales of a weight [rows, columns]: ceil-divided blocks, [rows, 1], or [] for one scale."""
        if self.block is not None:
            return -(-rows // self.block), -(-columns // self.block)
        return (rows, 1) if self.weights.scale == "row" else ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the recipe says, without its name and description."""
        return hashlib.sha256(self.model_dump_json(exclude={"name", "description"}).encode()).hexdigest()


@cache
def _configs() -> Path:
    """configs/ as shipped in the wheel, or of the source tree."""
    here = Path(__file__).parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def recipe_names() -> list[str]:
    """The built-in recipes, sorted."""
    return sorted(path.stem for path in _configs().glob("*.yaml"))


def load_recipe(name: str) -> Recipe:
    """The built-in recipe `name`, or the one in the YAML file at that path.

    Raises RecipeError for an unknown name (with the nearest one) and for every mistake in the file, together.
    """
    is_path = name.endswith((".yaml", ".yml")) or "/" in name
    path = Path(name) if is_path else _configs() / f"{name}.yaml"
    if not path.is_file():
        if is_path:
            raise RecipeError(f"recipe file {path} does not exist")
        near = difflib.get_close_matches(name, recipe_names(), n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise RecipeError(f"unknown recipe {name!r}: {hint}there are {', '.join(recipe_names())}")
    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} does not hold a recipe: it must be a mapping with description, weights and hf")
    return recipe_from(fields | {"name": path.stem}, str(path))


def recipe_from(fields: dict[str, Any], where: str) -> Recipe:
    """The recipe with these fields; raises RecipeError with every mistake in them, naming `where` they stand."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        problems = []
        for item in error.errors():
            place = ".".join(map(str, item["loc"]))
            problems.append(f"{place}: {item['msg']}" if place else item["msg"])
        raise RecipeError(f"{where}: {'; '.join(problems)}") from error
