"""The loop: plan, check, and for each layer read, quantize, write and free; then finish. Start reading at `run`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq import report
from mptq.errors import MptqError, OutputError
from mptq.plan import Plan
from mptq.record import Progress, Record, Silent
from mptq.writers import manifest
from mptq.writers.hf import HfWriter, hf_config, tokenizer_files
from mptq.writers.output import OutputDirectory, check_output

if TYPE_CHECKING:
    import torch

    from mptq.writers.megatron import MegatronWriter

MAX_SHARD_BYTES = 5_000_000_000
SLACK_BYTES = 64_000_000
"""Room for what the plan does not count: headers, byte items, tokenizer, manifest and report."""


@dataclass(frozen=True)
class Options:
    """How to run, as against what to do to the model (the recipe). `device` is auto, cpu, cuda or cuda:N."""

    tokenizer: Path | None = None
    max_shard_bytes: int = MAX_SHARD_BYTES
    overwrite: bool = False
    device: str = "auto"


def default_output(plan: Plan, given: Path) -> Path:
    """The checkpoint's name, a dash and the recipe's name, beside the checkpoint."""
    root = plan.source.checkpoint.location.root
    name = root.name if given.resolve() == root else f"{root.name}-{plan.source.checkpoint.directory.name}"
    return root.parent / f"{name}-{plan.recipe.name}"


def run(plan: Plan, out: Path, options: Options = Options(), progress: Progress = Silent()) -> dict[str, Any]:  # noqa: B008
    """Quantize the planned checkpoint into `out` and return the report.

    Raises OutputError when `out` cannot be written, and CheckpointError when a tensor cannot be read or holds NaN. `out`
    is complete afterwards, or as it was before. Peak memory: `plan.peak_memory`, whatever the number of layers.
    """
    started = time.perf_counter()
    out = out.resolve()
    tokenizer, notes = check(plan, out, options)
    record = Record()
    with record.timed("imports"):
        device = pick_device(options.device)
        from mptq.stream import LayerStream
    stream = LayerStream(plan, device, record, progress)
    with OutputDirectory(out) as target, ExitStack() as stack:
        writers = _writers(plan, target.partial, options)
        hashes = manifest.FileHashes(target.partial)
        stack.callback(hashes.close)
        for writer in writers:
            stack.callback(writer.abort)
        total = plan.model.num_layers + 2
        for output in stream.outputs():
            done = output.index + 1
            with record.timed("write"):
                for writer in writers:
                    hashes.add(writer.write(output))
            del output  # before the next is made
            progress.stage(done, total, "finishing" if done == total else f"layer {done - 1}")
        with record.timed("finish"):
            for writer in writers:
                hashes.add(_finish(writer, plan, tokenizer))
            files = hashes.collect()
        document = report.build(plan, record.rows, dict(record.seconds), notes, started)
        report.write(target.partial, document)
        manifest.write_manifest(target.partial, report.manifest(plan, files))
    return document


def check(plan: Plan, out: Path, options: Options) -> tuple[Path | None, list[str]]:
    """What must hold before the first tensor is read; returns the tokenizer's directory and the plan's warnings.

    Raises OutputError for an output that cannot be written and for a `--tokenizer` that holds none.
    """
    needed = sum(plan.bytes_out(form) for form in plan.formats) + SLACK_BYTES
    check_output(out, plan.source.checkpoint.location.root, needed, options.overwrite)
    notes = plan.warnings
    if "hf" not in plan.formats:
        return None, notes
    if options.tokenizer is not None:
        if not tokenizer_files(options.tokenizer):
            raise OutputError(
                f"--tokenizer {options.tokenizer} has no tokenizer files: give a Hugging Face tokenizer directory"
            )
        return options.tokenizer, notes
    named = plan.model.tokenizer
    if named is None:
        return None, [*notes, "no tokenizer in the output (the checkpoint names none): pass --tokenizer DIR"]
    directory = Path(named).parent if Path(named).is_file() else Path(named)
    if tokenizer_files(directory):
        return directory, notes
    reason = f"{named!r}, which the checkpoint names, is not on this machine"
    return None, [*notes, f"no tokenizer in the output ({reason}): pass --tokenizer DIR"]


def _writers(plan: Plan, directory: Path, options: Options) -> list[HfWriter | MegatronWriter]:
    """The writers, each in a directory of its own where there are several."""
    made: list[HfWriter | MegatronWriter] = []
    for form in plan.formats:
        place = directory / form if len(plan.formats) > 1 else directory
        if form == "hf":
            made.append(HfWriter(place, plan.specs("hf"), options.max_shard_bytes))
        else:
            from mptq.writers.megatron import MegatronWriter

            made.append(MegatronWriter(place, plan.source.checkpoint.location.iteration))
    return made


def _finish(writer: HfWriter | MegatronWriter, plan: Plan, tokenizer: Path | None) -> Sequence[Path]:
    if isinstance(writer, HfWriter):
        return writer.finish(hf_config(plan.model, plan.recipe.hf, plan.excluded), tokenizer)
    from mptq.quantize.modelopt import modelopt_state

    common = plan.source.checkpoint.directory / "common.pt"
    return writer.finish(modelopt_state(plan.recipe), common.read_bytes() if common.is_file() else None)


def pick_device(name: str) -> torch.device:
    """The device called `name`; "auto" is the first GPU, or the CPU without one."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise MptqError(f"--device {name} is no device: use auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise MptqError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device
