"""Detects checkpoints that mptq cannot quantize: adapters, other heads, quantized models, no weights. No torch."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from mptq.checkpoint.index import Checkpoint
from mptq.errors import CheckpointError

_SHOWN = 5
_QUANTIZER = re.compile(r"_quantizer\._(amax|scale|double_scale)$")
_MAIN_PARAM = re.compile(r"(^|\.)optimizer\.(state\.(fp32_)?param\.|distributed\.)")  # per parameter, or in buckets
_OPTIMIZER = re.compile(r"(^|\.)optimizer\.")
# The wrapped linear and the adapters (LoRA, DoRA) of Megatron-Bridge and NeMo, and peft's adapter names.
_ADAPTER = re.compile(r"\.to_wrap\.|\.adapter(s|_layer)?\..*\b(linear_in|linear_out|weight_magnitude)\b|\.lora_\w+\.")
_OUTPUT_LAYER = re.compile(r"(^|\.)output_layer\.weight$")
_WORDS = re.compile(r"(^|\.)embedding\.word_embeddings\.weight$")
_OTHER_HEAD = re.compile(r"(^|\.)(value_head|v_head|reward_head|rm_head|classification_head)\.")


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether ModelOpt has quantized the model: the checkpoint has quantizer tensors or a modelopt_state directory."""
    return (checkpoint.directory / "modelopt_state").is_dir() or any(map(_QUANTIZER.search, checkpoint.tensors))


def obstacle(checkpoint: Checkpoint) -> str | None:
    """Returns why the checkpoint cannot be quantized and what to do about it, or None if nothing rules it out."""
    return next(_obstacles(checkpoint), None)


def _obstacles(checkpoint: Checkpoint) -> Iterator[str]:
    if is_quantized(checkpoint):
        yield "is quantized already (modelopt_state, or *_quantizer.* tensors): pass the checkpoint that it was made from"
    if all(map(_OPTIMIZER.search, checkpoint.tensors)) and any(map(_MAIN_PARAM.search, checkpoint.tensors)):
        yield (
            "has weights only as the optimizer's main params (optimizer.state.fp32_param.*): "
            "load it in Megatron-LM and save it with the model weights"
        )
    model = {name: tensor.spec.shape for name, tensor in checkpoint.tensors.items() if not _OPTIMIZER.search(name)}
    adapters = [name for name in model if _ADAPTER.search(name)]
    if adapters:
        count = f"adapter tensors: {len(adapters)}, the first {adapters[0]}"
        yield f"has LoRA adapters: merge them first (Megatron-Bridge's merge_lora.py, NeMo's llm.peft.merge_lora); {count}"
    for name in _other_heads(model):
        yield (
            f"has a value, reward or classification head ({name} {list(model[name])}) instead of an output layer over the "
            "vocabulary: mptq quantizes language models only"
        )


def _other_heads(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    """Yields tensors of heads that do not predict tokens, or an output layer with fewer rows than the embedding."""
    words = [shape[:1] for name, shape in shapes.items() if _WORDS.search(name)]
    for name, shape in shapes.items():
        if _OTHER_HEAD.search(name) or (_OUTPUT_LAYER.search(name) and words and shape[:1] < words[0]):
            yield name


def foreign_code(checkpoint: Checkpoint) -> list[str]:
    """Returns one warning that names unexpected globals in the checkpoint's pickles, or none."""
    names = checkpoint.foreign
    if not names:
        return []
    shown = ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
    return [
        f"the checkpoint's metadata refers to code that Megatron checkpoints do not need: {shown}; mptq never runs it, but "
        "loading the checkpoint in Megatron may: make sure that you trust its origin"
    ]


def require_weights(checkpoint: Checkpoint) -> None:
    """Raises CheckpointError unless the checkpoint has the weights of a language model that is not yet quantized."""
    found = obstacle(checkpoint)
    if found is not None:
        raise CheckpointError(f"{checkpoint.directory} {found}")
