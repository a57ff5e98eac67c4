"""Run options, and which options of `mptq quantize` `--resume` compares. Does not import torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq import report
from mptq.calibration.datasets.options import DataOptions
from mptq.checkpoint.index import ends_of_shards
from mptq.formats import FORMATS
from mptq.formats.hf.tokenizer import tokenizer_hashes

if TYPE_CHECKING:
    from mptq.model.generation import Generation
    from mptq.plan.plan import Plan

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Options:
    """How to run; what to do to the model is in the recipe. `device` is auto, cpu, cuda or cuda:N.

    `data` selects the calibration and held-out sequences, `batch_size` of which are processed at once. Their hidden
    states are kept in memory up to `activation_memory` bytes (None: a quarter of the available memory), and in files
    beyond that. An expert that saw fewer than `moe_min_tokens` tokens gets its static scales from the layer's other
    experts. With `sensitivity`, the report has what each group of linears costs. With `resume`, an interrupted run is
    continued. `stop` is called after each unit; if it returns True, the run stops.
    """

    tokenizer: Path | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False
    device: str = "auto"
    data: DataOptions = field(default_factory=DataOptions)
    batch_size: int = 8
    activation_memory: int | None = None
    moe_min_tokens: int = 16
    sensitivity: bool = False
    gates: report.QualityLimits = field(default_factory=report.QualityLimits)
    resume: bool = False
    stop: Callable[[], bool] = bool


LIMIT = "limit"
"""A limit on the report's figures, checked on every run, even if the output is complete already."""
RUN = "run"
"""Affects how the run works, where it writes or what it prints, but not the output."""

KINDS: Mapping[str, str] = {
    "CKPT": "checkpoint",
    "--iteration": "checkpoint",
    "--config": "model",
    "--hf-config": "model",
    "--recipe": "recipe",
    "--ignore": "recipe",
    "--kv-cache": "recipe",
    "--rounding": "recipe",
    "--format": "format",
    "--tokenizer": "tokenizer",
    "--max-shard-size": "max_shard_size",
    "--device": "device",
    "--calib-dataset": "calib_dataset",
    "--calib-size": "calib_size",
    "--calib-seq-length": "calib_seq_length",
    "--calib-batch-size": "calib_batch_size",
    "--calib-packing": "calib_packing",
    "--eval-size": "eval_size",
    "--unseen-size": "unseen_size",
    "--seed": "seed",
    "--moe-min-tokens": "moe_min_tokens",
    "--max-kl": LIMIT,
    "--max-ppl-increase": LIMIT,
    "--output": RUN,
    "--activation-memory": RUN,
    "--sensitivity": "sensitivity",
    "--keep-bytes": "recipe",
    "--trust-remote-code": RUN,  # its effects are in `tokens`
    "--overwrite": RUN,
    "--resume": RUN,
    "--dry-run": RUN,
    "--json": RUN,
    "--quiet": RUN,
    "--verbose": RUN,
}
"""Every option of `mptq quantize` -> LIMIT, RUN, or, if it changes the output, the key of `decisive` it affects."""

_CONTENTS = {
    "shards": "the contents of the shards",
    "tokens": "the contents of the data",
    "tensors": "the plan of the tensors",
    "generation": "the generation config",
}
"""Keys of `decisive` that follow from options and files, and are only reported if no option differs."""
_RUNS = {"versions": "package versions", "schema": "the journal version"}
"""What the journal of an unfinished output has in addition to `decisive`."""


def decisive(
    plan: Plan, options: Options, device: str, tokenizer: Path | None, generation: Generation, data: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Returns what the output depends on, as plain data. `--resume` requires it to be unchanged.

    `device` is the type of the device, `tokenizer` the directory that is copied into the output, `generation` the ids
    in its configs, and `data` the record of the token sequences (None for a run without activations). Values that do
    not affect the output are left out or None.
    """
    checkpoint, made = plan.source.checkpoint, report.manifest_of(plan, {}, {})
    keys = {part.key for parts in plan.source.places.values() for part in parts}
    sharded, has_texts = (
        any(getattr(FORMATS[form], name) for form in plan.formats) for name in ("is_sharded", "has_tokenizer")
    )
    texts = tokenizer_hashes(tokenizer) if has_texts and tokenizer is not None else None
    ends = ends_of_shards(checkpoint, keys)
    found = {
        "checkpoint": made["source"],
        "shards": {"sha256": ends},
        "model": _digest(made["model"]),
        "recipe": {"sha256": plan.recipe.fingerprint},
        "format": list(plan.formats),
        "tensors": _digest([made["tensors"], made["kv_cache"], made["dialect"]]),
        "tokenizer": None if texts is None else _digest(texts),
        "generation": _digest(dict(generation.fields)) if has_texts else None,
        "max_shard_size": options.max_shard_bytes if sharded else None,
        "device": device,
        "eval_size": 0 if data is None else data["held_out"]["sequences"],
        "sensitivity": options.sensitivity,
    }
    if data is None:
        return found
    return found | {
        "calib_dataset": [f"{row['name']}:{row['weight']:g}" for row in data["datasets"]],
        "calib_size": data["calibration"]["sequences"],
        "calib_seq_length": data["seq_length"],
        "calib_batch_size": options.batch_size,
        "calib_packing": data["packed"],
        "seed": data["seed"],
        "unseen_size": data["unseen"]["sequences"] if data.get("unseen") else 0,
        "moe_min_tokens": options.moe_min_tokens,
        "tokens": _digest([data[part]["sha256"] for part in ("calibration", "held_out", "unseen") if data.get(part)]),
    }


def differences(made: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Returns the options in which two results of `decisive` differ, as command-line flags, with short values."""
    keys = [*wanted, *(key for key in made if key not in wanted)]
    differing = [key for key in keys if key in made and key in wanted and made[key] != wanted[key]]
    chosen = [key for key in differing if key not in _CONTENTS] or differing
    chosen = chosen or [key for key in keys if (key in made) != (key in wanted)]
    return [_words(key, made.get(key), wanted.get(key)) for key in chosen]


def _words(key: str, made: Any, wanted: Any) -> str:
    flags = [flag for flag, kind in KINDS.items() if kind == key]
    words = " or ".join(flags) or (_CONTENTS | _RUNS).get(key, key)
    shown = [",".join(value) if isinstance(value, list) else value for value in (made, wanted)]
    if any(value is None or isinstance(value, dict) for value in shown):
        return words
    return f"{words} ({shown[0]}, now {shown[1]})"


def _digest(content: Any) -> dict[str, str]:
    return {"sha256": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}
