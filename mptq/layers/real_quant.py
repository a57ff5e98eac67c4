"""Layers whose linears ModelOpt has quantized and compressed, with the interface of megatron-core's own.

Source: megatron/core/post_training/modelopt/layers.py, whose `Norm` needs Transformer Engine, and whose two configs
quantize nothing with ModelOpt 0.44 and later (docs/dev/upstream.md).
"""

from __future__ import annotations

import logging
from typing import Any

import torch

from mptq.errors import OptionError
from mptq.layers.attention import CoreAttention, LatentAttention
from mptq.layers.linear import Linear
from mptq.quantize.activation_quantizers import has_cache, has_latent_cache
from mptq.quantize.modelopt import convert, quant_config, single_process
from mptq.quantize.weight_quantizer import Rounding, assign, is_compressed, quantizes_with_strips
from mptq.quiet import quiet_imports
from mptq.recipes.schemes import SCHEMES
from mptq.types import TensorSpec

with quiet_imports():
    from megatron.core import parallel_state
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.transformer_layer import TransformerLayer

logger = logging.getLogger(__name__)
quantizes_with_strips(Linear, "mptq.Linear")
has_cache(CoreAttention, "mptq.CoreAttention")
has_latent_cache(LatentAttention, "mptq.LatentAttention")

REAL_QUANT_SCHEMES = {"fp8_real_quant": SCHEMES["tensor"], "fp8_blockwise_real_quant": SCHEMES["block"]}
"""`real_quant_cfg` -> how the weights are stored; inputs are not quantized."""


class RealQuantTransformerLayer(TransformerLayer):  # type: ignore[misc]
    """A transformer layer whose linears can be quantized and compressed by ModelOpt, and that cannot be trained then.

    With a `real_quant_cfg` ("fp8_real_quant", "fp8_blockwise_real_quant"), the constructor compresses the linears
    without weights, and `load_state_dict` gives them theirs, which are rounded as they are assigned, one linear at a
    time. Without ("None"), `mtq.quantize` and `mtq.compress`
    do the same to the weights that the layer has; `finish` comes after them. The linears must be mptq's `Linear`.
    Raises OptionError for an unknown `real_quant_cfg`. Peak memory of loading: the FP8 weights and one linear's source.
    """

    verbose: bool = False
    """Whether to log a table of the tensors, before and after."""
    real_quant_cfg: str = "None"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._before: dict[str, TensorSpec] = {}
        for module in self.modules():
            if isinstance(module, SequentialMLP) and not parallel_state.model_parallel_is_initialized():
                module._parallel_state = single_process()  # else ModelOpt asks for megatron-core's groups
        if self.real_quant_cfg == "None":
            return
        scheme = REAL_QUANT_SCHEMES.get(self.real_quant_cfg)
        if scheme is None:
            raise OptionError(
                f"{type(self).__name__} has no real_quant_cfg {self.real_quant_cfg!r}: use {' or '.join(REAL_QUANT_SCHEMES)}"
            )
        for module in self.modules():
            if isinstance(module, Linear):
                module.weight = torch.nn.Parameter(module.weight.to("meta"), requires_grad=False)
        self.collect()
        convert(self, quant_config(scheme))
        self.finish()

    def collect(self) -> None:
        """Remembers dtypes and shapes, for `tensor_table`. Call it before `mtq.quantize`."""
        self._before = {spec.name: spec for spec in _specs(self)}

    def finish(self) -> None:
        """Drops ModelOpt's record of the conversion, which belongs to a whole model, and freezes all parameters."""
        if hasattr(self, "_modelopt_state"):
            del self._modelopt_state
        self.requires_grad_(False)
        if self.verbose and _is_first_rank():
            for row in self.tensor_table():
                logger.info("{:<64} {:<16} {:<24} {:<16} {:<24}".format(*row))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        """Rounds the weights of compressed linears as they are assigned; torch loads everything else.

        torch calls it before it goes on to the linears, and passes a copy of the dict.
        """
        for name, module in self.named_modules():
            key = f"{prefix}{name}.weight"
            if is_compressed(module) and key in state_dict and state_dict[key].element_size() > 1:
                assign(module, state_dict.pop(key), Rounding(key))
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def tensor_table(self) -> list[tuple[str, str, str, str, str]]:
        """Returns name, dtype and shape before (as of `collect`), and dtype and shape now, of each tensor; "-" if new."""
        rows = []
        for spec in _specs(self):
            old = self._before.get(spec.name)
            before = (old.dtype, str(list(old.shape))) if old else ("-", "-")
            rows.append((spec.name, *before, spec.dtype, str(list(spec.shape))))
        return rows


class FP8WeightTransformerLayer(RealQuantTransformerLayer):
    """A layer with FP8 weights, one scale each."""

    real_quant_cfg = "fp8_real_quant"


class BlockwiseFP8WeightTransformerLayer(RealQuantTransformerLayer):
    """A layer with FP8 weights, one scale for each block of 128x128."""

    real_quant_cfg = "fp8_blockwise_real_quant"


def _specs(layer: torch.nn.Module) -> list[TensorSpec]:
    """Returns the tensors without `state_dict`, in which ModelOpt waits for a GPU."""
    tensors = [*layer.named_parameters(), *layer.named_buffers()]
    return [TensorSpec(name, str(value.dtype).removeprefix("torch."), tuple(value.shape)) for name, value in tensors]


def _is_first_rank() -> bool:
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
