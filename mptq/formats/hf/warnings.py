"""Warnings about a Hugging Face output, shown before a run starts. Does not import torch."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from mptq.model import engines
from mptq.model.checkpoint_keys import passthrough_names
from mptq.model.tensors import names as names_of

if TYPE_CHECKING:
    from mptq.formats.hf.layout import HfLayout
    from mptq.model.tensors import LinearSpec

SERVING_TP = (2, 4, 8)


def warnings(layout: HfLayout) -> list[str]:
    """Returns the warnings, one line each."""
    return [
        *_precision(layout),
        *_ragged(layout),
        *_vocabulary(layout),
        *_serving(layout),
        *_gateless(layout),
        *_left_out(layout),
        *_positions(layout),
    ]


def _left_out(layout: HfLayout) -> list[str]:
    notes, family, prediction = [], names_of(layout.model), passthrough_names(layout.source.places)
    if prediction:
        notes.append(f"{len(prediction)} tensors of multi-token prediction layers are not in the hf output")
    epsilon = family.latent_epsilon
    if epsilon not in (None, layout.model.norm_epsilon):
        notes.append(
            f"transformers normalizes latents with epsilon {epsilon:g} regardless of config.json, but the model uses "
            f"{layout.model.norm_epsilon:g}: logits in transformers will differ slightly; vLLM and SGLang read config.json"
        )
    return notes + family.deviations(layout.model)


def _precision(layout: HfLayout) -> list[str]:
    found: dict[str, dict[str, None]] = {}
    for layer, linear in layout.assignment.linears():
        wanted = layout.assignment.scheme(layer, linear)
        if wanted is None or layout.assignment.group_fits(layer, linear):
            continue
        kept = layout.scheme(layer, linear)
        into = f"stay {layout.model.dtype}" if kept is None else "get one scale per row"
        names = found.setdefault(f"not multiples of {max(wanted.unit)}, so they {into} in the hf output", {})
        names |= dict.fromkeys(member.rpartition(".")[2] for member in linear.hf)
    return [f"{', '.join(names)}: {what} (engines misread scales of partial blocks)" for what, names in found.items()]


def _ragged(layout: HfLayout) -> list[str]:
    if layout.dialect_name != "deepseek-fp8":
        return []
    found = {
        f"{linear.hf[-1].rpartition('.')[2]}: {linear.shape[0]} rows end in a partial block, as in DeepSeek's own checkpoints"
        for layer, linear in layout.assignment.linears()
        if not linear.expert and (block := _block(layout, layer, linear)) and not linear.fits((block, block))
    }
    return [f"{what} (vLLM and SGLang support this; transformers cannot dequantize it)" for what in sorted(found)]


def _vocabulary(layout: HfLayout) -> list[str]:
    if layout.model.settings.get("vocab_size"):
        return []
    return [
        "the checkpoint does not specify its vocabulary size: the hf output keeps all "
        f"{layout.model.vocab_size} rows, including padding"
    ]


def _serving(layout: HfLayout) -> list[str]:
    """Warns if tensor parallelism splits blocks at a TP at which the model could otherwise be served."""
    # All experts have the same shapes, so check only the first.
    some = ((layer, linear) for layer, linear in layout.assignment.linears() if not linear.expert)
    quantized = {linear: block for layer, linear in some if (block := _block(layout, layer, linear))}
    notes = []
    for owner, expert, remedy in (("", None, ""), ("the experts' ", 0, "; for larger TP, use expert parallelism")):
        for block in dict.fromkeys(quantized.values()):
            linears = [linear for linear, size in quantized.items() if (linear.expert, size) == (expert, block)]
            last, cut = _whole(layout, linears, block)
            if cut:
                names = ", ".join(dict.fromkeys(name.rpartition(".")[2] for linear in cut for name in linear.hf))
                limit = f"split evenly across tensor-parallel ranks only up to TP={last}"
                notes.append(f"blocks of {block} of {owner}{names} {limit}{remedy}")
    return notes


def _whole(layout: HfLayout, linears: Sequence[LinearSpec], block: int) -> tuple[int, list[LinearSpec]]:
    """Returns the largest TP with whole blocks of `linears` on each rank, and the linears that the next TP cuts."""
    sizes = [1, *(tp for tp in SERVING_TP if engines.serves(layout.model, tp))]
    for last, tp in pairwise(sizes):
        cut = [linear for linear in linears if not engines.splits(layout.model, linear, tp, block)]
        if cut:
            return last, cut
    return sizes[-1], []


def _gateless(layout: HfLayout) -> list[str]:
    """Warns about a bug in vLLM 0.32: for non-gated experts, it looks up the scheme of a gate with an empty name."""
    experts = layout.model.num_experts and not layout.model.gated
    if layout.dialect_name != "compressed-tensors" or not experts:
        return []
    whole = len(layout.contents.groups) == 1 and all(
        layout.scheme(*one) for one in layout.assignment.linears() if one[1].expert == 0
    )
    return [] if whole else ["vLLM 0.32 rejects experts without a gate in compressed-tensors next to linears of another scheme"]


def _positions(layout: HfLayout) -> list[str]:
    """Warns about position settings that the checkpoint does not specify."""
    settings, context = layout.model.settings, layout.model.context
    notes = []
    if context.known_from == "training":
        notes.append(
            f"max_position_embeddings is {context.length}, the training sequence length, because the checkpoint does not "
            "specify the number of positions: to change it, pass --hf-config DIR or --config max_position_embeddings=N"
        )
    elif context.known_from == "tokenizer":
        notes.append(
            f"max_position_embeddings is {context.length}, the tokenizer's model_max_length, because the checkpoint specifies "
            f"only the training sequence length, {settings.get('seq_length')}: if the model has fewer positions, pass "
            "--hf-config DIR or --config max_position_embeddings=N"
        )
    rounded = "yarn_correction_range_round_to_int"
    stretched = layout.model.latent is None and layout.model.features["rope scaling"] == "yarn"
    if stretched and rounded in settings and settings[rounded] is None:
        notes.append(
            f"{settings.sources[rounded]} has no value for {rounded}: megatron-core then does not round the range of "
            "dimensions that YaRN interpolates, but Hugging Face models and this output do: if the model was trained "
            f"without rounding, pass --config {rounded}=false"
        )
    return notes


def _block(layout: HfLayout, layer: int, linear: LinearSpec) -> int | None:
    """The size of a linear's square blocks, or None if its scheme has none."""
    scheme = layout.scheme(layer, linear)
    return scheme.block if scheme else None
