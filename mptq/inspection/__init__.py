"""What a directory holds: a Megatron checkpoint, or a Hugging Face model, of mptq's or of others. No torch.

`inspect` is all of it; `tree` has the tensors by component, `settings` where the architecture is known from, `predictions`
what the recipes would make of it, `quantized` what was made of it already.
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
    """One document for each model in the directory: two for an output of mptq in both formats.

    `options` choose and describe a Megatron checkpoint. Raises CheckpointError when the directory holds neither form. Reads
    metadata and headers only.
    """
    options = options or SourceOptions()
    path = path.resolve()
    nested = [path / form for form in FORMATS if (path / form).is_dir()]
    nested = nested if (path / manifest.NAME).is_file() else []
    with gc_paused():  # all that is made stays to the end
        return [_inspect_one(directory, path, options) for directory in nested or [path]]


def _inspect_one(path: Path, root: Path, options: SourceOptions) -> dict[str, Any]:
    """The document of the model at `path`, which is in the output of mptq at `root` if that is one."""
    if any(path.glob("*.safetensors")):
        found = describe_huggingface(path)
    else:
        found = describe_megatron(open_checkpoint(path, options.iteration), options)
    if (root / manifest.NAME).is_file():
        found["output"] = output_facts(root)
        made = found["output"]
        found["facts"]["written by"] = f"mptq {made['mptq']}, recipe {made['recipe']['name']}"
    return {"schema": SCHEMA, **found}
