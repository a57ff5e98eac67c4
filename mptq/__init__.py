"""mptq: quantize Megatron distributed checkpoints to FP8, one layer at a time.

These are the functions that the command line calls, and layers for a megatron-core layer spec. Importing the package
imports neither torch nor Megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from mptq.inspection import inspect as inspect
    from mptq.layers.linear import Linear as Linear
    from mptq.layers.norm import Norm as Norm
    from mptq.layers.real_quant import BlockwiseFP8WeightTransformerLayer as BlockwiseFP8WeightTransformerLayer
    from mptq.layers.real_quant import FP8WeightTransformerLayer as FP8WeightTransformerLayer
    from mptq.layers.real_quant import RealQuantTransformerLayer as RealQuantTransformerLayer
    from mptq.pipeline.options import Options as Options
    from mptq.pipeline.run import run as run
    from mptq.plan.plan import make_plan as make_plan
    from mptq.recipes.recipe import load_recipe as load_recipe
    from mptq.verification.structure import verify as verify

__all__ = [
    "BlockwiseFP8WeightTransformerLayer",
    "FP8WeightTransformerLayer",
    "Linear",
    "Norm",
    "Options",
    "RealQuantTransformerLayer",
    "inspect",
    "load_recipe",
    "make_plan",
    "run",
    "verify",
]

_MODULES = {
    "BlockwiseFP8WeightTransformerLayer": "mptq.layers.real_quant",
    "FP8WeightTransformerLayer": "mptq.layers.real_quant",
    "Linear": "mptq.layers.linear",
    "Norm": "mptq.layers.norm",
    "Options": "mptq.pipeline.options",
    "RealQuantTransformerLayer": "mptq.layers.real_quant",
    "inspect": "mptq.inspection",
    "load_recipe": "mptq.recipes.recipe",
    "make_plan": "mptq.plan.plan",
    "run": "mptq.pipeline.run",
    "verify": "mptq.verification.structure",
}

_ALGORITHMS = "mptq.calibration.rounding_modes"
"""Registers ModelOpt algorithms for the layers of `mptq.layers.real_quant`."""


def __getattr__(name: str) -> Any:
    """Imports a public function, or looks up the version, on first use."""
    if name == "__version__":
        from importlib.metadata import version  # imported here: it takes as long as all other imports together

        return version("mptq")
    if name not in _MODULES:
        raise AttributeError(f"module 'mptq' has no attribute {name!r}")
    import importlib

    if _MODULES[name] == "mptq.layers.real_quant":
        importlib.import_module(_ALGORITHMS)
    return getattr(importlib.import_module(_MODULES[name]), name)
