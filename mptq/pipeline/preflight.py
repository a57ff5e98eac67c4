"""What must hold before the first tensor is read, and what is known then."""

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
from mptq.report import manifest
from mptq.types import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

    from mptq.calibration.tokens import TokenData

SLACK_BYTES = 64_000_000
"""Room for what the plan does not count: headers, byte items, tokenizer, manifest and report."""


def default_output(plan: Plan, given: Path) -> Path:
    """The checkpoint's name, a dash and the recipe's name, beside the checkpoint."""
    root = plan.source.checkpoint.location.root
    name = root.name if given.resolve() == root else f"{root.name}-{plan.source.checkpoint.directory.name}"
    return root.parent / f"{name}-{plan.recipe.name}"


@dataclass(frozen=True)
class Preflight:
    """What `check` found: the tokenizer's directory, what activations will take (None: there are none), and warnings.

    `generation` is what is known of the ids with which generation begins and ends. `complete` says that there is nothing to do.
    """

    tokenizer: Path | None
    work: estimates.ActivationBudget | None
    notes: list[str]
    generation: Generation
    complete: bool = False


def check(plan: Plan, out: Path, options: Options, processes: int = 1) -> Preflight:
    """What must hold before the first tensor is read, by a run of so many `processes`.

    Raises OutputError for an output that cannot be written and for a `--tokenizer` that holds none, DataError for data that
    the recipe or a gate needs and that is not there, and MptqError for a device that is not there.
    """
    plan.require_runnable()
    if options.device not in ("auto", "cpu"):  # these are always there, and looking takes an import of torch
        pick_device(options.device)
    check_datasets(options.data)
    tokenizer, missing = _tokenizer(plan, options)
    generation = _generation(plan, tokenizer)
    notes = estimates.warnings(plan) + (list(generation.warnings) if _has_tokenizer(plan) else [])
    has_data = tokenizer is not None or not needs_tokenizer(options.data)
    options.gates.require_finite()
    _require_figures(plan, options)
    if not has_data:
        _require_no_data(plan, options, missing)
        if options.data.eval_size and plan.runs:
            notes.append(f"no fidelity figures ({missing}): pass --tokenizer DIR, or --eval-size 0 to want none")
    if tokenizer is None and _has_tokenizer(plan):
        notes.append(f"no tokenizer in the output ({missing}): pass --tokenizer DIR")
    runs = plan.runs and has_data and (plan.recipe.needs_data or options.data.eval_size > 0)
    if runs and processes > 1 and plan.recipe.calibration.method != "max":
        raise DataError("a percentile is of all samples together: calibrate with method max, or start one process")
    notes += _without_effect(plan, options, runs)
    work = _work(plan, options) if runs else None
    checked = Preflight(tokenizer, work, notes, generation)
    if finished(plan, out, options, checked):
        return replace(checked, complete=True)
    needed = _needed_bytes(plan, work)
    check_output(out, plan.source.checkpoint.location.root, needed, options.overwrite, options.resume)
    return checked


def _without_effect(plan: Plan, options: Options, runs: bool) -> list[str]:
    """Options that were given and that nothing of this run reads."""
    notes = []
    if options.data.datasets and not runs:
        reason = "nothing calibrates, and --eval-size is 0"
        if plan.recipe.scheme is None:
            reason = f"recipe {plan.recipe.name} quantizes nothing"
        elif plan.model.not_run:
            reason = "mptq does not run this model"
        notes.append(f"--calib-dataset has no effect: {reason}")
    if options.max_shard_bytes != MAX_SHARD_BYTES and not any(FORMATS[form].is_sharded for form in plan.formats):
        notes.append(f"--max-shard-size has no effect: {' and '.join(plan.formats)} output has a file for each layer")
    return notes


def _has_tokenizer(plan: Plan) -> bool:
    """Whether an output holds the tokenizer and the ids with which generation begins and ends."""
    return any(FORMATS[form].has_tokenizer for form in plan.formats)


def _needed_bytes(plan: Plan, work: estimates.ActivationBudget | None) -> int:
    """Bytes on the disk of the outputs and, while the run goes, of the activations."""
    needed = sum(layout.nbytes for layout in plan.layouts.values()) + SLACK_BYTES
    if work is None:
        return needed
    # Twice the activations: those of the layer that was finished last, and of the one before.
    return needed + work.file_bytes + 2 * (work.stored_bytes + work.file_bytes)


def _require_figures(plan: Plan, options: Options) -> None:
    """Raise DataError for a limit on the fidelity where this run cannot measure any."""
    if options.gates == report.QualityLimits():
        return
    reason = None
    if not options.data.eval_size:
        reason = "--eval-size 0 measures none: ask for at least 1 sequence"
    elif plan.recipe.scheme is None:
        reason = f"recipe {plan.recipe.name} quantizes nothing: leave the limit out"
    elif plan.model.not_run:
        reason = f"mptq does not run this model, which has {'; '.join(plan.model.not_run)}: leave the limit out"
    if reason is not None:
        raise DataError(f"a limit on the fidelity ({' and '.join(options.gates.flags)}) needs its figures, and {reason}")


def _work(plan: Plan, options: Options) -> estimates.ActivationBudget:
    """What the activations come to, if every sequence is full."""
    data, recipe = options.data, plan.recipe
    length = min(data.seq_length, plan.model.max_position_embeddings)
    calibrating = data.calib_size if recipe.needs_data else 0
    streams = data.eval_size + calibrating + data.eval_size + calibrating * (recipe.calibration.propagate == "quantized")
    stored = streams * length * plan.model.hidden_size * DTYPE_BYTES[plan.model.dtype]
    kept, filed = (stored, 0) if stored <= activation_memory(options) else (0, stored)
    together = min(options.batch_size, max(data.eval_size, calibrating))
    return estimates.ActivationBudget(kept, filed, together * length, length, data.eval_size > 0)


def activation_memory(options: Options) -> int:
    """Bytes that hidden states may take in memory."""
    if options.activation_memory is not None:
        return options.activation_memory
    return int(psutil.virtual_memory().available) // 4


def _tokenizer(plan: Plan, options: Options) -> tuple[Path | None, str]:
    """The directory of the tokenizer, or None and the reason why there is none."""
    if options.tokenizer is not None:
        if not tokenizer_files(options.tokenizer):
            raise OutputError(
                f"--tokenizer {options.tokenizer} has no tokenizer files: give a Hugging Face tokenizer directory"
            )
        return options.tokenizer, ""
    named = plan.model.tokenizer
    if named is None:
        return None, "the checkpoint names no tokenizer"
    directory = Path(named).parent if Path(named).is_file() else Path(named)
    if tokenizer_files(directory):
        return directory, ""
    return None, f"the tokenizer {named!r}, which the checkpoint names, is not on this machine"


def _generation(plan: Plan, tokenizer: Path | None) -> Generation:
    """What is known of generation: what lies beside the tokenizer counts first, the tokenizer itself last."""
    beside, itself = (generation_config(tokenizer), [special_ids(tokenizer)]) if tokenizer else ([], [])
    return resolve([*beside, *plan.source.generation, *itself], plan.model.vocab_size)


def _require_no_data(plan: Plan, options: Options, missing: str) -> None:
    wanted = None
    if plan.recipe.needs_data:
        wanted = f"recipe {plan.recipe.name} calibrates scales on data"
    elif options.data.datasets:
        wanted = "--calib-dataset holds text"
    elif options.gates != report.QualityLimits():
        wanted = "a limit on the fidelity needs its figures"
    if wanted is not None:
        raise DataError(f"{wanted}, and {missing}: pass --tokenizer DIR, or a Megatron indexed dataset as --calib-dataset")


def tokens_of(plan: Plan, checked: Preflight, options: Options) -> TokenData | None:
    """The sequences that go through the layers; None where nothing needs them."""
    if checked.work is None:
        return None
    length = min(options.data.seq_length, plan.model.max_position_embeddings)
    data = replace(options.data, seq_length=length)
    return load_tokens(data, checked.tokenizer, plan.model.vocab_size, plan.recipe.needs_data)


def finished(plan: Plan, out: Path, options: Options, checked: Preflight) -> bool:
    """Whether `out` is complete already, and what this run would make of it.

    Raises OutputError where it is complete and this run would make another of it, unless that is wanted (`overwrite`).
    """
    if not (options.resume and (out / manifest.NAME).is_file()):
        return False
    made = manifest.read_manifest(out)["options"]
    tokens = tokens_of(plan, checked, options)
    account = None if tokens is None else tokens.account
    other = differences(made, depends_on(plan, options, checked, account))
    if other and not options.overwrite:
        raise OutputError(
            f"{out} is complete, and was made with another {' and '.join(other)}: resume with the same, pass --overwrite "
            "instead of --resume to make it again, or choose another -o"
        )
    return not other


def depends_on(plan: Plan, options: Options, checked: Preflight, account: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the output depends on, as plain data (options.decisive); `account` is that of the token sequences."""
    device = pick_device(options.device).type
    return decisive(plan, options, device, checked.tokenizer, checked.generation, account)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is a GPU, or the CPU where there is none.

    Of the processes that torchrun starts on a machine, each has a GPU of its own, unless `name` has its number.
    """
    import torch

    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MptqError(f"--device {name} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and device.index >= torch.cuda.device_count():
        raise MptqError(f"--device {device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
