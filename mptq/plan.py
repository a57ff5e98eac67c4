"""Everything that is known before the first tensor is read: what happens to each tensor, how many bytes, what is in the way.

No torch: `--dry-run` and `inspect` stop here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mptq.arch import naming
from mptq.arch.config import ModelConfig, from_args
from mptq.arch.naming import Copy, Linear, Part
from mptq.checkpoint.index import Checkpoint, open_checkpoint
from mptq.errors import RecipeError
from mptq.recipe import Recipe, load_recipe, recipe_names
from mptq.types import TensorSpec
from mptq.writers.dialects import DIALECTS

FORMATS = ("hf", "megatron")
IMPORTS_BYTES = 1_000_000_000
"""Resident memory of a process that has imported torch, megatron-core's layer and ModelOpt (scripts/bench_quantize.py)."""
SERVING_TP = (2, 4, 8)


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
        return naming.dropped(keys)

    def dtype(self, inner: str) -> str:
        """The dtype in which the checkpoint stores an inner tensor."""
        return self.checkpoint.tensors[self.places[inner][0].key].spec.dtype


def open_source(path: Path) -> Source:
    """Open the checkpoint at `path` and find its model; raises CheckpointError or UnsupportedModelError."""
    checkpoint = open_checkpoint(path)
    specs = checkpoint.specs
    model = from_args(checkpoint.args, checkpoint.args_source, specs)
    return Source(checkpoint, model, naming.locate(specs, model))


@dataclass(frozen=True)
class Plan:
    """What a run will do. `excluded` are the Hugging Face modules that keep their precision, lm_head always among them."""

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

    def in_hf(self, linear: Linear) -> bool:
        """Whether the Hugging Face output holds this linear quantized."""
        return linear.fits(self.recipe.block)

    @property
    def excluded(self) -> list[str]:
        """Hugging Face modules that engines must not expect in FP8."""
        modules = [
            naming.hf_layer(layer) + name
            for layer in range(self.model.num_layers)
            for linear in self.linears
            if not self.in_hf(linear)
            for name in linear.hf
        ]
        return ["lm_head", *modules]

    @property
    def differing(self) -> list[str]:
        """Inner names of the weights that the two outputs cannot hold with the same numbers."""
        return [
            f"{naming.megatron_layer(layer)}{linear.megatron}.weight"
            for layer in range(self.model.num_layers)
            for linear in self.linears
            if linear.crosses(self.recipe.block) or not self.in_hf(linear)
        ]

    def hf_linear_specs(self, layer: int, linear: Linear) -> Iterator[TensorSpec]:
        """Output tensors of one linear in the Hugging Face form."""
        dialect = DIALECTS[self.recipe.hf]
        dtype = self.source.dtype(f"{naming.megatron_layer(layer)}{linear.megatron}.weight")
        for member, shape in linear.members:
            name = naming.hf_layer(layer) + member
            if not self.in_hf(linear):
                yield TensorSpec(f"{name}.weight", dtype, shape)
                continue
            yield TensorSpec(f"{name}.weight", "float8_e4m3fn", shape)
            yield TensorSpec(f"{name}.{dialect.scale_name}", "float32", dialect.scale_shape(*shape))

    def megatron_linear_specs(self, layer: int, linear: Linear) -> Iterator[TensorSpec]:
        """Output tensors of one linear in the Megatron form (its byte items not counted)."""
        name = naming.megatron_layer(layer) + linear.megatron
        rows, columns = linear.shape
        grid = self.recipe.grid(rows, columns)
        for key in linear.keys:
            yield TensorSpec(f"{name}.{key}", "float8_e4m3fn", (rows // len(linear.keys), columns))
        yield TensorSpec(f"{name}.weight_quantizer._amax", "float32", grid or (1,))
        yield TensorSpec(f"{name}.weight_quantizer._scale", "float32", grid)

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

    @property
    def peak_memory(self) -> int:
        """Predicted peak resident memory, in bytes: imports, one layer compressed, one linear in ModelOpt or one copy.

        A compressed linear is in the layer and in the output at 1 byte each; ModelOpt holds the largest in float32, its
        quotient by the scale, the scale of every element, and the result: 13 bytes a parameter.
        """
        outer = max(self.copy_spec("megatron", copy).nbytes for copy in naming.outer_copies(self.model))
        numels = [TensorSpec("", "uint8", linear.shape).numel for linear in self.linears]
        largest = max(numels)
        return IMPORTS_BYTES + max(2 * outer, 2 * (sum(numels) - largest) + 13 * largest)

    @property
    def warnings(self) -> list[str]:
        """What the user should know before starting."""
        found = []
        ragged = [linear for linear in self.linears if not self.in_hf(linear)]
        if ragged and "hf" in self.formats:
            names = ", ".join(member.rpartition(".")[2] for linear in ragged for member in linear.hf)
            found.append(
                f"{names}: not multiples of {self.recipe.block}, so they stay {self.model.dtype} in the hf output (engines "
                "read a ragged grid of scales wrongly)"
            )
        if not self.source.checkpoint.args.get("vocab_size") and "hf" in self.formats:
            found.append(
                "the checkpoint does not say the size of its vocabulary: the hf output keeps all "
                f"{self.model.vocab_size} rows, padding included"
            )
        if len(self.formats) > 1 and self.differing:
            found.append(f"{len(self.differing)} weights cannot hold the same numbers in both outputs: see the report")
        limit = self._serving_limit()
        if limit is not None and "hf" in self.formats:
            found.append(f"blocks of {self.recipe.block} split evenly over tensor-parallel servers only up to TP={limit}")
        return found

    def _serving_limit(self) -> int | None:
        """The largest TP of SERVING_TP whose shards are whole blocks, when that is not the last; else None."""
        block = self.recipe.block
        quantized = [linear for linear in self.linears if self.in_hf(linear)]
        if block is None or not quantized:
            return None
        # Column-parallel linears are cut by rows of each member, row-parallel ones by columns.
        cut = [rows for linear in quantized if not linear.fusion.plain for rows in linear.fusion.rows]
        cut += [linear.in_features for linear in quantized if linear.fusion.plain]
        possible = [1, *(tp for tp in SERVING_TP if all(size % (tp * block) == 0 for size in cut))]
        return None if possible[-1] == SERVING_TP[-1] else possible[-1]

    def components(self) -> dict[str, dict[str, int]]:
        """Parameters and bytes by component: in the checkpoint ("in") and in each output."""
        table: dict[str, Counter[str]] = {}
        for inner, parts in self.source.places.items():
            row = table.setdefault(_component(inner), Counter())
            for part in parts:
                spec = TensorSpec(inner, self.source.dtype(inner), part.shape)
                row.update({"parameters": spec.numel, "in": spec.nbytes})
        for form in self.formats:
            for spec in self.specs(form):
                table[_component(spec.name)][form] += spec.nbytes
        return {name: dict(row) for name, row in table.items()}

    def actions(self) -> dict[str, str]:
        """What happens to each component, in words."""
        block = self.recipe.block
        schemes = {
            "block": f"FP8, {block}x{block} blocks",
            "row": "FP8, one scale a row",
            "tensor": "FP8, one scale a fused group",
        }
        scheme = schemes[self.recipe.weights.scale]
        words = {}
        for name in self.components():
            linears = [linear for linear in self.linears if _component(linear.megatron) == name]
            kept = [] if "hf" not in self.formats else [linear for linear in linears if not self.in_hf(linear)]
            if not linears or (kept == linears and self.formats == ("hf",)):
                words[name] = "copied"
            elif kept:
                members = ", ".join(member.rpartition(".")[2] for linear in kept for member in linear.hf)
                words[name] = f"{scheme}; {members} copied in hf"
            else:
                words[name] = scheme
        return words


_COMPONENTS = (
    ("norm", "norms"),
    ("embed", "embedding"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("mlp", "mlp"),
    ("output_layer", "output layer"),
    ("lm_head", "output layer"),
)


def _component(name: str) -> str:
    return next(component for part, component in _COMPONENTS if part in name)


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
    """Plan a run on an opened checkpoint; raises RecipeError when the recipe would quantize nothing of an output."""
    plan = Plan(source, recipe, formats)
    if "hf" in plan.formats and not any(plan.in_hf(linear) for linear in plan.linears):
        others = [name for name in recipe_names() if load_recipe(name).block is None]
        sizes = sorted({size for linear in plan.linears for _, shape in linear.members for size in shape})
        raise RecipeError(
            f"{recipe.name}: no linear of this model has rows and columns that are all multiples of {recipe.block} (sizes "
            f"{', '.join(map(str, sizes))}), so nothing would be quantized in the hf output: use --recipe "
            f"{' or '.join(others)}, or --format megatron"
        )
    return plan
