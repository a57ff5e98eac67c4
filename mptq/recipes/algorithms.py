"""ModelOpt's calibration algorithms: those that a recipe can name, and why the others are refused. No torch.

Source: `QuantizeAlgorithmConfig` and its subclasses in modelopt/torch/quantization/config.py.
"""

from __future__ import annotations

ALGORITHMS: dict[str, tuple[float, float, int]] = {"max": (1.0, 1.0, 1), "mse": (0.25, 4.0, 39)}
"""Algorithm -> the multiples of a cell's largest magnitude that it may scale for: the first, the last, and how many.

They are spaced evenly (`MseCalibrator`, modelopt/torch/quantization/calib/mse.py, with the defaults of `MseCalibConfig`).
"""
SEARCHED = (1.0, *(2.0 ** (step / 8) for step in range(-3, 9) if step))
"""Multiples of a cell's largest magnitude that rounding by the inputs tries: a binade is a whole period of E4M3.

The first of equally good ones is taken, so cells of zeros have the scale 1.
"""
_NO_FORM = "engines' FP8 checkpoints have no place for"
REFUSED = {
    "smoothquant": f"{_NO_FORM} its scales of the input channels",
    "awq_lite": f"{_NO_FORM} its scales of the input channels",
    "awq_full": f"{_NO_FORM} its scales of the input channels",
    "awq_clip": "it clips blocks along a row, which the FP8 forms do not have: use mse",
    "svdquant": f"{_NO_FORM} its low-rank branch",
    "local_hessian": "it weighs the errors of blocks of 16 along a row, as NVFP4 has them: use mse",
    "nvfp4_act_headroom": "it is for the inputs of NVFP4",
    "gptq": "it is about codes, not scales: use `rounding: gptq`",
    "lsq": "it trains the scales, but mptq's layers are frozen",
}
"""ModelOpt's other algorithms, with the reason why they are not offered."""


def require_known(name: object) -> None:
    """Raises ValueError with the reason if `name` is not one of `ALGORITHMS`."""
    if isinstance(name, str) and name in ALGORITHMS:
        return
    reason = REFUSED.get(str(name))
    known = " or ".join(ALGORITHMS)
    raise ValueError(f"{name} is not supported: {reason}" if reason else f"{name!r} is unknown: use {known}")
