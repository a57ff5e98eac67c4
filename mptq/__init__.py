"""mptq: quantize Megatron distributed checkpoints to FP8, one layer at a time.

These are the functions that the command line calls. Importing the package imports neither torch nor Megatron.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str
    from mptq.inspection import inspect as inspect
    from mptq.pipeline.options import Options as Options
    from mptq.pipeline.run import run as run
    from mptq.plan.plan import make_plan as make_plan
    from mptq.recipes.recipe import load_recipe as load_recipe
    from mptq.verification.structure import verify as verify

__all__ = ["Options", "inspect", "load_recipe", "make_plan", "run", "verify"]

_MODULES = {
    "Options": "mptq.pipeline.options",
    "inspect": "mptq.inspection",
    "load_recipe": "mptq.recipes.recipe",
    "make_plan": "mptq.plan.plan",
    "run": "mptq.pipeline.run",
    "verify": "mptq.verification.structure",
}


def __getattr__(name: str) -> Any:
    """Imports a public function, or looks up the version, on first use."""
    if name == "__version__":
        from importlib.metadata import version  # imported here: it takes as long as all other imports together

        return version("mptq")
    if name not in _MODULES:
        raise AttributeError(f"module 'mptq' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_MODULES[name]), name)
