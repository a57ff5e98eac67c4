"""Prepares what the main loop needs: data, hidden states, writers, and the remaining units."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptq import report
from mptq.distributed import Ranks, shares
from mptq.formats import FORMATS
from mptq.formats.protocol import Resumed, Writer, WriterOptions
from mptq.pipeline.commit import Committer
from mptq.pipeline.options import Options
from mptq.pipeline.preflight import Preflight, activation_memory, depends_on, pick_device, tokens_of
from mptq.plan.estimates import unit_bytes
from mptq.plan.plan import Plan
from mptq.plan.units import Unit
from mptq.report.run_log import Progress, RunLog

if TYPE_CHECKING:
    import torch

    from mptq.calibration.hidden_state_pair import HiddenStatePair
    from mptq.calibration.tokens import TokenData
    from mptq.output.journal import Row
    from mptq.pipeline.context import RunContext


@dataclass(frozen=True)
class Place:
    """The output path, the directory that holds the output until it is complete, and this process's rank."""

    out: Path
    partial: Path
    ranks: Ranks


@dataclass(frozen=True)
class Setup:
    """A prepared run: its context, the remaining units, and the committer.

    `depends` is what the output depends on (options.decisive); `calibration` is the report's section on the data.
    """

    context: RunContext
    units: list[Unit]
    committer: Committer
    depends: Mapping[str, Any]
    calibration: dict[str, Any] | None


@contextmanager
def prepared(plan: Plan, place: Place, checked: Preflight, options: Options, progress: Progress) -> Iterator[Setup]:
    """Loads data, creates hidden states and writers, and resumes from an earlier run; closes everything on exit."""
    log = RunLog()
    with log.timed("imports"):
        device = pick_device(options.device)
        from mptq.pipeline.context import RunContext
    with ExitStack() as stack:
        with log.timed("data"):
            tokens = tokens_of(plan, checked, options)
            states = _hidden_states(plan, tokens, options, device, place)
        account = None if tokens is None else tokens.account
        depends = place.ranks.broadcast_object(lambda: depends_on(plan, options, checked, account))
        committer = Committer(plan, place.partial, log, place.ranks)
        stack.callback(committer.close)
        settings = WriterOptions(options.max_shard_bytes, checked.tokenizer, checked.generation)
        done = committer.begin(depends | {"versions": report.versions()}, partial(_writers, plan, place.partial, settings))
        if states is not None:
            stack.callback(states.close)
            committer.follow(states, done)
        left = {unit: weight for unit, weight in unit_bytes(plan).items() if unit not in done}
        mine = shares(left, place.ranks.size)[place.ranks.rank]
        # Hidden states pass through the embeddings, layers and output layer on all ranks together.
        units = [unit for unit in plan.units if unit.number in left and (unit.number in mine or (states and unit.flows))]
        context = RunContext(plan, device, log, progress, states, mine, place.ranks if states else Ranks(), options.sensitivity)
        yield Setup(context, units, committer, depends, _calibration(plan, account, states))


def _hidden_states(
    plan: Plan, tokens: TokenData | None, options: Options, device: torch.device, place: Place
) -> HiddenStatePair | None:
    """Creates both streams of hidden states; None without tokens."""
    if tokens is None:
        return None
    from mptq.calibration.hidden_state_pair import HiddenStateOptions, HiddenStatePair

    memory = activation_memory(options)
    settings = HiddenStateOptions(device, options.batch_size, memory, place.partial, options.moe_min_tokens, place.ranks)
    return HiddenStatePair(plan, tokens, settings)


def _calibration(plan: Plan, account: dict[str, Any] | None, states: HiddenStatePair | None) -> dict[str, Any] | None:
    """Returns the report's section on the calibration data and the hidden states."""
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
    """Creates the writer of each format, in its own directory if there are several; `done` has the committed units."""
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
    """Returns the names of the tensors of an output that belong to finished units."""
    stored = plan.layouts[form].by_canonical_name() if done else ()
    return frozenset(spec.name for name, specs in stored if plan.units.of(name).number in done for spec in specs)
