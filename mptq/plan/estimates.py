"""Estimates for a plan: bytes by component, peak memory, and warnings. Does not import torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mptq.checkpoint.contents import foreign_code
from mptq.formats import FORMATS
from mptq.formats.layout import canonical_weight
from mptq.model import tensors
from mptq.model.settings.from_run_config import unread
from mptq.types import DTYPE_BYTES, TensorSpec

if TYPE_CHECKING:
    from mptq.model.tensors import LinearSpec
    from mptq.plan.plan import Plan

IMPORTS_BYTES = 1_130_000_000
"""Resident memory of a process that quantizes: torch, the compiled loops, and ModelOpt, which imports megatron-core and
transformers (scripts/bench_memory.py)."""
END_BYTES = 180_000_000
"""Memory added at the end by the report's plots, and by libraries, whose file pages are read in on exit."""
PIECE_BYTES = 1 << 26
"""Size of the blocks of rows in which large tensors outside the layers are read."""
LOGITS = 1 << 23
"""Number of logits per stream that are computed at once: 32 MB in float32."""
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
    """Returns the part of the model that an inner tensor or a Megatron module belongs to, for display."""
    return next(found for part, found in _COMPONENTS if part in name)


@dataclass(frozen=True)
class ActivationBudget:
    """What activations add to a run: bytes of hidden states in memory or in files, and tokens of a batch.

    A batch consists of sequences of `length` tokens. `compares` says whether logits are compared. `rounding_tokens` are the
    calibration tokens whose inputs are kept for rounding, 0 if that is to nearest; `streams` says of how many streams.
    `measured_bytes` are a layer's outputs before and after a group of its linears is quantized, if that is measured.
    """

    stored_bytes: int
    file_bytes: int
    batch_tokens: int
    length: int
    compares: bool
    rounding_tokens: int = 0
    streams: int = 1
    measured_bytes: int = 0


def peak_memory(plan: Plan, work: ActivationBudget | None = None) -> int:
    """Predicts the peak resident memory in bytes of a run on a CPU: imports plus the most that is in memory at once.

    Without activations, that is a linear, the two tensors read ahead, the quantized linear, and the previous one, which
    is being written. With activations, it is a layer plus its forward pass or the quantization of a linear, or the
    output layer with its logits. Imports at the end of the run and the exit of the process come after that, and may
    exceed it.
    """
    kinds = {kind: layer for layer, kind in enumerate(plan.model.kinds)}.values()
    if work is None:
        running = _outer_memory(plan, max(_window(_items(plan, layer)) for layer in kinds))
    else:
        layers = (work.measured_bytes + _live_memory(plan, layer, work) for layer in kinds)
        running = work.stored_bytes + max(_head_memory(plan, work), *layers)
    return IMPORTS_BYTES + max(running, END_BYTES)


@dataclass(frozen=True)
class _Item:
    """A tensor of a layer: its bytes as read, of the results, of the largest projection's copy, and of a search for scales."""

    source: int
    made: int = 0
    copied: int = 0
    searched: int = 0


def _items(plan: Plan, layer: int) -> list[_Item]:
    """Returns the tensors of a layer in the order of the run."""
    prefix = tensors.megatron_layer(layer)
    copies = (TensorSpec("", plan.source.dtype(prefix + copy.megatron), copy.shape).nbytes for copy in plan.unquantized(layer))
    return [*map(_Item, copies), *(_item(plan, layer, linear) for linear in plan.linears(layer))]


def _item(plan: Plan, layer: int, linear: LinearSpec) -> _Item:
    weight = TensorSpec("", plan.source.dtype(canonical_weight(layer, linear)), linear.shape)
    layouts = plan.layouts.values()
    # An unquantized weight is written without a copy, unless its members have to be split.
    kept = [weight.nbytes if layout.splits and not linear.fusion.plain else 0 for layout in layouts]
    schemes = [layout.scheme(layer, linear) for layout in layouts]
    made = [bytes_ if scheme is None else weight.numel for bytes_, scheme in zip(kept, schemes, strict=True)]
    copies = linear.fusion.repeat > 1 and any(layout.splits and layout.scheme(layer, linear) for layout in layouts)
    copied = weight.nbytes * max(linear.fusion.widths) // sum(linear.fusion.widths) if copies else 0
    searches = plan.recipe.algorithm != "max" and any(schemes)
    return _Item(weight.nbytes, sum(made), copied, _SEARCH_BYTES * weight.numel if searches else 0)


_SEARCH_BYTES = 17
"""Bytes per weight while ModelOpt's mse algorithm searches for its scale: float32 copies, rounded, and their errors."""


def _window(items: list[_Item]) -> int:
    """Returns the most that is in memory while a tensor is processed, in a layer between layers like it."""
    around = (tuple(items[(place + step) % len(items)] for step in (-1, 0, 1, 2)) for place in range(len(items)))
    return max(
        written.made + item.source + item.copied + item.searched + item.made + following.source + further.source
        for written, item, following, further in around
    )


def _outer_memory(plan: Plan, window: int) -> int:
    """Returns the most that is in memory with the largest tensor outside the layers, read in pieces or as a whole."""
    outer = _outer_bytes(plan)
    if not plan.by_rows:
        return outer + window
    return max(min(outer, 4 * PIECE_BYTES), window)  # a piece, two read ahead, one being written


def _outer_bytes(plan: Plan) -> int:
    outer = [tensor for group in (*tensors.outer_copies(plan.model), plan.passthrough) for tensor in group]
    return max(TensorSpec("", plan.source.dtype(tensor.megatron), tensor.shape).nbytes for tensor in outer)


def _live_memory(plan: Plan, layer: int, work: ActivationBudget) -> int:
    """Returns the bytes of a layer plus the largest step: forward pass, comparing streams, or quantizing a linear.

    Hidden states are in the model's dtype. The products of linears are in float32, and so is attention where torch has
    no fused CPU kernel (values of another width than the keys, or sinks).
    """
    model, items = plan.model, _items(plan, layer)
    width, states = DTYPE_BYTES[model.dtype], work.batch_tokens * model.hidden_size
    kept = 3 * width * states  # the residual, the layer's input, and the input in Megatron's layout
    fused = model.latent is None and model.get("softmax_type") == "vanilla"
    steps = [
        0 if fused else kept + _SCORE_BYTES * work.batch_tokens * work.length * model.num_attention_heads,
        _DEVIATION_BYTES * states if work.compares else 0,
    ]
    first = next(iter(plan.layouts.values()))
    for place, linear in enumerate(plan.linears(layer), start=len(plan.unquantized(layer))):
        numel, tokens, passed = TensorSpec("", "", linear.shape).numel, work.batch_tokens, 0
        if linear.expert is not None:
            passed = 3 * width * states * model.moe_topk  # sorted by expert: inputs, outputs; and outputs by token
            tokens = tokens * model.moe_topk // model.num_experts
        inputs = (4 + width) * tokens * linear.in_features
        steps.append(kept + passed + inputs + 4 * tokens * linear.shape[0] + 4 * numel)
        rounded = 2 * 4 * numel if first.splits and first.scheme(layer, linear) else 0  # dequantized, and fused
        if work.rounding_tokens:
            rounded += _ROUNDED_BYTES * numel + _MOMENT_BYTES * linear.in_features**2
        steps.append(items[place].source + items[place].made + items[place - 1].made + rounded + items[place].searched)
    return sum(item.source for item in items) + max(steps) + _input_memory(plan, layer, work)


def _input_memory(plan: Plan, layer: int, work: ActivationBudget) -> int:
    """Returns the most bytes of inputs that are kept for rounding: those of linears that do not depend on each other."""
    if not work.rounding_tokens:
        return 0
    model, linears, width = plan.model, plan.linears(layer), DTYPE_BYTES[plan.model.dtype]
    kept = []
    for group in tensors.stages(linears):
        shares = (model.moe_topk / model.num_experts if linear.expert is not None else 1 for linear in group)
        inputs = zip(shares, (linear.in_features for linear in group), strict=True)
        kept.append(sum(share * columns for share, columns in inputs))
    # The reference's inputs are those of the whole layer, and of the residual stream, which the other has once.
    reference = sum(linear.in_features for linear in linears if linear.expert is None) + 3 * model.hidden_size
    columns = max(kept, default=0) + reference * (work.streams - 1)
    # A batch, and what is withheld, in float32; with two streams also their difference, and that of the residual stream.
    widest = max((linear.in_features for linear in linears), default=0)
    sample = work.streams * widest + (work.streams - 1) * model.hidden_size
    return int(columns * work.rounding_tokens * width) + _SAMPLE_BYTES * work.batch_tokens * sample


_SAMPLE_BYTES = 2 * 4
_ROUNDED_BYTES = 8 * 4
"""Bytes per weight while it is rounded by its inputs: itself, its target, scales, codes and errors, in float32."""
_MOMENT_BYTES = 8 * 4
"""Bytes per pair of inputs: the moments, a batch's, and what factoring one takes, in float32."""


_SCORE_BYTES = 12
"""Bytes per attention score without a fused kernel: scores, masked scores and softmax, in float32."""
_DEVIATION_BYTES = 32 + 2
"""Bytes per compared hidden state: both in float32, four products, one of them in float64; and the state itself."""


def _head_memory(plan: Plan, work: ActivationBudget) -> int:
    """Returns the bytes of the output layer in its own dtype and in float32, what is read ahead, and logits."""
    model = plan.model
    rows, outer = model.vocab_size, _outer_bytes(plan)
    ahead = 0 if model.tied_embeddings else outer if not plan.by_rows else min(outer, PIECE_BYTES)
    head = (DTYPE_BYTES[model.dtype] * model.padded_vocab_size + 4 * rows) * model.hidden_size
    tokens = min(max(1, LOGITS // rows), work.length - 1)
    return head + ahead + (_LOGIT_BYTES * tokens * rows if work.compares else 0)


_LOGIT_BYTES = 7 * 4
"""Bytes per token and vocabulary entry: logits and log probabilities of both streams, and three steps of the KL."""


def warnings(plan: Plan) -> list[str]:
    """Returns what the user should know before starting the run."""
    by_format = [note for form, layout in plan.layouts.items() for note in FORMATS[form].warnings(layout)]
    return [*foreign_code(plan.source.checkpoint), *by_format, *_differences(plan), *_not_run(plan), *_settings(plan)]


def _not_run(plan: Plan) -> list[str]:
    if not plan.model.not_run or plan.recipe.scheme is None:
        return []
    return [f"no fidelity figures: this model has {'; '.join(plan.model.not_run)}"]


def _settings(plan: Plan) -> list[str]:
    notes = [f"the checkpoint's sources disagree: {conflict}" for conflict in plan.model.settings.conflicts]
    unknown = unread(plan.source.checkpoint.config)
    if unknown:
        notes.append(
            f"{plan.source.checkpoint.config_source} has settings that mptq does not know ({', '.join(unknown)}): if one of "
            "them changes what the model computes, the output will be wrong"
        )
    return notes


def _differences(plan: Plan) -> list[str]:
    if len(plan.formats) == 1 or not plan.differing:
        return []
    return [f"{len(plan.differing)} weights cannot hold the same numbers in both outputs: see the report"]


def unit_bytes(plan: Plan) -> dict[int, int]:
    """Returns the bytes of each unit in all outputs, by its number."""
    found = {unit.number: 0 for unit in plan.units}
    for layout in plan.layouts.values():
        for name, specs in layout.by_canonical_name():
            found[plan.units.of(name).number] += sum(spec.nbytes for spec in specs)
    return found


def bytes_in(plan: Plan) -> int:
    """Returns the bytes of the checkpoint's tensors that are part of an output."""
    keys = {part.key for parts in plan.source.places.values() for part in parts} - plan.skipped.keys()
    return sum(tensor.spec.nbytes for name, tensor in plan.source.checkpoint.tensors.items() if name in keys)


def components(plan: Plan) -> dict[str, dict[str, int]]:
    """Returns parameters and bytes by component: in the checkpoint ("in") and in each output."""
    table: dict[str, Counter[str]] = {}
    for inner, parts in plan.source.places.items():
        row = table.setdefault(component(inner), Counter(dict.fromkeys(("parameters", "in", *plan.formats), 0)))
        for part in parts:
            spec = TensorSpec(inner, plan.source.dtype(inner), part.shape)
            row.update({"parameters": spec.numel, "in": spec.nbytes})
    for form, layout in plan.layouts.items():
        for name, specs in layout.by_canonical_name():
            table[component(name)][form] += sum(spec.nbytes for spec in specs)
    return {name: dict(row) for name, row in table.items()}


def actions(plan: Plan) -> dict[str, str]:
    """Describes what happens to each component."""
    words = {
        name: "copied" if any(row.get(form) for form in plan.formats) else "left out" for name, row in components(plan).items()
    }
    for name in {component(linear.megatron) for _, linear in plan.assignment.linears()}:
        by_form = {form: _action(plan, form, name) for form in plan.formats}
        if len(set(by_form.values())) == 1:
            words[name] = by_form[plan.formats[0]]
        else:
            words[name] = "; ".join(f"{what} in {form}" for form, what in by_form.items())
    return words


def _action(plan: Plan, form: str, name: str) -> str:
    counts: Counter[str] = Counter()
    for layer, linear in plan.assignment.linears():
        if component(linear.megatron) == name:
            scheme = plan.layouts[form].scheme(layer, linear)
            counts[scheme.words if scheme else "copied"] += 1
    if len(counts) == 1:
        return next(iter(counts))
    return "; ".join(f"{words} ({count} of {counts.total()})" for words, count in counts.most_common())


def schemes(plan: Plan, form: str) -> dict[str, int]:
    """Counts Megatron's linears in an output by the description of their scheme."""
    found = [plan.layouts[form].scheme(layer, linear) for layer, linear in plan.assignment.linears()]
    return dict(Counter(scheme.words if scheme else plan.model.dtype for scheme in found))
