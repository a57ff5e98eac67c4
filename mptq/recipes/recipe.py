"""Typed recipes. The built-in ones are the files in configs/; the file name is the recipe's name."""

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
from mptq.recipes.algorithms import require_known
from mptq.recipes.schemes import SCHEMES, Scheme, carried

KEEP = "none"
"""The recipe that keeps the precision of weights."""


def _known_scale(scale: str) -> str:
    known = list(dict.fromkeys(scheme.scale for scheme in SCHEMES.values()))
    if scale not in known:
        raise ValueError(f"unknown scale {scale!r}: use one of {', '.join(known)}")
    return scale


class Weights(BaseModel):
    """How the weights of the layers' linears are quantized: E4M3 with one scale per block, row or fused group."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: Annotated[str, AfterValidator(_known_scale)]
    block_size: int | None = None
    scale_format: Literal["float32", "ue8m0"] = "float32"

    @model_validator(mode="after")
    def _block_size_with_blocks(self) -> Self:
        sizes = {(scheme.scale, scheme.block_size): None for scheme in SCHEMES.values()}
        if (self.scale, self.block_size) not in sizes:
            words = ", ".join(f"{size} with `scale: {scale}`" for scale, size in sizes if size)
            raise ValueError(f"block_size must be {words}, and absent with any other scale")
        if self.scale_format == "ue8m0" and self.scale != "block":
            raise ValueError("`scale_format: ue8m0` requires `scale: block`")
        return self

    def scheme(self, static: bool) -> Scheme | None:
        """Returns the scheme of these weights with static or dynamic activations, None if there is none."""
        wanted = self.scale, self.block_size, static, self.scale_format
        known = {(one.scale, one.block_size, one.static, one.scale_format): one for one in SCHEMES.values()}
        return known.get(wanted)


class Calibration(BaseModel):
    """How static scales are calibrated: ModelOpt's calibrator, and the hidden states that it sees.

    `max` uses the largest magnitude; `percentile` clips the rarest values (ModelOpt's histogram calibrator).
    `propagate` selects the hidden states that calibrate layer N + 1: the output of the reference layers or of the
    quantized layers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: Literal["max", "percentile"] = "max"
    percentile: float | None = Field(default=None, gt=50, le=100)
    propagate: Literal["reference", "quantized"] = "reference"

    @field_validator("method", mode="before")
    @classmethod
    def _not_of_integers(cls, method: Any) -> Any:
        if method in ("mse", "entropy"):
            raise ValueError(f"ModelOpt's {method} calibrator is for integer formats and fails for FP8: use max or percentile")
        return method

    @model_validator(mode="after")
    def _percentile_with_its_method(self) -> Self:
        if (self.method == "percentile") != (self.percentile is not None):
            raise ValueError("percentile must be set with `method: percentile`, and only then")
        return self


class Override(BaseModel):
    """Assigns the scheme of another recipe, or no quantization (`none`), to the linears whose name matches `pattern`.

    A pattern (shell wildcards) matches Megatron module names (`decoder.layers.0.mlp.linear_fc1`) or Hugging Face names.
    It is an error if it matches no linear of the model, unless it is `optional`.
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
        """The scheme of the matching linears; None if they keep their precision."""
        return load_recipe(self.recipe).scheme


Rounding = Literal["nearest", "scales", "gptq", "qep"]

_OF_WEIGHTS = ("activations", "kv_cache", "algorithm", "rounding", "misaligned", "overrides")
"""Fields of a recipe that a conversion without quantization leaves at their defaults."""


class Recipe(BaseModel):
    """How to quantize a model. `hf` is the dialect of the Hugging Face output (mptq/formats/hf/quantization_config.py).

    `algorithm` is ModelOpt's for the scales of weights: `max` fits the largest magnitude of a cell, and `mse` searches for
    the scale with the least squared error. `rounding` of weights is to nearest, with scales that have the least error of
    the outputs on the calibration data (`scales`), with codes that also compensate each other's errors (`gptq`), or with
    codes that make up for those of earlier linears too (`qep`).
    `misaligned` decides what happens to weights whose dimensions do not fit the scheme in an output: they keep their
    precision, get one scale per row, or are an error. The last of `overrides` that matches a linear applies. Without
    `weights` nothing is quantized: the checkpoint is only converted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = Field(min_length=1)
    weights: Weights | None
    activations: Literal["dynamic", "static"] = "dynamic"
    kv_cache: Literal["none", "fp8"] = "none"
    algorithm: Literal["max", "mse"] = "max"
    rounding: Rounding = "nearest"
    hf: Literal["deepseek-fp8", "compressed-tensors", "modelopt", "plain"]
    misaligned: Literal["keep", "per-channel", "error"] = "keep"
    calibration: Calibration = Calibration()
    overrides: tuple[Override, ...] = ()

    @field_validator("algorithm", mode="before")
    @classmethod
    def _is_offered(cls, algorithm: Any) -> Any:
        require_known(algorithm)
        return algorithm

    @model_validator(mode="after")
    def _contradictions(self) -> Self:
        if self.weights is None:
            return self._converts()
        problems = self._search_problems()
        if self.scheme is None:
            problems.append("`activations: static` requires `scale: tensor` (engines load no other static form)")
        elif self.hf not in self.scheme.forms:
            names = " or ".join(carried(self.hf)) or "no quantized"
            problems.append(f"`hf: {self.hf}` supports {names} weights, not {self.scheme.name}")
        if self.misaligned == "per-channel" and self.scheme is not None and self.scheme.block is None:
            problems.append("`misaligned: per-channel` requires `scale: block`")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def _search_problems(self) -> list[str]:
        """Returns what is wrong with searching for scales."""
        problems: list[str] = []
        schemes = [scheme for scheme in self.schemes if scheme is not None]
        if any(scheme.exponents for scheme in schemes):
            searches = {"algorithm": "mse", "rounding": "scales"}
            wrong = (f"{name}: {value}" for name, value in searches.items() if getattr(self, name) == value)
            problems += (f"`{one}` cannot be used with `scale: mx`, whose scales follow from the weights" for one in wrong)
        if self.algorithm == "mse" and any(scheme.powers for scheme in schemes):
            problems.append("`algorithm: mse` cannot be used with `scale_format: ue8m0`: use `rounding: scales`")
        if self.algorithm != "max" and self.rounding != "nearest":
            problems.append(f"`rounding: {self.rounding}` searches for the scales itself: `algorithm` must be max")
        return problems

    def _converts(self) -> Self:
        others: dict[str, Any] = {"hf": "plain"}
        others |= {name: type(self).model_fields[name].default for name in _OF_WEIGHTS}
        wrong = [name for name, value in others.items() if getattr(self, name) != value]
        if wrong:
            raise ValueError(f"without weights to quantize, {', '.join(wrong)} cannot be set (and `hf` must be plain)")
        return self

    @cached_property
    def scheme(self) -> Scheme | None:
        """The scheme of a linear that no override matches; None for a recipe that only converts."""
        return None if self.weights is None else self.weights.scheme(self.activations == "static")

    @property
    def schemes(self) -> list[Scheme | None]:
        """The schemes that linears can have: its own, and those of its overrides."""
        return [self.scheme, *(override.scheme for override in self.overrides)]

    @property
    def is_requantized(self) -> bool:
        """Whether Blackwell's loaders quantize any of its weights again."""
        return any(scheme is not None and scheme.is_requantized for scheme in self.schemes)

    @property
    def needs_data(self) -> bool:
        """Whether any scale or the rounding needs calibration."""
        static = any(scheme is not None and scheme.static for scheme in self.schemes)
        return static or self.kv_cache == "fp8" or self.rounding != "nearest"

    @property
    def compares_streams(self) -> bool:
        """Whether rounding needs the reference's inputs of each linear beside those of the quantized stream."""
        return self.rounding == "qep"

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the recipe's fields, without its name and description."""
        return hashlib.sha256(self.model_dump_json(exclude={"name", "description"}).encode()).hexdigest()

    @property
    def propagates(self) -> bool:
        """Whether the quantized layers' outputs calibrate the next layer: rounding corrects what they have done."""
        return self.calibration.propagate == "quantized" or self.rounding != "nearest"

    def changed(self, ignore: Iterable[str] = (), kv_cache: str | None = None, rounding: str | None = None) -> Recipe:
        """Returns the recipe with the `ignore` patterns added as `none` overrides, and with the others if given.

        Raises RecipeError if the result is invalid.
        """
        fields = self.model_dump()
        fields["overrides"] = [*fields["overrides"], *({"pattern": pattern, "recipe": KEEP} for pattern in ignore)]
        fields["kv_cache"] = kv_cache or self.kv_cache
        fields["rounding"] = rounding or self.rounding
        return recipe_from(fields, f"recipe {self.name}")


@cache
def _configs() -> Path:
    """Returns the directory of the built-in recipes."""
    return Path(__file__).parent / "configs"


@cache
def recipe_names() -> list[str]:
    """Returns the names of the built-in recipes, sorted."""
    return sorted(path.stem for path in _configs().glob("*.yaml"))


def _nearest(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return (f"did you mean {near[0]!r}? " if near else "") + f"the built-in recipes are {', '.join(known)}"


def load_recipe(name: str) -> Recipe:
    """Loads a built-in recipe, a recipe from a YAML file, or an FP8 recipe of ModelOpt.

    `name` is a built-in name, a path ending in .yaml or .yml, or the name of a ModelOpt recipe
    (`general/ptq/fp8_default-kv_fp8`) or config (`FP8_DEFAULT_CFG`). Raises RecipeError for an unknown name, suggesting
    a similar one, and for an invalid file, listing all of its problems.
    """
    if name in recipe_names():
        return _built_in(name)
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


@cache
def _built_in(name: str) -> Recipe:
    return _load_yaml(_configs() / f"{name}.yaml")


def _load_yaml(path: Path) -> Recipe:
    try:
        fields = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise RecipeError(f"{path} is not a recipe: it must be a mapping with description, weights and hf")
    return recipe_from(fields | {"name": path.stem}, str(path))


def recipe_from(fields: dict[str, Any], where: str) -> Recipe:
    """Returns the recipe with these fields; raises RecipeError naming `where` and listing all problems."""
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        raise RecipeError(f"{where}: {'; '.join(_problems(fields, error))}") from error


def _problems(fields: dict[str, Any], error: ValidationError) -> list[str]:
    """Returns all problems, including contradictions, which pydantic checks only if all fields are valid."""
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
