"""What a directory holds: a Megatron checkpoint, or a Hugging Face model, of mptq's or of others. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mptq.arch.config import from_args
from mptq.arch.places import dropped
from mptq.checkpoint.index import Checkpoint, open_checkpoint
from mptq.errors import CheckpointError, MptqError
from mptq.types import DTYPE_BYTES, TensorSpec
from mptq.writers import manifest

SCHEMA = 1
_SAFETENSORS_DTYPES = {
    "F64": "float64",
    "F32": "float32",
    "BF16": "bfloat16",
    "F16": "float16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}
_COMPONENTS = (
    ("optimizer", "optimizer"),
    ("_scale", "scales"),
    ("_amax", "scales"),
    ("norm", "norms"),
    ("embed", "embedding"),
    ("attn", "attention"),
    ("attention", "attention"),
    ("expert", "experts"),
    ("router", "router"),
    ("gate.weight", "router"),
    ("mlp", "mlp"),
    ("output_layer", "output layer"),
    ("lm_head", "output layer"),
)
_NO_PARAMETERS = ("optimizer", "scales")


def component(name: str) -> str:
    """The part of a model that a tensor belongs to, by its name in any of the formats."""
    return next((label for part, label in _COMPONENTS if part in name), "other")


def inspect(path: Path) -> list[dict[str, Any]]:
    """One document for each model in the directory: two for an output of mptq in both formats.

    Raises CheckpointError when the directory holds neither form. Reads metadata and headers only.
    """
    path = path.resolve()
    nested = [path / form for form in ("hf", "megatron") if (path / form).is_dir()]
    if (path / manifest.NAME).is_file() and nested:
        return [_inspect_one(directory, path) for directory in nested]
    return [_inspect_one(path, path)]


def _inspect_one(path: Path, root: Path) -> dict[str, Any]:
    document = _huggingface(path) if any(path.glob("*.safetensors")) else _megatron(open_checkpoint(path))
    if (root / manifest.NAME).is_file():
        made = manifest.read_manifest(root)
        document["facts"]["written by"] = f"mptq {made['mptq']}, recipe {made['recipe']['name']}"
    return document


def _document(path: Path, kind: str, facts: dict[str, Any], specs: Iterable[TensorSpec]) -> dict[str, Any]:
    rows: dict[str, dict[str, Any]] = {}
    for spec in specs:
        label = component(spec.name)
        row = rows.setdefault(label, {"component": label, "parameters": 0, "bytes": 0, "dtypes": []})
        row["parameters"] += 0 if label in _NO_PARAMETERS else spec.numel
        row["bytes"] += spec.nbytes
        if spec.dtype not in row["dtypes"]:
            row["dtypes"].append(spec.dtype)
    return {
        "schema": SCHEMA,
        "path": str(path),
        "kind": kind,
        "facts": facts,
        "parameters": sum(row["parameters"] for row in rows.values()),
        "bytes": sum(row["bytes"] for row in rows.values()),
        "components": list(rows.values()),
    }


def _megatron(checkpoint: Checkpoint) -> dict[str, Any]:
    args = checkpoint.args
    chunks = [chunk for tensor in checkpoint.tensors.values() for chunk in tensor.chunks]
    files = {chunk.record.file for chunk in chunks}
    facts: dict[str, Any] = {
        "format": "torch_dist (Megatron)",
        "iteration": checkpoint.location.iteration,
        "layout": _layout(checkpoint),
        "stored as": f"{len(checkpoint.tensors)} tensors in {len(chunks)} chunks and {len(files)} files",
        "architecture": _architecture(checkpoint),
        "source": checkpoint.args_source,
        "saved at": f"TP={args.get('tensor_model_parallel_size', '?')} PP={args.get('pipeline_model_parallel_size', '?')}"
        + (f" EP={args.get('expert_model_parallel_size', '?')}" if args.get("num_experts") else ""),
        "tokenizer": args.get("tokenizer_model"),
        "left out": f"{len(dropped([*checkpoint.tensors, *checkpoint.blobs]))} items of training state",
    }
    return _document(checkpoint.directory, "Megatron checkpoint", facts, checkpoint.specs.values())


def _layout(checkpoint: Checkpoint) -> str:
    """How the layers are keyed, and whether ModelOpt has quantized them."""
    per_layer = any(".layers.0." in name for name in checkpoint.tensors)
    text = "one key per layer" if per_layer else "layers stacked"
    quantized = any(name.endswith("weight_quantizer._scale") for name in checkpoint.tensors)
    return text + (", quantized by ModelOpt" if quantized else "")


def _architecture(checkpoint: Checkpoint) -> str:
    """The model in a line, or why it is none that mptq quantizes."""
    try:
        model = from_args(checkpoint.args, checkpoint.args_source, checkpoint.specs)
    except MptqError as error:
        return f"not supported: {error}"
    experts = f"{model.num_experts} experts, {model.moe_topk} a token, each with ffn {model.moe_ffn_hidden_size}"
    return (
        f"{model.family.name}-like, {model.num_layers} layers, hidden {model.hidden_size}, "
        f"{experts if model.num_experts else f'ffn {model.ffn_hidden_size}'}, "
        f"{model.num_attention_heads} heads in {model.num_query_groups} groups of {model.head_dim}, "
        f"vocabulary {model.vocab_size} (stored {model.padded_vocab_size}), "
        f"{'tied' if model.tied_embeddings else 'untied'} embeddings"
    )


def _huggingface(path: Path) -> dict[str, Any]:
    config = _json(path / "config.json")
    quantization = config.get("quantization_config")
    quantization = quantization if isinstance(quantization, dict) else {}
    excluded = quantization.get("modules_to_not_convert") or quantization.get("ignore") or []
    facts = {
        "format": "safetensors (Hugging Face)",
        "architecture": f"{', '.join(config.get('architectures') or ['?'])}, {config.get('num_hidden_layers', '?')} layers, "
        f"hidden {config.get('hidden_size', '?')}",
        "source": "config.json",
        "quantization": quantization.get("quant_method", "none"),
        "excluded": ", ".join(excluded[:4]) + (f" and {len(excluded) - 4} more" if len(excluded) > 4 else ""),
        "files": len(list(path.glob("*.safetensors"))),
    }
    return _document(path, "Hugging Face model", facts, read_headers(path).values())


def read_headers(path: Path) -> dict[str, TensorSpec]:
    """Every tensor of the safetensors files in a directory, from their headers.

    Raises CheckpointError for a file that is not safetensors, or has a dtype that is not known.
    """
    from safetensors import SafetensorError, safe_open

    specs: dict[str, TensorSpec] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a dict)
                    piece = tensors.get_slice(name)
                    dtype = _SAFETENSORS_DTYPES.get(piece.get_dtype())
                    if dtype not in DTYPE_BYTES:
                        raise CheckpointError(f"{file}: {name} has the unknown dtype {piece.get_dtype()}")
                    specs[name] = TensorSpec(name, dtype, tuple(piece.get_shape()))
        except SafetensorError as error:
            raise CheckpointError(f"{file} is not a whole safetensors file: {error}") from error
    return specs


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (ValueError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}
