"""Describes a directory: a Megatron checkpoint or a Hugging Face model, by mptq or another tool. Does not import torch.

`inspect` returns the whole document. `tree` lists tensors by component, `settings` the sources of the architecture,
`predictions` the sizes that each recipe would give, and `quantized` how the weights are already quantized.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mptq.checkpoint.index import open_checkpoint
from mptq.checkpoint.pickles import gc_paused
from mptq.formats import FORMATS
from mptq.inspection.huggingface import describe_huggingface
from mptq.inspection.megatron import describe_megatron
from mptq.inspection.quantized import output_facts
from mptq.model.source import SourceOptions
from mptq.report import manifest

__all__ = ["SCHEMA", "inspect"]
SCHEMA = 2


def inspect(path: Path, options: SourceOptions | None = None) -> list[dict[str, Any]]:
    """Returns one document per model in the directory: two for an mptq output in both formats.

    `options` select the iteration of a Megatron checkpoint and override its settings. Raises CheckpointError if the directory
    has neither format. Reads only metadata and headers.
    """
    options = options or SourceOptions()
    path = path.resolve()
    nested = [path / form for form in FORMATS if (path / form).is_dir()]
    nested = nested if (path / manifest.NAME).is_file() else []
    with gc_paused():  # nearly all objects live until the end
        return [_inspect_one(directory, path, options) for directory in nested or [path]]


def _inspect_one(path: Path, root: Path, options: SourceOptions) -> dict[str, Any]:
    """Returns the document of the model at `path`; `root` is `path` or the mptq output that contains it."""
    if any(path.glob("*.safetensors")):
        found = describe_huggingface(path)
    else:
        found = describe_megatron(open_checkpoint(path, options.iteration), options)
    if (root / manifest.NAME).is_file():
        found["output"] = output_facts(root)
        made = found["output"]
        found["facts"]["written by"] = f"mptq {made['mptq']}, recipe {made['recipe']['name']}"
    return {"schema": SCHEMA, **found}
