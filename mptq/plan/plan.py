"""Everything that is known before the first tensor is read: what happens to each tensor, how many bytes, what is in the way.

No torch: `--dry-run` and `inspect` stop here.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mptq.checkpoint.contents import require_weights
from mptq.checkpoint.index import Checkpoint, open_checkpoint
from mptq.errors import RecipeError, UnsupportedModelError
from mptq.formats.hf.quantization_config import DIALECTS, Contents
from mptq.model import engines, tensors
from mptq.model.architectures.families import family_of, nearest
from mptq.model.checkpoint_keys import TensorSlice, carried, dropped, locate
from mptq.model.config import ModelConfig, model_config
from mptq.model.generation import GenerationSource
from mptq.model.settings.from_hf_config import generation_sources
from mptq.model.settings.from_run_config import generation_fields
from mptq.model.settings.resolve import resolve
from mptq.model.tensors import LinearSpec, UnquantizedTensor
from mptq.recipes.overrides import require_whole_groups, schemes_by_linear
from mptq.recipes.recipe import CARRIED, ROWS, Recipe, Scheme, load_recipe, recipe_names
from mptq.types import TensorSpec

FORMATS = ("hf", "megatron")


@dataclass(frozen=True, slots=True)
class SourceOptions:
    """Which checkpoint of a root is meant, and what the user says of its architecture.

    `iteration` is one of the root's, None for its latest. `config` are `key=value`, `hf_config` is a Hugging Face directory or
    config.json; both stand above what the checkpoint says. `tokenizer` is a directory in the place of the tokenizer that the
    checkpoint names.
    """

    iteration: int | None = None
    config: tuple[str, ...] = ()
    hf_config: Path | None = None
    tokenizer: Path | None = None


@dataclass(frozen=True)
class Source:
    """An opened checkpoint: its index, its model, where each inner tensor is, and what it or the user says of generation."""

    checkpoint: Checkpoint
    model: ModelConfig
    places: Mapping[str, tuple[TensorSlice, ...]]
    generation: tuple[GenerationSource, ...] = ()

    @property
    def dropped(self) -> dict[str, str]:
        """Keys of the checkpoint that no output has, with the reason."""
        keys = [*self.checkpoint.tensors, *self.checkpoint.blobs]
        return dropped(keys)

    def dtype(self, inner: str) -> str:
        """The dtype in which the checkpoint stores an inner tensor."""
        return self.checkpoint.tensors[self.places[inner][0].key].spec.dtype


def open_source(path: Path, options: SourceOptions | None = None) -> Source:
    """Open the checkpoint at `path` and find its model.

    Raises CheckpointError, also for one without weights to quantize, UnsupportedModelError, or OptionError for bad `options`.
    """
    options = options or SourceOptions()
    checkpoint = open_checkpoint(path, options.iteration)
    require_weights(checkpoint)
    specs = checkpoint.specs
    model = model_config(resolve(checkpoint, options.config, options.hf_config, options.tokenizer), specs)
    told = GenerationSource(checkpoint.config_source, generation_fields(checkpoint.config), whole=True)
    beside = () if options.hf_config is None else generation_sources(options.hf_config)
    return Source(checkpoint, model, locate(specs, model), (*((told,) if told.fields else ()), *beside))


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

    @property
    def layers(self) -> range:
        """The layers' numbers, from 0."""
        return range(self.model.num_layers)

    def linears(self, layer: int) -> tuple[LinearSpec, ...]:
        """The linears of a layer."""
        return tensors.layer_linears(self.model, layer)

    def copies(self, layer: int) -> tuple[UnquantizedTensor, ...]:
        """The tensors of a layer that keep their precision."""
        return tensors.layer_copies(self.model, layer)

    @cached_property
    def carried(self) -> tuple[UnquantizedTensor, ...]:
        """The tensors that only the Megatron output has, as they are; none where it is not written."""
        if "megatron" not in self.formats:
            return ()
        places = self.source.places
        return tuple(UnquantizedTensor(name, (), places[name][0].shape, places[name][0].shape[0]) for name in carried(places))

    @property
    def dropped(self) -> dict[str, str]:
        """Keys of the checkpoint that no output has, with the reason."""
        if "megatron" in self.formats:
            return self.source.dropped
        keys = (part.key for name in carried(self.source.places) for part in self.source.places[name])
        return self.source.dropped | dict.fromkeys(keys, "multi-token prediction, which only the Megatron output has")

    @property
    def outputs(self) -> int:
        """How many pieces the run is made of: what stands before the layers, each layer, what follows, each carried tensor."""
        return self.model.num_layers + 2 + len(self.carried)

    @cached_property
    def weights(self) -> dict[int, int]:
        """Bytes that the outputs have of each unit."""
        found = dict.fromkeys(range(self.outputs), 0)
        for form in self.formats:
            for inner, specs in self.by_inner(form):
                found[self.unit_of(inner)] += sum(spec.nbytes for spec in specs)
        return found

    def unit_of(self, inner: str) -> int:
        """Which of the `outputs` an inner tensor is in."""
        if inner.startswith(tensors.LAYERS):
            return int(inner.removeprefix(tensors.LAYERS).partition(".")[0]) + 1
        return self._outer[inner]

    @cached_property
    def _outer(self) -> dict[str, int]:
        before, after = tensors.outer_copies(self.model)
        found = dict.fromkeys((copy.megatron for copy in before), 0)
        found |= dict.fromkeys((copy.megatron for copy in after), self.model.num_layers + 1)
        return found | {copy.megatron: self.model.num_layers + 2 + number for number, copy in enumerate(self.carried)}

    def written(self, form: str, units: Container[int]) -> frozenset[str]:
        """Names of an output's tensors that are in `units`."""
        return frozenset(spec.name for inner, specs in self.by_inner(form) if self.unit_of(inner) in units for spec in specs)

    @cached_property
    def wanted(self) -> Mapping[tuple[int, str], Scheme | None]:
        """What the recipe says of each linear, before its dimensions are looked at; raises RecipeError for bad patterns."""
        return schemes_by_linear(self.recipe, self.model)

    def scheme(self, form: str, layer: int, linear: LinearSpec) -> Scheme | None:
        """How an output holds a linear, or None for one that keeps its precision."""
        wanted = self.wanted[layer, linear.megatron]
        if wanted is None or (form == "megatron" and wanted.scale == "block"):
            return wanted
        if self.fits(layer, linear) if form == "hf" else linear.fits(wanted.unit):
            return wanted
        return ROWS if self.recipe.misaligned == "per-channel" else None

    def fits(self, layer: int, linear: LinearSpec) -> bool:
        """Whether engines read the recipe's scheme of a linear, and of all that they fuse with it."""
        wanted = self.wanted[layer, linear.megatron]
        return wanted is None or engines.groups(self.model, layer)[linear.megatron].fits(wanted.unit)

    def sharing(self, layer: int, linear: LinearSpec) -> tuple[LinearSpec, ...]:
        """The linears that have one scale together, this one among them: fused ones, where a scale belongs to a tensor."""
        wanted, group = self.wanted[layer, linear.megatron], engines.groups(self.model, layer)[linear.megatron]
        if wanted is None or wanted.scale != "tensor" or not group.fused:
            return (linear,)
        return tuple(other for other in group.linears if self.wanted[layer, other.megatron] == wanted)

    def every_linear(self) -> Iterator[tuple[int, LinearSpec]]:
        """The linears of all layers, with their layers."""
        return ((layer, linear) for layer in self.layers for linear in self.linears(layer))

    @cached_property
    def contents(self) -> Contents:
        """What the Hugging Face output holds: modules by scheme, and those that engines must not expect in FP8."""
        groups: dict[Scheme | None, list[str]] = {None: ["lm_head"]}
        for layer in self.layers:
            prefix = tensors.hf_layer(self.model, layer)
            # A copied matrix of a layer (a router) is a linear to engines.
            matrices = [copy for copy in self.copies(layer) if len(copy.shape) == 2]
            groups[None] += [prefix + name.removesuffix(".weight") for copy in matrices for name in copy.hf]
            for linear in self.linears(layer):
                groups.setdefault(self.scheme("hf", layer, linear), []).extend(prefix + name for name in linear.hf)
        excluded = groups.pop(None)
        return Contents({scheme: found for scheme, found in groups.items() if scheme}, excluded, self.kv_cache)

    @property
    def excluded(self) -> list[str]:
        """Hugging Face modules that keep their precision beside those that do not."""
        return list(self.contents.excluded) if self.contents.groups else []

    @property
    def kv_cache(self) -> bool:
        """Whether the outputs hold scales of an FP8 cache."""
        return self.recipe.kv_cache == "fp8"

    @property
    def dialect(self) -> str:
        """The dialect of the Hugging Face output: the recipe's, unless it cannot hold all the schemes together."""
        used = [scheme.name for scheme in self.contents.groups]
        if not used:
            return "plain"
        alone = self.recipe.hf == "compressed-tensors" or len(used) == 1
        return self.recipe.hf if alone and set(used) <= set(CARRIED[self.recipe.hf]) else "compressed-tensors"

    @property
    def deviating(self) -> dict[str, Scheme | None]:
        """Megatron's modules that the Megatron output does not hold in the recipe's own scheme."""
        found = {
            tensors.megatron_layer(layer) + linear.megatron: self.scheme("megatron", layer, linear)
            for layer, linear in self.every_linear()
        }
        return {name: scheme for name, scheme in found.items() if scheme != self.recipe.scheme}

    @property
    def differing(self) -> list[str]:
        """Inner names of the weights that the two outputs cannot hold with the same numbers."""
        return [
            f"{tensors.megatron_layer(layer)}{linear.megatron}.weight"
            for layer, linear in self.every_linear()
            if not self.same_numbers(layer, linear)
        ]

    def same_numbers(self, layer: int, linear: LinearSpec) -> bool:
        """Whether both outputs hold a linear with the same numbers."""
        fused, split = self.scheme("megatron", layer, linear), self.scheme("hf", layer, linear)
        return fused == split and (fused is None or not linear.crosses(fused.block))

    def hf_linear_specs(self, layer: int, linear: LinearSpec) -> Iterator[TensorSpec]:
        """Output tensors of one linear in the Hugging Face form: of each projection its weight, scale and input scale."""
        dialect, scheme = DIALECTS[self.dialect], self.scheme("hf", layer, linear)
        for member, shape in linear.members:
            name = tensors.hf_layer(self.model, layer) + member
            if scheme is None:
                yield TensorSpec(f"{name}.weight", self.source.dtype(_inner(layer, linear)), shape)
                continue
            yield TensorSpec(f"{name}.weight", "float8_e4m3fn", shape)
            yield dialect.scale(name, scheme, *shape)
            if scheme.static:
                yield dialect.input_scale(name)

    def megatron_linear_specs(self, layer: int, linear: LinearSpec) -> Iterator[TensorSpec]:
        """Output tensors of one linear in the Megatron form (its byte items not counted)."""
        name = tensors.megatron_layer(layer) + linear.megatron
        rows, columns = linear.shape
        scheme = self.scheme("megatron", layer, linear)
        dtype = self.source.dtype(_inner(layer, linear)) if scheme is None else "float8_e4m3fn"
        for key, count in zip(linear.keys, linear.key_rows, strict=True):
            yield TensorSpec(f"{name}.{key}", dtype, (count, columns))
        if scheme is None:
            return
        grid = scheme.grid(rows, columns)
        if scheme.scale != "mx":
            yield TensorSpec(f"{name}.weight_quantizer._amax", "float32", grid or (1,))
        yield TensorSpec(f"{name}.weight_quantizer._scale", scheme.scale_dtype, grid)
        if scheme.static:
            yield TensorSpec(f"{name}.input_quantizer._amax", "float32", (1,))

    def kv_specs(self, form: str, layer: int) -> tuple[TensorSpec, TensorSpec]:
        """The scales (Hugging Face) or largest magnitudes (Megatron) of what is `cached` of a layer."""
        if form == "hf":
            return DIALECTS[self.dialect].kv_scales(tensors.hf_layer(self.model, layer))
        prefix = f"{tensors.megatron_layer(layer)}{tensors.CORE_ATTENTION}."
        key, value = (TensorSpec(f"{prefix}{kind}_bmm_quantizer._amax", "float32", ()) for kind in "kv")
        return key, value

    def copy_specs(self, form: str, copy: UnquantizedTensor, layer: int | None = None) -> tuple[TensorSpec, ...]:
        """The output tensors of a copied one."""
        prefix = "" if layer is None else tensors.megatron_layer(layer)
        dtype = self.source.dtype(prefix + copy.megatron)
        if form == "hf":
            prefix = "" if layer is None else tensors.hf_layer(self.model, layer)
            named = zip(copy.hf, copy.hf_shapes, strict=True) if copy.hf else ()
            return tuple(TensorSpec(prefix + name, dtype, shape) for name, shape in named)
        first, *rest = self.source.places[prefix + copy.megatron]
        if not copy.keys:
            # Under the name that the checkpoint has for it: models of Transformer Engine and of megatron-core fuse norms apart.
            return (TensorSpec(prefix + copy.megatron if rest else first.spelled, dtype, copy.shape),)
        owner = (prefix + copy.megatron).rpartition(".")[0]
        parts = zip(copy.keys, copy.key_rows, strict=True)
        return tuple(TensorSpec(f"{owner}.{key}", dtype, (rows, *copy.shape[1:])) for key, rows in parts)

    def specs(self, form: str) -> list[TensorSpec]:
        """Every tensor of an output, in the order in which it is written."""
        return self._specs[form]

    @cached_property
    def _specs(self) -> dict[str, list[TensorSpec]]:
        return {form: [spec for _, specs in self.by_inner(form) for spec in specs] for form in FORMATS}

    def by_inner(self, form: str) -> Iterator[tuple[str, tuple[TensorSpec, ...]]]:
        """The tensors of an output, by the inner name of what they are made from; scales of a cache by their attention's."""
        by_linear = self.hf_linear_specs if form == "hf" else self.megatron_linear_specs
        before, after = tensors.outer_copies(self.model)
        for copy in before:
            yield copy.megatron, self.copy_specs(form, copy)
        for layer in self.layers:
            prefix = tensors.megatron_layer(layer)
            for copy in self.copies(layer):
                yield prefix + copy.megatron, self.copy_specs(form, copy, layer)
            for linear in self.linears(layer):
                yield f"{prefix}{linear.megatron}.weight", tuple(by_linear(layer, linear))
            if self.has_cache(layer):
                yield prefix + tensors.CORE_ATTENTION, self.kv_specs(form, layer)
        for copy in (*after, *self.carried):
            yield copy.megatron, self.copy_specs(form, copy)

    @property
    def runs(self) -> bool:
        """Whether activations can go through the layers; where nothing is quantized, they would find nothing."""
        return not self.model.not_run and self.recipe.scheme is not None

    def require_runnable(self) -> None:
        """Raise UnsupportedModelError where the recipe calibrates on data and the model does not run here."""
        if self.recipe.needs_data and self.model.not_run:
            raise UnsupportedModelError(
                f"recipe {self.recipe.name} calibrates on data, and this model has {'; '.join(self.model.not_run)}: use a "
                "recipe without data (see `mptq recipes`)"
            )

    def has_cache(self, layer: int) -> bool:
        """Whether a layer's cache has scales in the outputs."""
        return self.kv_cache and self.model.kinds[layer].mixer in tensors.CACHED

    def cached(self, form: str, layer: int) -> tuple[str, ...]:
        """What an output's scales of a layer's cache are of, the k_scale's and the v_scale's; nothing where it has none."""
        return tensors.CACHED[self.model.kinds[layer].mixer][form] if self.has_cache(layer) else ()

    @property
    def bytes_in(self) -> int:
        """Bytes of the model's tensors in the checkpoint that an output has."""
        keys = self._keys - self.dropped.keys()
        return sum(tensor.spec.nbytes for name, tensor in self.source.checkpoint.tensors.items() if name in keys)

    @cached_property
    def _keys(self) -> frozenset[str]:
        return frozenset(part.key for parts in self.source.places.values() for part in parts)

    def bytes_out(self, form: str) -> int:
        """Bytes of the tensors of an output."""
        return sum(spec.nbytes for spec in self.specs(form))


def _inner(layer: int, linear: LinearSpec) -> str:
    return f"{tensors.megatron_layer(layer)}{linear.megatron}.weight"


def make_plan(path: Path, recipe: Recipe | str, formats: Sequence[str] = ("hf",), options: SourceOptions | None = None) -> Plan:
    """Plan a run on the checkpoint at `path`, which `options` choose and describe further.

    Raises CheckpointError, OptionError, UnsupportedModelError or RecipeError when the run cannot succeed; reads metadata only.
    """
    recipe = load_recipe(recipe) if isinstance(recipe, str) else recipe
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise RecipeError(f"unknown format {', '.join(unknown) or '(none)'}: there are {', '.join(FORMATS)}")
    return plan_source(open_source(path, options), recipe, tuple(form for form in FORMATS if form in formats))


def plan_source(source: Source, recipe: Recipe, formats: tuple[str, ...]) -> Plan:
    """Plan a run on an opened checkpoint; raises RecipeError when the recipe does not fit the model."""
    plan = Plan(source, recipe, formats)
    check_schemes(plan)
    return plan


def check_schemes(plan: Plan) -> None:
    """Refuse, with RecipeError, a recipe that quantizes nothing of an output or mixes what no engine reads together."""
    wanted = {scheme for scheme in plan.wanted.values() if scheme is not None}
    if plan.recipe.scheme is None and "megatron" in plan.formats:
        raise RecipeError(
            f"{plan.recipe.name} converts to Hugging Face's form, and the checkpoint is Megatron's: use --format hf"
        )
    if not wanted and plan.recipe.scheme is not None:
        raise RecipeError(f"{plan.recipe.name}: every linear is ignored, so nothing would be quantized")
    if "hf" not in plan.formats:
        return
    _require_family(plan)
    require_whole_groups(plan.recipe, plan.model, plan.wanted)
    if not wanted:
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


def _require_family(plan: Plan) -> None:
    if family_of(plan.model) is None:
        near = nearest(plan.model)
        raise UnsupportedModelError(
            f"no Hugging Face architecture that mptq writes expresses this model; the nearest, {near.name}, differs in "
            f"{'; '.join(near.missing(plan.model))}: use --format megatron"
        )


def _misaligned(plan: Plan) -> list[str]:
    """Modules of the first layer that has any whose dimensions rule the recipe's scheme out in the hf output."""
    for layer in plan.layers:
        found = [
            tensors.hf_layer(plan.model, layer) + name
            for linear in plan.linears(layer)
            if not plan.fits(layer, linear)
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
    schemes = {name: load_recipe(name).scheme for name in recipe_names()}
    others = [name for name, scheme in schemes.items() if scheme is not None and scheme.unit == (1, 1)]
    sizes = sorted({size for _, linear in plan.every_linear() for _, shape in linear.members for size in shape})
    assert plan.recipe.scheme is not None
    raise RecipeError(
        f"{plan.recipe.name}: no linear of this model has rows and columns that are all multiples of "
        f"{max(plan.recipe.scheme.unit)} (sizes {', '.join(map(str, sizes))}), so nothing would be quantized in the hf "
        f"output: use --recipe {' or '.join(others)}, or --format megatron"
    )
