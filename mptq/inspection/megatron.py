"""Describes a Megatron checkpoint: model, training state and sources of its settings. Does not import torch."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

from mptq.checkpoint.contents import foreign_code, obstacle
from mptq.checkpoint.index import Checkpoint
from mptq.errors import CheckpointError, MptqError, UnsupportedModelError
from mptq.inspection.predictions import predictions
from mptq.inspection.quantized import scales
from mptq.inspection.settings import architecture, settings_document, words
from mptq.inspection.tree import tree
from mptq.model.build import model_config
from mptq.model.checkpoint_keys import locate, skipped
from mptq.model.config import ModelConfig
from mptq.model.settings.resolve import resolve
from mptq.model.source import Source, SourceOptions
from mptq.types import TensorSpec

_PARALLEL = {
    "TP": "tensor_model_parallel_size",
    "PP": "pipeline_model_parallel_size",
    "EP": "expert_model_parallel_size",
    "ETP": "expert_tensor_parallel_size",
    "CP": "context_parallel_size",
    "VP": "virtual_pipeline_model_parallel_size",
    "DP": "data_parallel_size",
}
_ALWAYS = ("TP", "PP")


def describe_megatron(checkpoint: Checkpoint, options: SourceOptions | None = None) -> dict[str, Any]:
    """Returns the document of a checkpoint; it has a `problem` if mptq cannot quantize the model."""
    options, specs = options or SourceOptions(), checkpoint.specs
    left_out = skipped([*checkpoint.tensors, *checkpoint.blobs])
    model_specs = [spec for name, spec in specs.items() if name not in left_out]
    document: dict[str, Any] = {
        "path": str(checkpoint.directory),
        "kind": "Megatron checkpoint",
        "facts": _facts(checkpoint, left_out),
        "parallel": {short: _count(checkpoint.args, name) for short, name in _PARALLEL.items()},
        "tokens_seen": _tokens_seen(checkpoint.args),
        "architecture": None,
        "problem": None,
        "warnings": foreign_code(checkpoint),
        **tree(model_specs),
        "quantization": scales(model_specs),
        "not_read": _not_read(checkpoint, left_out),
        "recipes": [],
    }
    settings = resolve(checkpoint, options.config, options.hf_config)
    document |= settings_document(settings)
    unfit = obstacle(checkpoint)
    try:
        model = model_config(settings, specs)
    except MptqError as error:
        document["facts"]["architecture"] = "not supported"
        return document | {"problem": f"it {unfit}" if unfit else str(error)}
    made = architecture(model)
    more = {"architecture": words(model), "Hugging Face": _family(made), "cannot be run": "; ".join(made["not_run"])}
    document["architecture"], document["facts"] = made, document["facts"] | more
    if unfit is not None:
        return document | {"problem": f"it {unfit}"}
    return document | _recipes(checkpoint, model, specs)


def _recipes(checkpoint: Checkpoint, model: ModelConfig, specs: Mapping[str, TensorSpec]) -> dict[str, Any]:
    try:
        rows = predictions(Source(checkpoint, model, locate(specs, model)))
    except (CheckpointError, UnsupportedModelError) as error:
        return {"problem": str(error)}
    if any(row["bytes"] for row in rows):
        return {"recipes": rows}
    # If no recipe can be applied, the cause is the model.
    return {"recipes": rows, "problem": "; ".join(dict.fromkeys(text for row in rows for text in row["problems"].values()))}


def _family(found: Mapping[str, Any]) -> str:
    """The Hugging Face architecture of the model, or why there is none."""
    if found["family"]:
        return f"{found['class']} ({found['family']})"
    return f"no architecture that mptq writes; the nearest, {found['nearest']}, differs in {'; '.join(found['lacks'])}"


def _facts(checkpoint: Checkpoint, left_out: Mapping[str, str]) -> dict[str, Any]:
    args = checkpoint.args
    records = [record for tensor in checkpoint.tensors.values() for record in tensor.records]
    files = {record.file for record in records}
    tokens = _tokens_seen(args)
    return {
        "format": "torch_dist (Megatron)",
        "iteration": checkpoint.location.iteration,
        "tokens seen": None if tokens is None else f"{tokens:,}",
        "layout": _layout(checkpoint),
        "stored as": f"{len(checkpoint.tensors)} tensors in {len(records)} chunks and {len(files)} files",
        "architecture": "",
        "source": " and ".join(_sources(checkpoint)),
        "saved at": " ".join(_parallel(args)),
        "tokenizer": " ".join(str(args[key]) for key in ("tokenizer_type", "tokenizer_model") if args.get(key)),
        "left out": f"{len(left_out)} items of training state",
    }


def _sources(checkpoint: Checkpoint) -> Iterator[str]:
    """The parts of the checkpoint that specify its architecture."""
    if checkpoint.config:
        yield checkpoint.config_source
    if checkpoint.args or not checkpoint.config:
        yield checkpoint.args_source


def _parallel(args: Mapping[str, Any]) -> Iterator[str]:
    """The parallel sizes at save: TP and PP always, EP for experts, and all others that are not 1."""
    shown = {*_ALWAYS, *(("EP",) if args.get("num_experts") else ())}
    for short, name in _PARALLEL.items():
        value = _count(args, name)
        if short in shown or value not in (None, 1):
            yield f"{short}={'?' if value is None else value}"


def _tokens_seen(args: Mapping[str, Any]) -> int | None:
    """Consumed training samples times the sequence length; None if the arguments lack either."""
    samples, length = _count(args, "consumed_train_samples"), _count(args, "seq_length")
    return None if samples is None or length is None else samples * length


def _count(args: Mapping[str, Any], name: str) -> int | None:
    """An argument that must be a count; None for any other value, which a damaged checkpoint may have."""
    value = args.get(name)
    return value if type(value) is int and 0 <= value < 1 << 63 else None


def _layout(checkpoint: Checkpoint) -> str:
    """Whether layers are stacked, and whether ModelOpt quantized them."""
    per_layer = any(".layers.0." in name for name in checkpoint.tensors)
    text = "one key per layer" if per_layer else "layers stacked"
    quantized = any(name.endswith("weight_quantizer._scale") for name in checkpoint.tensors)
    return text + (", quantized by ModelOpt" if quantized else "")


def _not_read(checkpoint: Checkpoint, left_out: Mapping[str, str]) -> list[dict[str, Any]]:
    """Items that are not part of the model, by kind, with their number and size in bytes."""
    sizes: defaultdict[str, list[int]] = defaultdict(list)
    for name, reason in left_out.items():
        blob = checkpoint.blobs.get(name)
        size = blob.length if blob is not None else sum(record.length for record in checkpoint.tensors[name].records)
        sizes[reason].append(size)
    return [{"what": reason, "items": len(found), "bytes": sum(found)} for reason, found in sizes.items()]
