"""Registers methods of rounding as calibration algorithms of ModelOpt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch

from mptq.quiet import quiet_imports

with quiet_imports():
    from modelopt.torch.opt.config import ModeloptField
    from modelopt.torch.quantization.config import QuantizeAlgorithmConfig
    from modelopt.torch.quantization.conversion import set_quantizer_by_cfg_context
    from modelopt.torch.quantization.mode import BaseCalibrateModeDescriptor, CalibrateModeRegistry

type Loop = Callable[[torch.nn.Module], None]
"""ModelOpt's `forward_loop`: calls the module that it is given once for each batch."""


def register(name: str, prepare: Callable[[torch.nn.Module, Loop | None], Callable[[], None]]) -> None:
    """Makes `algorithm: {method: name}` round a module's weights: `prepare(module, forward_loop)` returns what does it.

    That is called with all quantizers off: weights that are not rounded yet are used as they are.
    """

    class Config(QuantizeAlgorithmConfig):  # type: ignore[misc]
        method: Literal[name] = ModeloptField(name)  # type: ignore[valid-type]

    def calibrate(module: torch.nn.Module, forward_loop: Loop | None) -> None:
        work = prepare(module, forward_loop)
        with torch.no_grad(), set_quantizer_by_cfg_context(module, [{"quantizer_name": "*", "enable": False}]):
            work()

    @CalibrateModeRegistry.register_mode
    class _Mode(BaseCalibrateModeDescriptor):  # type: ignore[misc]
        _calib_func = calibrate

        @property
        def config_class(self) -> type[QuantizeAlgorithmConfig]:
            return Config
