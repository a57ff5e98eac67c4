"""The loop: plan, check, and for each layer read, quantize, write and free; then finish. Start reading at `run`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from mptq import report
from mptq.calibration.tokenizer import generation_config, special_ids
from mptq.calibration.tokens import check_datasets, load_tokens, needs_tokenizer
from mptq.distributed import Ranks, shares, started
from mptq.errors import DataError, MptqError, OutputError
from mptq.formats.hf.quantization_config import DIALECTS
from mptq.formats.hf.writer import HfWriter, hf_configs, tokenizer_files
from mptq.model.generation import Generation, resolve
from mptq.output import manifest
from mptq.output.directory import OutputDirectory, check_output, clear, partial_of
from mptq.pipeline.commit import Committer, Writer
from mptq.pipeline.options import Options, decisive, differences
from mptq.plan import estimates
from mptq.plan.plan import Plan
from mptq.report import html
from mptq.report.run_log import Progress, RunLog, Silent
from mptq.types import DTYPE_BYTES

if TYPE_CHECKING:
    import torch

    from mptq.calibration.hidden_state_pair import HiddenStatePair
    from mptq.calibration.tokens import TokenData
    from mptq.output.journal import Row

SLACK_BYTES = 64_000_000
"""Room for what the plan does not count: headers, byte items, tokenizer, manifest and report."""


def default_output(plan: Plan, given: Path) -> Path:
    """The checkpoint's name, a dash and the recipe's name, beside the checkpoint."""
    root = plan.source.checkpoint.location.root
    name = root.name if given.resolve() == root else f"{root.name}-{plan.source.checkpoint.directory.name}"
    return root.parent / f"{name}-{plan.recipe.name}"


def run(plan: Plan, out: Path, options: Options = Options(), progress: Progress = Silent()) -> dict[str, Any]:  # noqa: B008
    """Quantize the planned checkpoint into `out` and return the report.

    Raises OutputError when `out` cannot be written, CheckpointError when a tensor cannot be read or holds NaN, and DataError
    for datasets that cannot be read. `out` is complete afterwards, or as it was before. Where it is complete already, with
    `resume`, the report is the one that is there, with this run's limits. Peak memory: `forecast.peak_memory`, whatever the
    number of layers.
    """
    out = out.resolve()
    ranks = started()
    checked = ranks.agree(lambda: check(plan, out, options, ranks))
    if checked.complete:
        if ranks.first:
            clear(out)
        document = report.read(out)
        return document | {"gates": options.gates.check(document["fidelity"])}
    with OutputDirectory(out, options.resume) if ranks.first else nullcontext():
        ranks.wait()
        document = _run(plan, Place(out, partial_of(out), ranks), checked, options, progress)
    ranks.wait()
    return document if ranks.first else report.read(out)


@dataclass(frozen=True)
class Place:
    """Where the output is to be, where it is until it is complete, and which of the processes this is."""

    out: Path
    partial: Path
    ranks: Ranks


def _run(plan: Plan, place: Place, checked: Preflight, options: Options, progress: Progress) -> dict[str, Any]:
    record = RunLog()
    with record.timed("imports"):
        device = pick_device(options.device)
        from mptq.pipeline.layer_stream import LayerStream
    with ExitStack() as stack:
        with record.timed("data"):
            tokens = _tokens(plan, checked, options)
            activations = _activations(plan, tokens, options, (device, place))
        steps = Committer(plan, place.partial, record, place.ranks)
        stack.callback(steps.close)
        account = None if tokens is None else tokens.account
        depends = place.ranks.agree(lambda: _decisive(plan, options, checked, account))
        done = steps.begin(depends | {"versions": report.versions()}, partial(_writers, plan, place.partial, options))
        if activations is not None:
            stack.callback(activations.close)
            steps.follow(activations, done)
        left = {unit: weight for unit, weight in plan.weights.items() if unit not in done}
        mine = shares(left, place.ranks.size)[place.ranks.rank]
        # Activations go through every layer, and what follows the last, on all ranks together.
        units = [unit for unit in left if unit in mine or (activations and unit <= plan.model.num_layers + 1)]
        stream = LayerStream(plan, device, record, progress, activations, mine)
        progress.stage(0, plan.outputs, "reading")
        with record.timed("stream"):  # from the first byte that is read to the last that is on the disk
            for output in stack.enter_context(closing(stream.outputs(units))):
                unit, last = output.index, output.last
                steps.write(output, unit in mine)
                del output  # before the next is made
                if last:
                    progress.stage(unit + 1, plan.outputs, f"layer {unit}" if unit < plan.model.num_layers else "finishing")
                    steps.stop_if(options.stop, unit)
            steps.wait()
        files = steps.finish(partial(_finish, plan=plan, checked=checked))
        if not place.ranks.first:
            return {}
        calibration = _calibration(plan, account, activations)
        document = report.build(plan, report.Measured(record, checked.notes, calibration, checked.work), options.gates)
        report.write(place.partial, document)
        with record.timed("report"):
            html.write(place.partial / html.NAME, html.render(document))
        manifest.write_manifest(place.partial, report.manifest(plan, files, depends))
    return document


def finished(plan: Plan, out: Path, options: Options, checked: Preflight) -> bool:
    """Whether `out` is complete already, and what this run would make of it.

    Raises OutputError where it is complete and this run would make another of it, unless that is wanted (`overwrite`).
    """
    if not (options.resume and (out / manifest.NAME).is_file()):
        return False
    made = manifest.read_manifest(out)["options"]
    tokens = _tokens(plan, checked, options)
    account = None if tokens is None else tokens.account
    other = differences(made, _decisive(plan, options, checked, account))
    if other and not options.overwrite:
        raise OutputError(
            f"{out} is complete, and was made with another {' and '.join(other)}: resume with the same, pass --overwrite "
            "instead of --resume to make it again, or choose another -o"
        )
    return not other


def _decisive(plan: Plan, options: Options, checked: Preflight, account: Mapping[str, Any] | None) -> dict[str, Any]:
    device = pick_device(options.device).type
    return decisive(plan, options, device, checked.tokenizer, checked.generation, account)


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


def check(plan: Plan, out: Path, options: Options, ranks: Ranks = Ranks()) -> Preflight:  # noqa: B008
    """What must hold before the first tensor is read.

    Raises OutputError for an output that cannot be written and for a `--tokenizer` that holds none, and DataError for data
    that the recipe or a gate needs and that is not there.
    """
    plan.require_runnable()
    check_datasets(options.data)
    tokenizer, missing = _tokenizer(plan, options)
    generation = _generation(plan, tokenizer)
    notes = estimates.warnings(plan) + (list(generation.warnings) if "hf" in plan.formats else [])
    has_data = tokenizer is not None or not needs_tokenizer(options.data)
    options.gates.require_finite()
    _require_figures(plan, options)
    if not has_data:
        _require_no_data(plan, options, missing)
        if options.data.eval_size and plan.runs:
            notes.append(f"no fidelity figures ({missing}): pass --tokenizer DIR, or --eval-size 0 to want none")
    if tokenizer is None and "hf" in plan.formats:
        notes.append(f"no tokenizer in the output ({missing}): pass --tokenizer DIR")
    runs = plan.runs and has_data and (plan.recipe.needs_data or options.data.eval_size > 0)
    if runs and ranks.size > 1 and plan.recipe.calibration.method != "max":
        raise DataError("a percentile is of all samples together: calibrate with method max, or start one process")
    work = _work(plan, options) if runs else None
    checked = Preflight(tokenizer, work, notes, generation)
    if finished(plan, out, options, checked):
        return replace(checked, complete=True)
    needed = _needed_bytes(plan, work)
    check_output(out, plan.source.checkpoint.location.root, needed, options.overwrite, options.resume)
    return checked


def _needed_bytes(plan: Plan, work: estimates.ActivationBudget | None) -> int:
    """Bytes on the disk of the outputs and, while the run goes, of the activations."""
    needed = sum(plan.bytes_out(form) for form in plan.formats) + SLACK_BYTES
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
    kept, filed = (stored, 0) if stored <= _memory(options) else (0, stored)
    together = min(options.batch_size, max(data.eval_size, calibrating))
    return estimates.ActivationBudget(kept, filed, together * length, length, data.eval_size > 0)


def _memory(options: Options) -> int:
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


def _tokens(plan: Plan, checked: Preflight, options: Options) -> TokenData | None:
    """The sequences that go through the layers; None where nothing needs them."""
    if checked.work is None:
        return None
    length = min(options.data.seq_length, plan.model.max_position_embeddings)
    data = replace(options.data, seq_length=length)
    return load_tokens(data, checked.tokenizer, plan.model.vocab_size, plan.recipe.needs_data)


def _activations(
    plan: Plan, tokens: TokenData | None, options: Options, place: tuple[torch.device, Place]
) -> HiddenStatePair | None:
    """The two streams of activations; None without tokens."""
    if tokens is None:
        return None
    from mptq.calibration.hidden_state_pair import HiddenStatePair, StreamOptions

    device, where = place
    settings = StreamOptions(device, options.batch_size, _memory(options), where.partial, options.moe_min_tokens, where.ranks)
    return HiddenStatePair(plan, tokens, settings)


def _calibration(plan: Plan, account: dict[str, Any] | None, activations: HiddenStatePair | None) -> dict[str, Any] | None:
    """What the report says of the data, and of the activations that were made of it."""
    if account is None or activations is None:
        return None
    return (
        account
        | plan.recipe.calibration.model_dump(exclude_none=True)
        | {
            "activation_bytes": activations.bytes,
            "activations_on_disk": activations.on_disk,
        }
    )


def _writers(plan: Plan, directory: Path, options: Options, done: Mapping[int, Row]) -> list[Writer]:
    """The writers, each in a directory of its own where there are several; units that are `done` are there already."""
    made: list[Writer] = []
    for form in plan.formats:
        place = directory / form if len(plan.formats) > 1 else directory
        if form == "hf":
            made.append(HfWriter(place, plan.specs("hf"), options.max_shard_bytes, plan.written("hf", done)))
        else:
            from mptq.formats.megatron.writer import MegatronWriter

            accounts = {unit: row["accounts"]["megatron"] for unit, row in done.items()}
            made.append(MegatronWriter(place, plan.source.checkpoint.location.iteration, accounts))
    return made


def _finish(writer: Writer, plan: Plan, checked: Preflight) -> Sequence[Path]:
    if isinstance(writer, HfWriter):
        configs = hf_configs(plan.model, DIALECTS[plan.dialect], plan.contents, checked.generation)
        return writer.finish(configs, checked.tokenizer)
    from mptq.formats.megatron.writer import MegatronWriter
    from mptq.quantize.modelopt import modelopt_state

    common = plan.source.checkpoint.directory / "common.pt"
    assert plan.recipe.scheme is not None
    assert isinstance(writer, MegatronWriter)
    state = modelopt_state(plan.recipe.scheme, plan.kv_cache, plan.deviating)
    return writer.finish(state, common.read_bytes() if common.is_file() else None)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU without one."""
    import torch

    if name == "auto":
        # Of the processes that torchrun starts on a machine, each has its own.
        return (
            torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else torch.device("cpu")
        )
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MptqError(f"--device {name} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MptqError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
