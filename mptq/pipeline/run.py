"""The main loop: preflight; read, calibrate, quantize, write and free each unit; finish."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

from mptq import report
from mptq.distributed import started
from mptq.output.directory import OutputDirectory, clear, partial_of
from mptq.pipeline.options import Options
from mptq.pipeline.preflight import Preflight, check
from mptq.pipeline.setup import Place, Setup, prepared
from mptq.plan.plan import Plan
from mptq.report import html, manifest
from mptq.report.run_log import Progress, Silent


def run(plan: Plan, out: Path, options: Options = Options(), progress: Progress = Silent()) -> dict[str, Any]:
    """Quantizes the planned checkpoint into `out` and returns the report.

    Raises OutputError if `out` cannot be written, CheckpointError if a tensor cannot be read or is not finite,
    DataError for datasets that cannot be read, and StoppedError if `options.stop` requested it. Afterwards `out` is
    complete, or as it was before. With `resume`, if it is complete already, returns its report with this run's limits.
    Peak memory: `estimates.peak_memory`, independent of the number of layers.
    """
    out = out.resolve()
    ranks = started()
    checked = ranks.broadcast_object(lambda: check(plan, out, options, ranks.size))
    if checked.complete:
        if ranks.first:
            clear(out)
        document = report.read(out)
        return document | {"gates": options.gates.check(document["fidelity"])}
    with OutputDirectory(out, options.resume) if ranks.first else nullcontext():
        ranks.barrier()
        document = _run(plan, Place(out, partial_of(out), ranks), checked, options, progress)
    ranks.barrier()
    return document if ranks.first else report.read(out)


def _run(plan: Plan, place: Place, checked: Preflight, options: Options, progress: Progress) -> dict[str, Any]:
    with prepared(plan, place, checked, options, progress) as setup:
        _quantize(plan, setup, options, progress)
        with ThreadPoolExecutor(1) as beside:
            if place.ranks.first:
                beside.submit(html.load)  # hashing the last file leaves Python's lock to it
            files = setup.committer.finish()
        if not place.ranks.first:
            return {}
        log = setup.context.log
        document = report.build(plan, report.Measured(log, checked.notes, setup.calibration, checked.work), options.gates)
        report.write(place.partial, document)
        if not html.unavailable():  # preflight has said so
            with log.timed("report"):
                html.write(place.partial / html.NAME, html.render(document))
        manifest.write_manifest(place.partial, report.manifest_of(plan, files, setup.depends))
    return document


def _quantize(plan: Plan, setup: Setup, options: Options, progress: Progress) -> None:
    """Reads, calibrates, quantizes and writes each remaining unit."""
    with setup.context.log.timed("imports"):
        from mptq.pipeline.layer_stream import LayerStream
    progress.stage(0, len(plan.units), "reading")
    # "stream" is the time from the first byte read until the last one is on the disk.
    with setup.context.log.timed("stream"), closing(LayerStream(setup.context, setup.units).outputs()) as outputs:
        for output in outputs:
            unit, last = plan.units[output.index], output.last
            setup.committer.write(output, setup.context.writes(unit))
            del output  # freed before the next one is made
            if last:
                following = next(
                    (str(later) for later in plan.units[unit.number + 1 :] if later.layer is not None), "finishing"
                )
                progress.stage(unit.number + 1, len(plan.units), following)
                setup.committer.stop_if(options.stop, unit)
        setup.committer.wait()
