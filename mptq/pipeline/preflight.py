"""Checks before the first tensor is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mptq import report
from mptq.calibration.tokenizer import generation_config, special_ids
from mptq.calibration.tokens import check_datasets, load_tokens, needs_tokenizer
from mptq.errors import DataError, MptqError, OutputError
from mptq.formats import FORMATS
from mptq.formats.hf.tokenizer import tokenizer_files
from mptq.model.generation import Generation, resolve
from mptq.output.directory import check_output
from mptq.pipeline.options import MAX_SHARD_BYTES, Options, decisive, differences
from mptq.plan import estimates
from mptq.plan.plan import Plan
from mptq.report import html, manifest
from mptq.types import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

    from mptq.calibration.tokens import TokenData

SLACK_BYTES = 64_000_000
"""Disk space for what the plan does not count: headers, byte items, tokenizer, manifest and report."""


def default_output(plan: Plan, given: Path) -> Path:
    """Returns the default output path: checkpoint name, dash, recipe name, next to the checkpoint."""
    root = plan.source.checkpoint.location.root
    name = root.name if given.resolve() == root else f"{root.name}-{plan.source.checkpoint.directory.name}"
    return root.parent / f"{name}-{plan.recipe.name}"


@dataclass(frozen=True)
class Preflight:
    """Result of `check`: the tokenizer's directory, the budget of activations (None: no forward passes), and warnings.

    `generation` has the ids with which generation begins and ends. If `complete`, there is nothing to do.
    """

    tokenizer: Path | None
    work: estimates.ActivationBudget | None
    notes: list[str]
    generation: Generation
    complete: bool = False


def check(plan: Plan, out: Path, options: Options, processes: int = 1) -> Preflight:
    """Checks everything that can be checked before the first tensor is read, for a run of `processes` processes.

    Raises OutputError for an output that cannot be written and for a `--tokenizer` without tokenizer files, DataError
    if data that the recipe or a limit needs is missing, UnsupportedModelError if the recipe needs forward passes and
    the model cannot be run, and MptqError for a device that does not exist.
    """
    plan.require_runnable()
    if options.device not in ("auto", "cpu"):  # these always exist, and checking imports torch
        pick_device(options.device)
    check_datasets(options.data)
    tokenizer, missing = _tokenizer(plan, options)
    generation = _generation(plan, tokenizer)
    notes = estimates.warnings(plan) + (list(generation.warnings) if _has_tokenizer(plan) else [])
    has_data = tokenizer is not None or not needs_tokenizer(options.data)
    options.gates.require_finite()
    _require_figures(plan, options)
    if tokenizer is None:
        _require_no_text(options, missing)
    if not has_data:
        _require_no_data(plan, options, missing)
        if options.data.eval_size and plan.runs:
            notes.append(f"no fidelity figures ({missing}): pass --tokenizer DIR, or --eval-size 0 to skip them")
    if tokenizer is None and _has_tokenizer(plan):
        notes.append(f"no tokenizer in the output ({missing}): pass --tokenizer DIR")
    runs = plan.runs and has_data and (plan.recipe.needs_data or options.data.eval_size > 0)
    if runs and processes > 1 and plan.recipe.calibration.method != "max":
        raise DataError("percentile calibration needs all samples in one process: use method max, or start a single process")
    notes += [*_without_effect(plan, options, runs), *_without_page()]
    work = _work(plan, options, tokenizer) if runs else None
    checked = Preflight(tokenizer, work, notes, generation)
    if finished(plan, out, options, checked):
        return replace(checked, complete=True)
    needed = _needed_bytes(plan, work)
    check_output(out, plan.source.checkpoint.location.root, needed, options.overwrite, options.resume)
    return checked


def _without_effect(plan: Plan, options: Options, runs: bool) -> list[str]:
    """Returns a warning for each given option that this run does not use."""
    notes = []
    if options.data.datasets and not runs:
        reason = "no scales are calibrated, and --eval-size is 0"
        if plan.recipe.scheme is None:
            reason = f"recipe {plan.recipe.name} quantizes nothing"
        elif plan.model.not_run:
            reason = "mptq cannot run this model"
        notes.append(f"--calib-dataset has no effect: {reason}")
    if options.max_shard_bytes != MAX_SHARD_BYTES and not any(FORMATS[form].is_sharded for form in plan.formats):
        notes.append(f"--max-shard-size has no effect: {' and '.join(plan.formats)} output has one file per layer")
    return notes


def _without_page() -> list[str]:
    """Returns a warning if the report's page cannot be drawn here."""
    problem = html.unavailable()
    return [f"no {html.NAME}: {problem}"] if problem else []


def _has_tokenizer(plan: Plan) -> bool:
    """Whether an output includes the tokenizer and the ids with which generation begins and ends."""
    return any(FORMATS[form].has_tokenizer for form in plan.formats)


def _needed_bytes(plan: Plan, work: estimates.ActivationBudget | None) -> int:
    """Returns the disk space that the run needs, in bytes: outputs and, during the run, activations."""
    needed = sum(layout.nbytes for layout in plan.layouts.values()) + SLACK_BYTES
    if work is None:
        return needed
    # Saved activations are there twice: after the last finished layer, and after the one before.
    return needed + work.file_bytes + 2 * (work.stored_bytes + work.file_bytes)


def _require_figures(plan: Plan, options: Options) -> None:
    """Raises DataError for an option that needs fidelity figures if this run cannot measure any."""
    wanted = _of_figures(options)
    if wanted is None:
        return
    reason = None
    if not options.data.eval_size:
        reason = "--eval-size is 0: use at least 1 sequence"
    elif plan.recipe.scheme is None:
        reason = f"recipe {plan.recipe.name} quantizes nothing: remove it"
    elif plan.model.not_run:
        reason = f"mptq cannot run this model, which has {'; '.join(plan.model.not_run)}: remove it"
    if reason is not None:
        raise DataError(f"{wanted} needs fidelity figures, but {reason}")


def _of_figures(options: Options) -> str | None:
    """Returns the option that needs fidelity figures, in words; None if there is none."""
    if options.gates != report.QualityLimits():
        return f"a fidelity limit ({' and '.join(options.gates.flags)})"
    if options.sensitivity:
        return "--sensitivity"
    return "--unseen-size" if options.data.unseen_size else None


def _work(plan: Plan, options: Options, tokenizer: Path | None) -> estimates.ActivationBudget:
    """Returns the budget of the activations, assuming that every sequence is full."""
    data, recipe = options.data, plan.recipe
    length = min(data.seq_length, plan.model.max_position_embeddings)
    calibrating = data.calib_size if recipe.needs_data else 0
    both = recipe.propagates + recipe.compares_streams
    unseen = data.unseen(recipe.needs_data) if tokenizer is not None else 0
    evaluated = data.eval_size + unseen
    streams = 2 * evaluated + calibrating * max(1, both) + data.eval_size * plan.recipe.is_requantized
    sequence = length * plan.model.hidden_size * DTYPE_BYTES[plan.model.dtype]
    stored = streams * sequence
    kept, filed = (stored, 0) if stored <= activation_memory(options) else (0, stored)
    together = min(options.batch_size, max(data.eval_size, calibrating))
    rounding = calibrating * length if recipe.rounding != "nearest" else 0
    return estimates.ActivationBudget(
        stored_bytes=kept,
        file_bytes=filed,
        batch_tokens=together * length,
        length=length,
        compares=data.eval_size > 0,
        rounding_tokens=rounding,
        streams=1 + recipe.compares_streams,
        measured_bytes=2 * evaluated * sequence if options.sensitivity else 0,
    )


def activation_memory(options: Options) -> int:
    """Returns the bytes that hidden states may take in memory."""
    if options.activation_memory is not None:
        return options.activation_memory
    return int(psutil.virtual_memory().available) // 4


def _tokenizer(plan: Plan, options: Options) -> tuple[Path | None, str]:
    """Returns the directory of the tokenizer, or None and the reason why there is none."""
    if options.tokenizer is not None:
        if not tokenizer_files(options.tokenizer):
            raise OutputError(
                f"--tokenizer {options.tokenizer} has no tokenizer files: pass a Hugging Face tokenizer directory"
            )
        return options.tokenizer, ""
    named = plan.model.tokenizer
    if named is None:
        return None, "the checkpoint names no tokenizer"
    directory = Path(named).parent if Path(named).is_file() else Path(named)
    if tokenizer_files(directory):
        return directory, ""
    return None, f"the checkpoint's tokenizer {named!r} is not on this machine"


def _generation(plan: Plan, tokenizer: Path | None) -> Generation:
    """Resolves the generation ids. A config next to the tokenizer takes precedence; the tokenizer itself comes last."""
    beside, itself = (generation_config(tokenizer), [special_ids(tokenizer)]) if tokenizer else ([], [])
    return resolve([*beside, *plan.source.generation, *itself], plan.model.vocab_size)


def _require_no_text(options: Options, missing: str) -> None:
    if options.data.unseen_size:
        raise DataError(f"--unseen-size needs text, but {missing}: pass --tokenizer DIR")


def _require_no_data(plan: Plan, options: Options, missing: str) -> None:
    wanted = None
    if plan.recipe.needs_data:
        wanted = f"recipe {plan.recipe.name} calibrates scales on data"
    elif options.data.datasets:
        wanted = "--calib-dataset is text"
    elif _of_figures(options) is not None:
        wanted = f"{_of_figures(options)} needs fidelity figures"
    if wanted is not None:
        raise DataError(f"{wanted}, but {missing}: pass --tokenizer DIR, or a Megatron indexed dataset as --calib-dataset")


def tokens_of(plan: Plan, checked: Preflight, options: Options) -> TokenData | None:
    """Returns the calibration and held-out sequences; None if the run needs no forward passes."""
    if checked.work is None:
        return None
    length = min(options.data.seq_length, plan.model.max_position_embeddings)
    data = replace(options.data, seq_length=length)
    return load_tokens(data, checked.tokenizer, plan.model.vocab_size, plan.recipe.needs_data)


def finished(plan: Plan, out: Path, options: Options, checked: Preflight) -> bool:
    """Whether, with `resume`, `out` is complete already and the same as what this run would write.

    Raises OutputError if it is complete but this run would write something else, unless `overwrite` is set.
    """
    if not (options.resume and (out / manifest.NAME).is_file()):
        return False
    made = manifest.read_manifest(out)["options"]
    tokens = tokens_of(plan, checked, options)
    account = None if tokens is None else tokens.account
    other = differences(made, depends_on(plan, options, checked, account))
    if other and not options.overwrite:
        raise OutputError(
            f"{out} is complete, but differs in {' and '.join(other)}: resume with the same options, pass --overwrite "
            "instead of --resume to replace it, or choose another -o"
        )
    return not other


def depends_on(plan: Plan, options: Options, checked: Preflight, account: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns what the output depends on (options.decisive); `account` is the record of the token sequences."""
    device = pick_device(options.device).type
    return decisive(plan, options, device, checked.tokenizer, checked.generation, account)


def pick_device(name: str) -> torch.device:
    """Returns the device `name`; "auto" is a GPU, or the CPU without one.

    Each process that torchrun starts on a machine has its own GPU (LOCAL_RANK), unless `name` has a number. Raises
    MptqError for a device that does not exist.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MptqError(f"--device {name} is not a device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise MptqError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
