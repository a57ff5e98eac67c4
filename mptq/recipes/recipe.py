"""One typed recipe; the registry is the listing of configs/: the file's name is the recipe's name."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable
from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from mptq.errors import RecipeError
from mptq.files import require_local
from mptq.recipes.schemes import SCHEMES, Scheme, carried

KEEP = "none"
"""The recipe by which weights keep their precision."""


def _known_scale(scale: str) -> str:
    known = list(dict.fromkeys(scheme.scale for scheme in SCHEMES.values()))
    if scale not in known:
        raise ValueError(f"there is no scale {scale!r}: there are {', '.join(known)}")
    return scale


class Weights(BaseModel):
    """How the weights of the layers' linears are quantized: E4M3, one scale a block, a row or a fused group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Annotated[str, AfterValidator(_known_scale)]
    block_size: int | None = None

    @model_validator(mode="after")
    def _block_size_with_blocks(self) -> Self:
        sizes = {(scheme.scale, scheme.block_size): None for scheme in SCHEMES.values()}
        if (self.scale, self.block_size) not in sizes:
            words = ", ".join(f"{size} with `scale: {scale}`" for scale, size in sizes if size)
            raise ValueError(f"block_size is {words}, and goes with no other scale")
        return self

    def scheme(self, static: bool) -> Scheme | None:
        """The scheme of these weights with static or dynamic activations; None where there is none."""
        wanted = self.scale, self.block_size, static
        return next((one for one in SCHEMES.values() if (one.scale, one.block_size, one.static) == wanted), None)


class Calibration(BaseModel):
    """Where static scales come from: ModelOpt's calibrator, of the stream that `propagate` names.

    `max` is the largest magnitude seen; `percentile` cuts the rarest values off (ModelOpt's histogram calibrator).
    `propagate` says what calibrates layer N + 1: what the BF16 layers hand on, or what the quantized layers do.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["max", "percentile"] = "max"
    percentile: float | None = Field(default=None, gt=50, le=100)
    propagate: Literal["reference", "quantized"] = "reference"

    @field_validator("method", mode="before")
    @classmethod
    def _not_of_integers(cls, method: Any) -> Any:
        if method in ("mse", "entropy"):
            raise ValueError(f"ModelOpt's {method} calibrator is for integers and fails on FP8: use max or percentile")
        return method

    @model_validator(mode="after")
    def _percentile_with_its_method(self) -> Self:
        if (self.method == "percentile") != (self.percentile is not None):
            raise ValueError("percentile goes with `method: percentile`, and only with it")
        return self


class Override(BaseModel):
    """The linears whose name matches `pattern` get another recipe's scheme, or keep their precision (`none`).

    A pattern (shell wildcards) is of Megatron's module names (`decoder.layers.0.mlp.linear_fc1`) or Hugging Face's. One that
    matches no linear of the model stops the run, unless it is `optional`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str = Field(min_length=1)
    recipe: str
    optional: bool = False

    @field_validator("recipe")
    @classmethod
    def _is_known(cls, name: str) -> str:
        if name not in recipe_names():
            raise ValueError(f"unknown recipe {name!r}: {_nearest(name, recipe_names())}")
        return name

    @property
    def scheme(self) -> Scheme | None:
        """What the matching linears get."""
        return load_recipe(self.recipe).scheme


class Recipe(BaseModel):
    """What to do to a model. `hf` names the dialect of the Hugging Face output (mptq/formats/hf/quantization_config.py).

    `misaligned` says what becomes of weights whose dimensions rule the scheme out in an output: they keep their precision,
    or get one scale a row, or stop the run. Of `overrides`, the last that matches counts. Without `weights` nothing is
    quantized: the checkpoint is converted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = Field(min_length=1)
    weights: Weights | None
    activations: Literal["dynamic", "static"] = "dynamic"
    kv_cache: Literal["none", "fp8"] = "none"
    hf: Literal["deepseek-fp8", "compressed-tensors", "modelopt", "plain"]
    misaligned: Literal["keep", "per-channel", "error"] = "keep"
    calibration: Calibration = Calibration()
    overrides: tuple[Override, ...] = ()

    @model_validator(mode="after")
    def _contradictions(self) -> Self:
        if self.weights is None:
            return self._converts()
        problems = []
        if self.scheme is None:
            problems.append("`activations: static` goes with `scale: tensor` (engines read no other static form)")
        elif self.hf not in self.scheme.forms:
            names = " or ".join(carried(self.hf)) or "no quantized"
            problems.append(f"`hf: {self.hf}` carries {names} weights, not {self.scheme.name}")
        if self.misaligned == "per-channel" and self.scheme is not None and self.scheme.block is None:
            problems.append("`misaligned: per-channel` goes with `scale: block`")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _converts(self) -> Self:
        others = {"activations": "dynamic", "kv_cache": "none", "hf": "plain", "misaligned": "keep", "overrides": ()}
        wrong = [name for name, value in others.items() if getattr(self, name) != value]
        if wrong:
            raise ValueError(f"without weights to quantize there is no {', '.join(wrong)} to choose (and `hf` is plain)")
        return self

    @cached_property
    def scheme(self) -> Scheme | None:
        """What a linear gets that no override matches, None for a recipe that only converts."""
        return None if self.weights is None else self.weights.scheme(self.activations == "static")

    @property
    def needs_data(self) -> bool:
        """Whether there is a scale to calibrate."""
        schemes = [self.scheme, *(override.scheme for override in self.overrides)]
        return self.kv_cache == "fp8" or any(scheme is not None and scheme.static for scheme in schemes)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of what the recipe says, without its name and description."""
        return hashlib.sha256(self.model_dump_json(exclude={"name", "description"}).encode()).hexdigest()

    def changed(self, ignore: Iterable[str] = (), kv_cache: str | None = None) -> Recipe:
        """The recipe with patterns that keep their precision added, and another `kv_cache`; raises RecipeError."""
        fields = self.model_dump()
        fields["overrides"] = [*fields["overrides"], *({"pattern": pattern, "recipe": KEEP} for pattern in ignore)]
        fields["kv_cache"] = kv_cache or self.kv_cache
        return recipe_from(fields, f"recipe {self.name}")


@cache
def _configs() -> Path:
    """The built-in recipes."""
    return Path(__file__).parent / "configs"


@cache
def recipe_names() -> list[str]:
    """The built-in recipes, sorted."""
    return sorted(path.stem for path in _configs().glob("*.yaml"))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"there are {', '.join(known)}"


def load_recipe(name: str) -> Recipe:
    """The built-in recipe `name`, the one in the YAML file at that path, or one of ModelOpt's where it is FP8.

    ModelOpt's are the names of its built-in recipes (`general/ptq/fp8_default-kv_fp8`) and of its configs (`FP8_DEFAULT_CFG`).
    Raises RecipeError for an unknown name (with the nearest one) and for every mistake in the file, together.
    """
    if name in recipe_names():
        return _load_yaml(_configs() / f"{name}.yaml")
    require_local(name)
    path = Path(name)
    if name.endswith((".yaml", ".yml")):
        if not path.is_file():
            raise RecipeError(f"recipe file {path} does not exist")
        return _load_yaml(path)
    if name.endswith("_CFG") or "/" in name:
        from mptq.recipes.modelopt import recipe_fields

        return recipe_from(recipe_fields(name), f"ModelOpt's {name}")
    raise RecipeError(f"unknown recipe {name!r}: {_nearest(name, recipe_names())}")


def _load_yaml(path: Path) -> Recipe:
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
        raise RecipeError(f"{where}: {'; '.join(_problems(fields, error))}") from error


def _problems(fields: dict[str, Any], error: ValidationError) -> list[str]:
    """Every mistake: contradictions too, which pydantic looks for only where all fields are right on their own."""
    problems = [_problem(item) for item in error.errors()]
    wrong = {item["loc"][0] for item in error.errors() if item["loc"]}
    rest = {key: value for key, value in fields.items() if key not in wrong}
    try:
        Recipe.model_validate(rest)
    except ValidationError as more:
        found = [_problem(item) for item in more.errors() if item["type"] == "value_error"]
        problems += [problem for problem in found if problem not in problems]
    return problems


def _problem(item: Any) -> str:
    place = ".".join(map(str, item["loc"]))
    message = str(item["msg"]).removeprefix("Value error, ")
    if item["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(item["loc"][-1]), Recipe.model_fields, n=1)
        message = "unknown key" + (f", did you mean {near[0]!r}?" if near else "")
    return f"{place}: {message}" if place else message
