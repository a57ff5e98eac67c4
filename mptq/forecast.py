"""What a plan comes to: bytes by component, peak memory, and what the user should know before starting. No torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mptq.arch import naming
from mptq.arch.documents import unread
from mptq.arch.places import carried
from mptq.checkpoint.contents import foreign_code
from mptq.types import TensorSpec

if TYPE_CHECKING:
    from mptq.arch.naming import Linear
    from mptq.plan import Plan

IMPORTS_BYTES = 750_000_000
"""Resident memory of a process that has imported torch and transformers' configs (scripts/bench_quantize.py)."""
LAYER_BYTES = 250_000_000
"""What megatron-core's layer and ModelOpt add to it."""
_PIECE_BYTES = 1 << 26  # stream.PIECE_BYTES, which needs torch
SERVING_TP = (2, 4, 8)
_COMPONENTS = (
    ("mtp.", "multi-token prediction"),
    ("mixer", "mamba"),
    ("norm", "norms"),
    ("embedding", "embedding"),
    ("attention", "attention"),
    ("shared_experts", "shared experts"),
    ("experts", "experts"),
    ("router", "router"),
    ("mlp", "mlp"),
    ("output_layer", "output layer"),
)


def component(name: str) -> str:
    """The part of the model that an inner tensor or a module of Megatron belongs to, for people."""
    return next(found for part, found in _COMPONENTS if part in name)


@dataclass(frozen=True)
class Work:
    """What activations add to a run: hidden states in memory or in files, tokens of a batch, whether logits are compared."""

    stored_bytes: int
    file_bytes: int
    batch_tokens: int
    compares: bool


def peak_memory(plan: Plan, work: Work | None = None) -> int:
    """Predicted peak resident memory in bytes: the imports, and the largest of one layer, one copy and the output layer.

    A linear and the two that are read ahead are 2 bytes a parameter each (or one of these, and its projections, where they must
    be copied); it and the one that is being written 1 byte each in FP8, for each format. With activations there are the layer
    as it was, its input and output in float32 where the sums are made (on a CPU), and at the end the output layer's weight in
    its own and in float32.
    """
    copies = [copy for group in naming.outer_copies(plan.model) for copy in group]
    outer = max(spec.nbytes for copy in (*copies, *plan.carried) for spec in plan.copy_specs("megatron", copy))
    copied = 3 * outer if "megatron" in plan.formats else 4 * min(outer, _PIECE_BYTES)
    kinds = {kind: layer for layer, kind in enumerate(plan.model.kinds)}
    layer = max(_layer_memory(plan, layer, work) for layer in kinds.values())
    imports = IMPORTS_BYTES + (LAYER_BYTES if work or "megatron" in plan.formats else 0)
    if work is None:
        return imports + max(copied, layer)
    head = 3 * outer + _LOGITS_BYTES if work.compares else 0
    return imports + work.stored_bytes + max(copied, 2 * outer, layer, head)


def _layer_memory(plan: Plan, layer: int, work: Work | None) -> int:
    linears = plan.linears(layer)
    numels = [TensorSpec("", "uint8", linear.shape).numel for linear in linears]
    if not numels:
        return 0
    largest = max(numels)
    compressed = (6 + 2 * len(plan.formats)) * largest
    if work is None:
        return compressed
    batch = 8 * work.batch_tokens * max(sum(linear.shape) for linear in linears)
    return 2 * sum(numels) + max(compressed, batch + 4 * largest)


_LOGITS_BYTES = 6 * 4 * 2**23
"""Logits of both streams, their logarithms and the products of these, of as many tokens as are compared at once."""


def warnings(plan: Plan) -> list[str]:
    """What the user should know before starting."""
    found = foreign_code(plan.source.checkpoint)
    return [
        *found,
        *_precision(plan),
        *_vocabulary(plan),
        *_differences(plan),
        *_serving(plan),
        *_left_out(plan),
        *_cache(plan),
        *_settings(plan),
    ]


def _left_out(plan: Plan) -> list[str]:
    notes = []
    prediction = carried(plan.source.places)
    if prediction and "hf" in plan.formats:
        notes.append(f"{len(prediction)} tensors of multi-token prediction layers are not in the hf output")
    epsilon = naming.names(plan.model).latent_epsilon
    if "hf" in plan.formats and epsilon not in (None, plan.model.norm_epsilon):
        notes.append(
            f"transformers normalizes latents with epsilon {epsilon:g} whatever config.json says, and the model has "
            f"{plan.model.norm_epsilon:g}: its logits differ a little there; vLLM and SGLang read config.json"
        )
    if "hf" in plan.formats:
        notes += naming.names(plan.model).deviations(plan.model)
    if plan.model.not_run and plan.recipe.scheme is not None:
        notes.append(f"no fidelity figures: this model has {'; '.join(plan.model.not_run)}")
    return notes


def _cache(plan: Plan) -> list[str]:
    """Scales of a cache that are not of what engines cache, because ModelOpt's quantizers see something else."""
    if "megatron" not in plan.formats or all(plan.cached("megatron", one) == plan.cached("hf", one) for one in plan.layers):
        return []
    return [
        "the megatron output's cache scales are of decompressed K and V, which ModelOpt's quantizers see there: engines cache "
        "latents, whose scales only the hf output has"
    ]


def _settings(plan: Plan) -> list[str]:
    notes = [f"the checkpoint's sources disagree: {conflict}" for conflict in plan.model.settings.conflicts]
    unknown = unread(plan.source.checkpoint.config)
    if unknown:
        notes.append(
            f"{plan.source.checkpoint.config_source} has settings that mptq does not know ({', '.join(unknown)}): if one of "
            "them changes what the model computes, the output is not that model"
        )
    return notes + (_positions(plan) if "hf" in plan.formats else [])


def _positions(plan: Plan) -> list[str]:
    """What the Hugging Face output says of positions that the checkpoint does not."""
    settings, context = plan.model.settings, plan.model.context
    notes = []
    if context.known_from == "training":
        notes.append(
            f"max_position_embeddings is {context.length}, the sequence length of the training, as the checkpoint does not say "
            "how many positions the model has: pass --hf-config DIR, or --config max_position_embeddings=N"
        )
    elif context.known_from == "tokenizer":
        notes.append(
            f"max_position_embeddings is {context.length}, the tokenizer's model_max_length, as the checkpoint says only the "
            f"sequence length of the training, {settings.get('seq_length')}: if the model has fewer positions, pass "
            "--hf-config DIR, or --config max_position_embeddings=N"
        )
    rounded = "yarn_correction_range_round_to_int"
    stretched = plan.model.latent is None and plan.model.features["rope scaling"] == "yarn"
    if stretched and rounded in settings and settings[rounded] is None:
        notes.append(
            f"{settings.sources[rounded]} has no value for {rounded}: megatron-core then does not round the range of "
            "dimensions that YaRN interpolates, but Hugging Face models do, and so does this output: if the model was trained "
            f"without rounding, pass --config {rounded}=false"
        )
    return notes


def _precision(plan: Plan) -> list[str]:
    if "hf" not in plan.formats:
        return []
    found: dict[str, dict[str, None]] = {}
    for layer, linear in plan.every_linear():
        wanted = plan.wanted[layer, linear.megatron]
        if wanted is None or linear.fits(wanted.unit):
            continue
        kept = plan.scheme("hf", layer, linear)
        into = f"stay {plan.model.dtype}" if kept is None else "get one scale a row"
        names = found.setdefault(f"not multiples of {max(wanted.unit)}, so they {into} in the hf output", {})
        names |= dict.fromkeys(member.rpartition(".")[2] for member in linear.hf)
    return [f"{', '.join(names)}: {what} (engines read a ragged grid of scales wrongly)" for what, names in found.items()]


def _vocabulary(plan: Plan) -> list[str]:
    if plan.model.settings.get("vocab_size") or "hf" not in plan.formats:
        return []
    return [
        "the checkpoint does not say the size of its vocabulary: the hf output keeps all "
        f"{plan.model.vocab_size} rows, padding included"
    ]


def _differences(plan: Plan) -> list[str]:
    if len(plan.formats) == 1 or not plan.differing:
        return []
    return [f"{len(plan.differing)} weights cannot hold the same numbers in both outputs: see the report"]


def _serving(plan: Plan) -> list[str]:
    """The largest TP of SERVING_TP whose shards are whole blocks, when that is not the last."""
    if "hf" not in plan.formats:
        return []
    quantized = {linear for layer, linear in plan.every_linear() if _in_blocks(plan, layer, linear)}
    # Column-parallel linears are cut by rows of each member, row-parallel ones by columns.
    cut = [rows for linear in quantized if not linear.fusion.plain for rows in linear.fusion.rows]
    cut += [linear.in_features for linear in quantized if linear.fusion.plain]
    possible = [1, *(tp for tp in SERVING_TP if all(size % (tp * 128) == 0 for size in cut))]
    if possible[-1] == SERVING_TP[-1]:
        return []
    return [f"blocks of 128 split evenly over tensor-parallel servers only up to TP={possible[-1]}"]


def _in_blocks(plan: Plan, layer: int, linear: Linear) -> bool:
    scheme = plan.scheme("hf", layer, linear)
    return scheme is not None and scheme.block is not None


def components(plan: Plan) -> dict[str, dict[str, int]]:
    """Parameters and bytes by component: in the checkpoint ("in") and in each output."""
    table: dict[str, Counter[str]] = {}
    for inner, parts in plan.source.places.items():
        row = table.setdefault(component(inner), Counter(dict.fromkeys(("parameters", "in", *plan.formats), 0)))
        for part in parts:
            spec = TensorSpec(inner, plan.source.dtype(inner), part.shape)
            row.update({"parameters": spec.numel, "in": spec.nbytes})
    for form in plan.formats:
        for inner, specs in plan.by_inner(form):
            table[component(inner)][form] += sum(spec.nbytes for spec in specs)
    return {name: dict(row) for name, row in table.items()}


def actions(plan: Plan) -> dict[str, str]:
    """What happens to each component, in words."""
    words = {
        name: "copied" if any(row.get(form) for form in plan.formats) else "left out" for name, row in components(plan).items()
    }
    for name in {component(linear.megatron) for _, linear in plan.every_linear()}:
        by_form = {form: _action(plan, form, name) for form in plan.formats}
        if len(set(by_form.values())) == 1:
            words[name] = by_form[plan.formats[0]]
        else:
            words[name] = "; ".join(f"{what} in {form}" for form, what in by_form.items())
    return words


def _action(plan: Plan, form: str, name: str) -> str:
    counts: Counter[str] = Counter()
    for layer, linear in plan.every_linear():
        if component(linear.megatron) == name:
            scheme = plan.scheme(form, layer, linear)
            counts[scheme.words if scheme else "copied"] += 1
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{words} ({count} of {counts.total()})" for words, count in counts.most_common())


def schemes(plan: Plan, form: str) -> dict[str, int]:
    """How many of Megatron's linears an output holds in which scheme, in words."""
    found = [plan.scheme(form, layer, linear) for layer, linear in plan.every_linear()]
    return dict(Counter(scheme.words if scheme else plan.model.dtype for scheme in found))
