"""What a checkpoint can hold that is no model to quantize: one that is quantized already, or no weights at all. No torch."""

from __future__ import annotations

import re

from mptq.checkpoint.index import Checkpoint
from mptq.errors import CheckpointError

_QUANTIZER = re.compile(r"_quantizer\._(amax|scale|double_scale)$")
_MAIN_PARAM = re.compile(r"(^|\.)optimizer\.(state\.(fp32_)?param\.|distributed\.)")  # by parameter, or in buckets
_OPTIMIZER = re.compile(r"(^|\.)optimizer\.")


def is_quantized(checkpoint: Checkpoint) -> bool:
    """Whether ModelOpt has quantized the model: it has quantizers' tensors, or ModelOpt's state beside it."""
    return (checkpoint.directory / "modelopt_state").is_dir() or any(map(_QUANTIZER.search, checkpoint.tensors))


def require_weights(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the checkpoint has the weights of a model that is not quantized yet."""
    if is_quantized(checkpoint):
        raise CheckpointError(
            f"{checkpoint.directory} is quantized already (modelopt_state, or *_quantizer.* tensors): give the checkpoint that "
            "it was made from"
        )
    if all(map(_OPTIMIZER.search, checkpoint.tensors)) and any(map(_MAIN_PARAM.search, checkpoint.tensors)):
        raise CheckpointError(
            f"{checkpoint.directory} has the weights only as the optimizer's main params (optimizer.state.fp32_param.*): "
            "load it in Megatron-LM and save it with the model's weights"
        )
