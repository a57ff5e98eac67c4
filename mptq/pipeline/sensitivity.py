"""Which groups of linears to keep in source precision: those whose quantization costs most per byte."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mptq.distributed import started
from mptq.errors import DataError, OptionError, StoppedError
from mptq.model import tensors
from mptq.pipeline.options import Options
from mptq.pipeline.preflight import activation_memory, check, pick_device, tokens_of
from mptq.plan.plan import Plan
from mptq.report.run_log import Progress, RunLog, Silent
from mptq.types import DTYPE_BYTES


@dataclass(frozen=True, slots=True)
class MeasuredGroup:
    """Linears of a layer that depend on the same ones: its bytes in source precision, and what quantizing it costs.

    `cost` is the mean squared relative change of the hidden states after the layer. `patterns` match its linears.
    """

    patterns: tuple[str, ...]
    nbytes: int
    cost: float


def kept(plan: Plan, out: Path, options: Options, share: float, progress: Progress = Silent()) -> tuple[str, ...]:
    """Returns patterns of linears to keep: at most `share` (0 to 1) of the bytes of those that `plan` quantizes.

    Runs the whole model once, as `plan` quantizes it but rounded to nearest, and writes nothing. All ranks call it at
    once. Raises DataError if the model cannot be run on held-out data, OptionError for a share that keeps nothing or all,
    StoppedError if `options.stop` requested it, and what `run` raises.
    """
    if not 0 < share < 1:
        raise OptionError(f"--keep-bytes {100 * share:g}%: use more than 0 and less than 100 %")
    if not options.data.eval_size:
        raise DataError("--keep-bytes measures the cost on held-out sequences, but --eval-size is 0")
    if not plan.runs:
        reason = "; ".join(plan.model.not_run) or f"recipe {plan.recipe.name} quantizes nothing"
        raise DataError(f"--keep-bytes needs forward passes, but {reason}")
    plan = replace(plan, recipe=plan.recipe.changed(rounding="nearest"))
    ranks = started()
    # What is there of an earlier run is compared once the recipe is known.
    fresh = replace(options, resume=False, overwrite=True) if options.resume else options
    checked = ranks.broadcast_object(lambda: check(plan, out, fresh, ranks.size))
    if checked.work is None:
        raise DataError("--keep-bytes measures the cost on held-out sequences: pass --tokenizer DIR, or token ids as data")
    from mptq.calibration.hidden_state_pair import HiddenStateOptions, HiddenStatePair
    from mptq.pipeline.context import RunContext
    from mptq.pipeline.layer_stream import LayerStream

    tokens, log, device = tokens_of(plan, checked, options), RunLog(), pick_device(options.device)
    assert tokens is not None
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-") as folder:
        memory = activation_memory(options)
        settings = HiddenStateOptions(device, options.batch_size, memory, Path(folder), options.moe_min_tokens, ranks)
        with closing(HiddenStatePair(plan, tokens, settings)) as states:
            context = RunContext(plan, device, log, progress, states, (), ranks, sensitivity=True)
            layers = [unit for unit in plan.units if unit.flows and (unit.layer is not None or unit.number == 0)]
            with closing(LayerStream(context, layers).outputs()) as outputs:
                for output in outputs:
                    if output.last:
                        progress.stage(output.index, len(plan.units), "measuring the sensitivity")
                        if any(ranks.all_gather(options.stop())):
                            raise StoppedError("stopped while measuring for --keep-bytes: nothing was written")
    return choose(measured(plan, log.layers), share)


def measured(plan: Plan, rows: Iterable[Mapping[str, Any]]) -> list[MeasuredGroup]:
    """Returns the groups of all layers that `plan` quantizes, given the report's rows of the layers."""
    found = []
    for row in rows:
        layer = row["layer"]
        for name, group in tensors.groups(plan.linears(layer)).items():
            quantized = [linear for linear in group if plan.assignment.scheme(layer, linear) is not None]
            if quantized:
                patterns = tuple(f"decoder.layers.{layer}.*{kind}" for kind in name.split("+"))
                size = sum(math.prod(linear.shape) for linear in quantized) * DTYPE_BYTES[plan.model.dtype]
                found.append(MeasuredGroup(patterns, size, row["sensitivity"][name]))
    return found


def choose(among: list[MeasuredGroup], share: float) -> tuple[str, ...]:
    """Returns the patterns of the groups that cost most per byte, as far as they fit into `share` of all bytes."""
    left = share * sum(group.nbytes for group in among)
    chosen: list[str] = []
    for group in sorted(among, key=lambda one: -one.cost / one.nbytes):
        if group.nbytes <= left:
            left -= group.nbytes
            chosen += group.patterns
    return tuple(chosen)
