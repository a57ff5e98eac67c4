"""The report: what a run did and what it cost, as one JSON document. No torch."""

from __future__ import annotations

import json
import math
import platform
import resource
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.arch import naming
from mptq.writers.manifest import read_document

if TYPE_CHECKING:
    from mptq.plan import Plan
    from mptq.types import TensorSpec, WeightError

NAME = "report.json"
SCHEMA = 1
_PACKAGES = ("mptq", "torch", "megatron-core", "nvidia-modelopt", "transformers", "safetensors")


def tensor_row(form: str, name: str, inner: str, dtype: str, shape: tuple[int, ...], error: WeightError) -> dict[str, Any]:
    """One quantized tensor: before, after, amax and error (relative to the source's norm)."""
    return {
        "format": form,
        "name": name,
        "source": inner,
        "dtype_before": dtype,
        "dtype_after": "float8_e4m3fn",
        "shape": list(shape),
        "amax": error.amax,
        "norm": error.norm,
        "relative_error": error.relative,
        "max_abs_error": error.max_abs,
        "sqnr_db": error.sqnr_db,
    }


def relative_error(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """The relative error of several tensors taken as one, or None for no tensors."""
    pairs = [(row["relative_error"], row["norm"]) for row in rows]
    signal = sum(norm**2 for _, norm in pairs)
    if not pairs:
        return None
    return math.sqrt(sum((error * norm) ** 2 for error, norm in pairs) / signal) if signal else 0.0


def layer_errors(rows: Iterable[Mapping[str, Any]], layers: int) -> list[dict[str, Any]]:
    """Weight error of each layer, by format."""
    by_layer: dict[int, dict[str, list[Mapping[str, Any]]]] = {layer: {} for layer in range(layers)}
    for row in rows:
        layer = int(row["source"].split(".")[2])
        by_layer[layer].setdefault(row["format"], []).append(row)
    return [
        {"layer": layer} | {form: relative_error(found) for form, found in forms.items()} for layer, forms in by_layer.items()
    ]


def describe(plan: Plan) -> dict[str, Any]:
    """The plan as plain data: what `--dry-run` prints, and the first part of the report."""
    checkpoint = plan.source.checkpoint
    return {
        "schema": SCHEMA,
        "recipe": plan.recipe.model_dump(),
        "recipe_sha256": plan.recipe.fingerprint,
        "source": {
            "path": str(checkpoint.directory),
            "iteration": checkpoint.location.iteration,
            "metadata_sha256": checkpoint.fingerprint,
        },
        "model": asdict(plan.model),
        "formats": list(plan.formats),
        "bytes": {"in": plan.bytes_in} | {form: plan.bytes_out(form) for form in plan.formats},
        "components": plan.components(),
        "actions": plan.actions(),
        "quantized_linears": {
            form: [linear.megatron for linear in plan.linears if form != "hf" or plan.in_hf(linear)] for form in plan.formats
        },
        "excluded": plan.excluded if "hf" in plan.formats else [],
        "differing": plan.differing if len(plan.formats) > 1 else [],
        "dropped": plan.source.dropped,
        "predicted_peak_bytes": plan.peak_memory,
        "warnings": plan.warnings,
    }


def build(
    plan: Plan, rows: list[dict[str, Any]], seconds: dict[str, float], notes: list[str], started: float
) -> dict[str, Any]:
    """The whole report of a run that began at `started` (time.perf_counter)."""
    return describe(plan) | {
        "warnings": notes,
        "relative_error": {form: relative_error(row for row in rows if row["format"] == form) for form in plan.formats},
        "layers": layer_errors(rows, plan.model.num_layers),
        "tensors": rows,
        "seconds": {stage: round(spent, 3) for stage, spent in seconds.items()}
        | {"total": round(time.perf_counter() - started, 3)},
        "peak_rss_bytes": peak_rss(),
        "versions": versions(),
    }


def manifest(plan: Plan, files: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest says beside its schema: no path, time or host, so that the same run gives the same bytes."""
    return {
        "mptq": version("mptq"),
        "recipe": plan.recipe.model_dump(),
        "recipe_sha256": plan.recipe.fingerprint,
        "source": {
            "iteration": plan.source.checkpoint.location.iteration,
            "metadata_sha256": plan.source.checkpoint.fingerprint,
        },
        "model": asdict(plan.model) | {"tokenizer": None},
        "formats": list(plan.formats),
        "excluded": plan.excluded,
        "tensors": tensor_account(plan),
        "dropped": plan.source.dropped,
        "files": dict(files),
    }


def tensor_account(plan: Plan) -> dict[str, dict[str, Any]]:
    """Every inner tensor of the source: where it was, and the tensors that each output has of it."""
    account: dict[str, dict[str, Any]] = {}

    def add(inner: str, outputs: dict[str, list[TensorSpec]]) -> None:
        account[inner] = {
            "from": [
                {"key": part.key} | ({} if part.layer is None else {"layer": part.layer}) for part in plan.source.places[inner]
            ]
        } | {
            form: [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in specs]
            for form, specs in outputs.items()
        }

    for copy in naming.outer_copies(plan.model):
        add(copy.megatron, {form: [plan.copy_spec(form, copy)] for form in plan.formats})
    for layer in range(plan.model.num_layers):
        for copy in naming.layer_copies(plan.model):
            inner = naming.megatron_layer(layer) + copy.megatron
            add(inner, {form: [plan.copy_spec(form, copy, layer)] for form in plan.formats})
        for linear in plan.linears:
            by_form = {"hf": plan.hf_linear_specs, "megatron": plan.megatron_linear_specs}
            inner = f"{naming.megatron_layer(layer)}{linear.megatron}.weight"
            add(inner, {form: list(by_form[form](layer, linear)) for form in plan.formats})
    return account


def versions() -> dict[str, str]:
    """Versions of what the figures depend on."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_rss() -> int:
    """Peak resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write(root: Path, document: dict[str, Any]) -> None:
    """Write the report of the output at `root`."""
    (root / NAME).write_text(json.dumps(document, indent=1) + "\n")


def read(root: Path) -> dict[str, Any]:
    """The report of the mptq output at `root`; raises OutputError where there is none that this version reads."""
    return read_document(root / NAME, SCHEMA)
