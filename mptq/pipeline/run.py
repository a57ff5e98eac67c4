"""The loop: preflight; for each unit read, calibrate, quantize, write and free; then finish. Start reading at `run`."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq import report
from mptq.distributed import Ranks, shares, started
from mptq.formats import FORMATS
from mptq.formats.protocol import Resumed, Writer, WriterOptions
from mptq.output import manifest
from mptq.output.directory import OutputDirectory, clear, partial_of
from mptq.pipeline.commit import Committer
from mptq.pipeline.options import Options
from mptq.pipeline.preflight import Preflight, activation_memory, check, depends_on, pick_device, tokens_of
from mptq.plan.estimates import unit_bytes
from mptq.plan.plan import Plan
from mptq.report import html
from mptq.report.run_log import Progress, RunLog, Silent

if TYPE_CHECKING:
    import torch

    from mptq.calibration.hidden_state_pair import HiddenStatePair
    from mptq.calibration.tokens import TokenData
    from mptq.output.journal import Row


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
    log = RunLog()
    with log.timed("imports"):
        device = pick_device(options.device)
        from mptq.pipeline.context import RunContext
        from mptq.pipeline.layer_stream import LayerStream
    with ExitStack() as stack:
        with log.timed("data"):
            tokens = tokens_of(plan, checked, options)
            states = _hidden_states(plan, tokens, options, device, place)
        committer = Committer(plan, place.partial, log, place.ranks)
        stack.callback(committer.close)
        account = None if tokens is None else tokens.account
        depends = place.ranks.agree(lambda: depends_on(plan, options, checked, account))
        writers = partial(
            _writers, plan, place.partial, WriterOptions(options.max_shard_bytes, checked.tokenizer, checked.generation)
        )
        done = committer.begin(depends | {"versions": report.versions()}, writers)
        if states is not None:
            stack.callback(states.close)
            committer.follow(states, done)
        left = {unit: weight for unit, weight in unit_bytes(plan).items() if unit not in done}
        mine = shares(left, place.ranks.size)[place.ranks.rank]
        # Hidden states go through every layer, and what follows the last, on all ranks together.
        units = [unit for unit in plan.units if unit.number in left and (unit.number in mine or (states and unit.flows))]
        context = RunContext(plan, device, log, progress, states, mine, place.ranks if states else Ranks())
        progress.stage(0, len(plan.units), "reading")
        with log.timed("stream"):  # from the first byte that is read to the last that is on the disk
            for output in stack.enter_context(closing(LayerStream(context, units).outputs())):
                unit, last = plan.units[output.index], output.last
                committer.write(output, unit.number in mine)
                del output  # before the next is made
                if last:
                    following = plan.units[unit.number + 1 :][:1]
                    progress.stage(unit.number + 1, len(plan.units), str(following[0]) if following else "finishing")
                    committer.stop_if(options.stop, unit)
            committer.wait()
        files = committer.finish()
        if not place.ranks.first:
            return {}
        calibration = _calibration(plan, account, states)
        document = report.build(plan, report.Measured(log, checked.notes, calibration, checked.work), options.gates)
        report.write(place.partial, document)
        with log.timed("report"):
            html.write(place.partial / html.NAME, html.render(document))
        manifest.write_manifest(place.partial, report.manifest(plan, files, depends))
    return document


def _hidden_states(
    plan: Plan, tokens: TokenData | None, options: Options, device: torch.device, place: Place
) -> HiddenStatePair | None:
    """Both sequences of hidden states; None without tokens."""
    if tokens is None:
        return None
    from mptq.calibration.hidden_state_pair import HiddenStatePair, StreamOptions

    memory = activation_memory(options)
    settings = StreamOptions(device, options.batch_size, memory, place.partial, options.moe_min_tokens, place.ranks)
    return HiddenStatePair(plan, tokens, settings)


def _calibration(plan: Plan, account: dict[str, Any] | None, states: HiddenStatePair | None) -> dict[str, Any] | None:
    """What the report says of the data, and of the states that were made of it."""
    if account is None or states is None:
        return None
    return (
        account
        | plan.recipe.calibration.model_dump(exclude_none=True)
        | {
            "activation_bytes": states.bytes,
            "activations_on_disk": states.on_disk,
        }
    )


def _writers(plan: Plan, directory: Path, options: WriterOptions, done: Mapping[int, Row]) -> dict[str, Writer]:
    """The writers by format, each in a directory of its own where there are several; `done` are the units that are there."""
    names = {form: _names(plan, form, done) for form in plan.formats}
    return {
        form: FORMATS[form].writer(
            layout,
            directory / form if len(plan.formats) > 1 else directory,
            options,
            Resumed(names[form], {unit: row["accounts"][form] for unit, row in done.items()}),
        )
        for form, layout in plan.layouts.items()
    }


def _names(plan: Plan, form: str, done: Mapping[int, Row]) -> frozenset[str]:
    """The tensors of an output that are in the units that are done."""
    stored = plan.layouts[form].by_canonical_name() if done else ()
    return frozenset(spec.name for name, specs in stored if plan.units.of(name).number in done for spec in specs)
