"""Builds report.json: what a run did and what it cost. Does not import torch."""

from __future__ import annotations

import math
import platform
import resource
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq.errors import OptionError
from mptq.formats.layout import canonical_weight
from mptq.model import tensors
from mptq.plan import estimates
from mptq.report.manifest import read_document, write_document

if TYPE_CHECKING:
    from mptq.plan.plan import Plan
    from mptq.recipes.schemes import Scheme
    from mptq.report.run_log import RunLog
    from mptq.types import TensorSpec, WeightError

NAME = "report.json"
SCHEMA = 2
_PACKAGES = ("mptq", "torch", "megatron-core", "nvidia-modelopt", "transformers", "safetensors")


def tensor_row(form: str, name: str, before: TensorSpec, scheme: Scheme, error: WeightError) -> dict[str, Any]:
    """Returns the report row of quantized tensor `name` of a format; errors are relative to the source norm."""
    return {
        "format": form,
        "name": name,
        "source": before.name,
        "scheme": scheme.words,
        "dtype_before": before.dtype,
        "dtype_after": "float8_e4m3fn",
        "shape": list(before.shape),
        "amax": error.amax,
        "norm": error.norm,
        "relative_error": error.relative,
        "max_abs_error": error.max_abs,
        "sqnr_db": error.sqnr_db,
        "scale_min": error.scale_min,
        "scale_max": error.scale_max,
        "zeros": error.zeros,
        "saturated": error.saturated,
    }


def relative_error(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Returns the relative error of several tensors taken as one, or None without tensors."""
    pairs = [(row["relative_error"], row["norm"]) for row in rows]
    signal = sum(norm**2 for _, norm in pairs)
    if not pairs:
        return None
    return math.sqrt(sum((error * norm) ** 2 for error, norm in pairs) / signal) if signal else 0.0


def _served(rows: Iterable[Mapping[str, Any]]) -> float | None:
    """Returns the relative error of all weights as served on Blackwell; None if it is the same."""
    found = list(rows)
    if all(row["served_error"] is None for row in found):
        return None
    return relative_error({**row, "relative_error": row["served_error"] or row["relative_error"]} for row in found)


_MEASURED = ("hidden_relative_error", "hidden_cosine", "hidden_token_error", "sensitivity", "kv_cache", "experts")


def layer_rows(log: RunLog, layers: int) -> list[dict[str, Any]]:
    """Returns the weight error by format and the activation measurements of each layer."""
    measured = {row["layer"]: row for row in log.layers}
    by_layer: dict[int, dict[str, list[Mapping[str, Any]]]] = {layer: {} for layer in range(layers)}
    for row in log.rows:
        layer = int(row["source"].split(".")[2])
        by_layer[layer].setdefault(row["format"], []).append(row)
    return [
        {"layer": layer}
        | {form: relative_error(found) for form, found in forms.items()}
        | {name: measured.get(layer, {}).get(name) for name in _MEASURED}
        for layer, forms in by_layer.items()
    ]


def describe(plan: Plan, work: estimates.ActivationBudget | None = None) -> dict[str, Any]:
    """Returns the plan as plain data: the output of `--dry-run` and the first part of the report."""
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
        "model": plan.model.document,
        "formats": list(plan.formats),
        "bytes": {"in": estimates.bytes_in(plan)} | {form: layout.nbytes for form, layout in plan.layouts.items()},
        "components": estimates.components(plan),
        "actions": estimates.actions(plan),
        "schemes": {form: estimates.schemes(plan, form) for form in plan.formats},
        "excluded": facts(plan).get("excluded", []),
        "differing": plan.differing if len(plan.formats) > 1 else [],
        "dropped": plan.skipped,
        "predicted_peak_bytes": estimates.peak_memory(plan, work),
        "warnings": estimates.warnings(plan),
    }


@dataclass(frozen=True)
class QualityLimits:
    """Upper limits for fidelity: mean KL divergence in nats, and perplexity increase in percent."""

    max_kl: float | None = None
    max_ppl_increase: float | None = None

    @property
    def flags(self) -> list[str]:
        """The command-line options of the limits that are set."""
        values = {"--max-kl": self.max_kl, "--max-ppl-increase": self.max_ppl_increase}
        return [flag for flag, limit in values.items() if limit is not None]

    def require_finite(self) -> None:
        """Raises OptionError for a limit that is infinite or NaN."""
        limits = (self.max_kl, self.max_ppl_increase)
        if not all(math.isfinite(limit) for limit in limits if limit is not None):
            raise OptionError(f"{' and '.join(self.flags)} must be finite: omit an option to set no limit")

    def check(self, fidelity: Mapping[str, Any] | None) -> list[dict[str, Any]]:
        """Returns a row for each limit that is set, with the measured value and whether the limit is met.

        A limit holds for the held-out text and for that of an unseen kind.
        """
        found = [self._row(name, "held_out", fidelity) for name in ("max_kl", "max_ppl_increase")]
        if fidelity is not None and fidelity.get("unseen") is not None:
            found += [self._row(name, "unseen", fidelity["unseen"]) for name in ("max_kl", "max_ppl_increase")]
        return [row for row in found if row["limit"] is not None]

    def _row(self, name: str, text: str, fidelity: Mapping[str, Any] | None) -> dict[str, Any]:
        limit, value = getattr(self, name), None
        if fidelity is not None:
            value = fidelity["kl"]["mean"] if name == "max_kl" else 100 * (fidelity["perplexity"]["ratio"] - 1)
        met = value is not None and limit is not None and value <= limit
        return {"name": name, "text": text, "limit": limit, "value": value, "met": met}


@dataclass(frozen=True)
class Measured:
    """Results of a run: its log, warnings, calibration data, and activation budget."""

    log: RunLog
    notes: list[str]
    calibration: dict[str, Any] | None
    work: estimates.ActivationBudget | None


def build(plan: Plan, measured: Measured, gates: QualityLimits) -> dict[str, Any]:
    """Returns the complete report of a run."""
    log = measured.log
    seconds = {stage: round(spent, 3) for stage, spent in log.seconds.items()}
    return describe(plan, measured.work) | {
        "warnings": measured.notes,
        "served_error": {form: _served(row for row in log.rows if row["format"] == form) for form in plan.formats},
        "relative_error": {form: relative_error(row for row in log.rows if row["format"] == form) for form in plan.formats},
        "calibration": measured.calibration,
        "fidelity": log.fidelity,
        "gates": gates.check(log.fidelity),
        "layers": layer_rows(log, plan.model.num_layers),
        "tensors": log.rows,
        "seconds": seconds | {"total": round(log.elapsed, 3)},
        "bytes_per_second": {stage: _speed(log, stage) for stage in ("read", "write")},
        "peak_rss_bytes": peak_rss(),
        "ranks": [log.ranks[rank] for rank in sorted(log.ranks)],
        "versions": versions(),
    }


def _speed(log: RunLog, stage: str) -> int | None:
    """Returns bytes per second of a stage; None if it had no work, as in a resumed run with all units written."""
    count, seconds = log.bytes.get(stage, 0), log.seconds.get(stage, 0.0)
    return round(count / seconds) if count and seconds else None


def manifest_of(plan: Plan, files: Mapping[str, Any], options: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the manifest without its schema version. It has no path, time or host: the same run gives the same bytes.

    `options` are the options that the output depends on (options.decisive).
    """
    return {
        "mptq": version("mptq"),
        "recipe": plan.recipe.model_dump(),
        "recipe_sha256": plan.recipe.fingerprint,
        "source": {
            "iteration": plan.source.checkpoint.location.iteration,
            "metadata_sha256": plan.source.checkpoint.fingerprint,
        },
        "options": dict(options),
        "model": plan.model.document | {"tokenizer": None},
        "formats": list(plan.formats),
        "excluded": facts(plan).get("excluded", []),
        "dialect": facts(plan).get("dialect"),
        "tensors": tensor_manifest(plan),
        "kv_cache": cache_manifest(plan),
        "dropped": plan.skipped,
        "files": dict(files),
    }


def tensor_manifest(plan: Plan) -> dict[str, dict[str, Any]]:
    """Returns, for every inner tensor of the source, its place in the checkpoint and its tensors in each output."""
    account: dict[str, dict[str, Any]] = {}

    def add(inner: str, outputs: Mapping[str, Iterable[TensorSpec]]) -> dict[str, Any]:
        account[inner] = {
            "from": [
                {"key": part.key} | ({"index": list(part.index)} if part.index else {}) for part in plan.source.places[inner]
            ]
        } | {form: spec_rows(specs) for form, specs in outputs.items()}
        return account[inner]

    layouts = plan.layouts
    before, after = tensors.outer_copies(plan.model)
    for tensor in (*before, *after, *plan.passthrough):
        add(tensor.megatron, {form: layout.unquantized(tensor) for form, layout in layouts.items()})
    for layer in plan.layers:
        for tensor in plan.unquantized(layer):
            name = tensors.megatron_layer(layer) + tensor.megatron
            add(name, {form: layout.unquantized(tensor, layer) for form, layout in layouts.items()})
        for linear in plan.linears(layer):
            entry = add(
                canonical_weight(layer, linear), {form: layout.linear(layer, linear) for form, layout in layouts.items()}
            )
            found = {form: layout.scheme(layer, linear) for form, layout in layouts.items()}
            entry["scheme"] = {form: scheme.name for form, scheme in found.items() if scheme is not None}
    return account


def spec_rows(specs: Iterable[TensorSpec]) -> list[dict[str, Any]]:
    """Returns tensor specs as plain data."""
    return [{"name": spec.name, "dtype": spec.dtype, "shape": list(spec.shape)} for spec in specs]


def cache_manifest(plan: Plan) -> dict[str, list[dict[str, Any]]]:
    """Returns the KV cache scale tensors of each output, which have no source tensor."""
    layers = [layer for layer in plan.layers if plan.assignment.has_cache(layer)]
    return {
        form: spec_rows(spec for layer in layers for spec in layout.kv_cache(layer)) for form, layout in plan.layouts.items()
    }


def facts(plan: Plan) -> dict[str, Any]:
    """Returns the facts of all formats about their outputs, merged."""
    return {name: value for layout in plan.layouts.values() for name, value in layout.facts.items()}


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the packages that affect the results."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def peak_rss() -> int:
    """Returns the peak resident memory of this process so far, in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def write(root: Path, document: dict[str, Any]) -> None:
    """Writes the report of the output at `root`; raises OutputError if it is not valid."""
    from mptq.report.schema import Report

    write_document(root / NAME, document, SCHEMA, Report)


def read(root: Path) -> dict[str, Any]:
    """Reads the report of the mptq output at `root`; raises OutputError if it is missing or of another version."""
    from mptq.report.schema import Report

    return read_document(root / NAME, SCHEMA, Report)
