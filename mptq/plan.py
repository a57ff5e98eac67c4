"""Everything that is known before the first tensor is read: what happens to each tensor, how many bytes, what is in the way.

No torch: `--dry-run` and `inspect` stop here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mptq.arch import naming
from mptq.arch.config import ModelConfig, from_args
from mptq.arch.naming import Copy, Linear
from mptq.arch.places import Part, dropped, locate
from mptq.checkpoint.index import Checkpoint, open_checkpoint
from mptq.errors import RecipeError
from mptq.recipe import CARRIED, ROWS, Recipe, Scheme, load_recipe, recipe_names
from mptq.schemes import schemes_by_linear
from mptq.types import TensorSpec
from mptq.writers.dialects import DIALECTS, Contents

FORMATS = ("hf", "megatron")


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its index, its model, and where each inner tensor is."""

    checkpoint: Checkpoint
    model: ModelConfig
    places: Mapping[str, tuple[Part, ...]]

    @property
    def dropped(self) -> dict[str, str]:
        """Keys of the checkpoint that no output has, with the reason."""
        keys = [*self.checkpoint.tensors, *self.checkpoint.blobs]
        return dropped(keys)

    def dtype(self, inner: str) -> str:
        """The dtype in which the checkpoint stores an inner tensor."""
        return self.checkpoint.tensors[self.places[inner][0].key].spec.dtype


def open_source(path: Path) -> Source:
    """Open the checkpoint at `path` and find its model; raises CheckpointError or UnsupportedModelError."""
    checkpoint = open_checkpoint(path)
    specs = checkpoint.specs
    model = from_args(checkpoint.args, checkpoint.args_source, specs)
    return Source(checkpoint, model, locate(specs, model))


@dataclass(frozen=True)
class Plan:
    """What a run will do."""

    source: Source
    recipe: Recipe
    formats: tuple[str, ...]

    @property
    def model(self) -> ModelConfig:
        """The model's config."""
        return self.source.model

    @cached_property
    def linears(self) -> tuple[Linear, ...]:
        """The linears of each layer."""
        return naming.layer_linears(self.model)

    @cached_property
    def wanted(self) -> Mapping[tuple[int, str], Scheme | None]:
        """What the recipe says of each linear, before its dimensions are looked at; raises RecipeError for bad patterns."""
        return schemes_by_linear(self.recipe, self.model.num_layers, self.linears)

    def scheme(self, form: str, layer: int, linear: Linear) -> Scheme | None:
        """How an output holds a linear, or None for one that keeps its precision."""
        wanted = self.wanted[layer, linear.megatron]
        if wanted is None or linear.fits(wanted.unit) or (form == "megatron" and wanted.scale == "block"):
            return wanted
        return ROWS if self.recipe.misaligned == "per-channel" else None

    def _layer_linears(self) -> Iterator[tuple[int, Linear]]:
        return ((layer, linear) for layer in range(self.model.num_layers) for linear in self.linears)

    @cached_property
    def contents(self) -> Contents:
        """What the Hugging Face output holds: modules by scheme, and those that engines must not expect in FP8."""
        groups: dict[Scheme | None, list[str]] = {None: ["lm_head"]}
        # A copied matrix of a layer (a router) is a linear to engines.
        routers = [copy.hf.removesuffix(".weight") for copy in naming.layer_copies(self.model) if len(copy.shape) == 2]
        for layer in range(self.model.num_layers):
            prefix = naming.hf_layer(layer)
            groups[None] += [prefix + name for name in routers]
            for linear in self.linears:
                groups.setdefault(self.scheme("hf", layer, linear), []).extend(prefix + name for name in linear.hf)
        excluded = groups.pop(None)
        return Contents({scheme: found for scheme, found in groups.items() if scheme}, excluded, self.kv_cache)

    @property
    def excluded(self) -> list[str]:
        """Hugging Face modules that keep their precision."""
        return list(self.contents.excluded)

    @property
    def kv_cache(self) -> bool:
        """Whether the outputs hold scales of K and V."""
        return self.recipe.kv_cache == "fp8"

    @property
    def dialect(self) -> str:
        """The dialect of the Hugging Face output: the recipe's, unless it cannot hold all the schemes together."""
        used = [scheme.name for scheme in self.contents.groups]
        alone = self.recipe.hf == "compressed-tensors" or len(used) == 1
        return self.recipe.hf if alone and set(used) <= set(CARRIED[self.recipe.hf]) else "compressed-tensors"

    @property
    def deviating(self) -> dict[str, Scheme | None]:
        """Megatron's modules that the Megatron output does not hold in the recipe's own scheme."""
        found = {
            naming.megatron_layer(layer) + linear.megatron: self.scheme("megatron", layer, linear)
            for layer, linear in self._layer_linears()
        }
        return {name: scheme for name, scheme in found.items() if scheme != self.recipe.scheme}

    @property
    def differing(self) -> list[str]:
        """Inner names of the weights that the two outputs cannot hold with the same numbers."""
        return [
            f"{naming.megatron_layer(layer)}{linear.megatron}.weight"
            for layer, linear in self._layer_linears()
            if not self.same_numbers(layer, linear)
        ]

    def same_numbers(self, layer: int, linear: Linear) -> bool:
        """Whether both outputs hold a linear with the same numbers."""
        fused, split = self.scheme("megatron", layer, linear), self.scheme("hf", layer, linear)
        return fused == split and (fused is None or not linear.crosses(fused.block))

    def hf_linear_specs(self, layer: int, linear: Linear) -> Iterator[TensorSpec]:
        """Output tensors of one linear in the Hugging Face form: of each projection its weight, scale and input scale."""
        dialect, scheme = DIALECTS[self.dialect], self.scheme("hf", layer, linear)
        for member, shape in linear.members:
            name = naming.hf_layer(layer) + member
            if scheme is None:
                yield TensorSpec(f"{name}.weight", self.source.dtype(_inner(layer, linear)), shape)
                continue
            yield TensorSpec(f"{name}.weight", "float8_e4m3fn", shape)
            yield dialect.scale(name, scheme, *shape)
            if scheme.static:
                yield dialect.input_scale(name)

    def megatron_linear_specs(self, layer: int, linear: Linear) -> Iterator[TensorSpec]:
        """Output tensors of one linear in the Megatron form (its byte items not counted)."""
        name = naming.megatron_layer(layer) + linear.megatron
        rows, columns = linear.shape
        scheme = self.scheme("megatron", layer, linear)
        dtype = self.source.dtype(_inner(layer, linear)) if scheme is None else "float8_e4m3fn"
        for key in linear.keys:
            yield TensorSpec(f"{name}.{key}", dtype, (rows // len(linear.keys), columns))
        if scheme is None:
            return
        grid = scheme.grid(rows, columns)
        if scheme.scale != "mx":
            yield TensorSpec(f"{name}.weight_quantizer._amax", "float32", grid or (1,))
        yield TensorSpec(f"{name}.weight_quantizer._scale", scheme.scale_dtype, grid)
        if scheme.static:
            yield TensorSpec(f"{name}.input_quantizer._amax", "float32", (1,))

    def kv_specs(self, form: str, layer: int) -> tuple[TensorSpec, TensorSpec]:
        """The scales (Hugging Face) or largest magnitudes (Megatron) of a layer's K and V."""
        if form == "hf":
            return DIALECTS[self.dialect].kv_scales(naming.hf_layer(layer))
        prefix = f"{naming.megatron_layer(layer)}{naming.CORE_ATTENTION}."
        key, value = (TensorSpec(f"{prefix}{kind}_bmm_quantizer._amax", "float32", ()) for kind in "kv")
        return key, value

    def copy_spec(self, form: str, copy: Copy, layer: int | None = None) -> TensorSpec:
        """The output tensor of a copied one."""
        prefix = "" if layer is None else naming.megatron_layer(layer)
        dtype = self.source.dtype(prefix + copy.megatron)
        if form == "megatron":
            return TensorSpec(prefix + (copy.key or copy.megatron), dtype, copy.shape)
        return TensorSpec(copy.hf if layer is None else naming.hf_layer(layer) + copy.hf, dtype, copy.hf_shape)

    def specs(self, form: str) -> list[TensorSpec]:
        """Every tensor of an output, in the order in which it is written."""
        by_linear = self.hf_linear_specs if form == "hf" else self.megatron_linear_specs
        first, *last = naming.outer_copies(self.model)
        specs = [self.copy_spec(form, first)]
        for layer in range(self.model.num_layers):
            specs += [self.copy_spec(form, copy, layer) for copy in naming.layer_copies(self.model)]
            for linear in self.linears:
                specs += by_linear(layer, linear)
            if self.kv_cache:
                specs += self.kv_specs(form, layer)
        return specs + [self.copy_spec(form, copy) for copy in last]

    @property
    def bytes_in(self) -> int:
        """Bytes of the model's tensors in the checkpoint."""
        return sum(tensor.spec.nbytes for name, tensor in self.source.checkpoint.tensors.items() if name in self._keys)

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(part.key for parts in self.source.places.values() for part in parts)

    def bytes_out(self, form: str) -> int:
        """Bytes of the tensors of an output."""
        return sum(spec.nbytes for spec in self.specs(form))


def _inner(layer: int, linear: Linear) -> str:
    return f"{naming.megatron_layer(layer)}{linear.megatron}.weight"


def make_plan(path: Path, recipe: Recipe | str, formats: Sequence[str] = ("hf",)) -> Plan:
    """Plan a run on the checkpoint at `path`.

    Raises CheckpointError, UnsupportedModelError or RecipeError when the run cannot succeed; reads metadata only.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise RecipeError(f"unknown format {', '.join(unknown) or '(none)'}: there are {', '.join(FORMATS)}")
    return plan_source(open_source(path), recipe, tuple(form for form in FORMATS if form in formats))


def plan_source(source: Source, recipe: Recipe, formats: tuple[str, ...]) -> Plan:
    """Plan a run on an opened checkpoint; raises RecipeError when the recipe does not fit the model."""
    plan = Plan(source, recipe, formats)
    check_schemes(plan)
    return plan


def check_schemes(plan: Plan) -> None:
    """Refuse, with RecipeError, a recipe that quantizes nothing of an output or mixes what no engine reads together."""
    wanted = {scheme for scheme in plan.wanted.values() if scheme is not None}
    if not wanted:
        raise RecipeError(f"{plan.recipe.name}: every linear is ignored, so nothing would be quantized")
    if "hf" not in plan.formats:
        return
    if plan.recipe.misaligned == "error":
        _refuse_misaligned(plan)
    used = [scheme.name for scheme in plan.contents.groups]
    if not used:
        _refuse_nothing(plan)
    unreadable = [name for name in used if name not in CARRIED[plan.dialect]]
    if unreadable:
        raise RecipeError(
            f"{plan.recipe.name}: no Hugging Face form that engines read holds {' and '.join(used)} weights together: use one "
            "of them, or --format megatron"
        )


def _misaligned(plan: Plan) -> list[str]:
    """Modules of the first layer that has any whose dimensions rule the recipe's scheme out in the hf output."""
    for layer in range(plan.model.num_layers):
        found = [
            naming.hf_layer(layer) + name
            for linear in plan.linears
            if (wanted := plan.wanted[layer, linear.megatron]) is not None and not linear.fits(wanted.unit)
            for name in linear.hf
        ]
        if found:
            return found
    return []


def _refuse_misaligned(plan: Plan) -> None:
    found = _misaligned(plan)
    if found:
        raise RecipeError(
            f"{plan.recipe.name}: {', '.join(found)} (and their like in other layers) are not whole blocks, and the recipe "
            "says `misaligned: error`: use `misaligned: keep` or `per-channel`"
        )


def _refuse_nothing(plan: Plan) -> None:
    others = [name for name in recipe_names() if load_recipe(name).scheme.unit == (1, 1)]
    sizes = sorted({size for linear in plan.linears for _, shape in linear.members for size in shape})
    raise RecipeError(
        f"{plan.recipe.name}: no linear of this model has rows and columns that are all multiples of "
        f"{plan.recipe.weights.block_size} (sizes {', '.join(map(str, sizes))}), so nothing would be quantized in the hf "
        f"output: use --recipe {' or '.join(others)}, or --format megatron"
    )
