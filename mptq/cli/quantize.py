"""`mptq quantize`."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mptq.cli import console, options
from mptq.errors import GateError, OptionError

if TYPE_CHECKING:
    from mptq.cli.progress import LiveProgress
    from mptq.pipeline.options import Options
    from mptq.plan.plan import Plan


def parse_size(text: str) -> int:
    """Parses a size such as "5GB", "500 MB", "5GiB" (binary) or "1073741824" into bytes."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    count = 0
    if match is not None:
        value, unit, binary = match.groups()
        count = int(float(value) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if count <= 0:
        raise typer.BadParameter(f"{text!r} is not a valid size: use 5GB, 500MB or a number of bytes")
    return count


def parse_percent(text: str | None) -> float | None:
    """Parses "1.5%" or "1.5" into 1.5."""
    if text is None:
        return None
    try:
        return float(text.strip().removesuffix("%"))
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} is not a valid percentage: use a value such as 1.5%") from error


_DATA = "Calibration and fidelity"


def quantize(  # noqa: PLR0913, PLR0917 (one parameter per option)
    checkpoint: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT", help="Checkpoint root, iter_* directory or NeMo 2 directory.", callback=options.local_input
        ),
    ],
    recipe: Annotated[str, typer.Option(help="Recipe name (see `mptq recipes`), YAML file or ModelOpt recipe name.")],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Output directory.",
            show_default="CKPT-RECIPE, next to CKPT",
            callback=options.local_output,
        ),
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="Output format: hf, megatron, or hf,megatron for both.")] = "hf",
    ignore: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN", help="Linears to leave unquantized, such as 'decoder.layers.0.*'. Repeatable."),
    ] = None,
    kv_cache: Annotated[
        str | None,
        typer.Option(metavar="none|fp8", help="Calibrate scales for an FP8 KV cache.", show_default="from the recipe"),
    ] = None,
    rounding: Annotated[
        str | None,
        typer.Option(
            metavar="nearest|scales|gptq|qep",
            help="Round weights to nearest, or with regard to the calibration data.",
            show_default="from the recipe",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Tokenizer directory; also copied to the output.",
            show_default="from the checkpoint",
            callback=options.local_input,
        ),
    ] = None,
    iteration: options.Iteration = None,
    config: options.Config = None,
    hf_config: options.HfConfig = None,
    max_shard_size: Annotated[str, typer.Option(help="Maximum size of a safetensors file.")] = "5GB",
    device: Annotated[str, typer.Option(help="Device to quantize on: auto, cpu, cuda or cuda:N.")] = "auto",
    calib_dataset: Annotated[
        list[str] | None,
        typer.Option(
            metavar="DATA[:WEIGHT]",
            help="Calibration data: text, JSONL, parquet, Hugging Face dataset or Megatron .bin/.idx. Repeatable.",
            show_default="mptq's own texts of many kinds",
            rich_help_panel=_DATA,
        ),
    ] = None,
    calib_size: Annotated[int, typer.Option(min=1, help="Number of calibration sequences.", rich_help_panel=_DATA)] = 64,
    calib_seq_length: Annotated[int, typer.Option(min=2, help="Sequence length in tokens.", rich_help_panel=_DATA)] = 512,
    calib_batch_size: Annotated[int, typer.Option(min=1, help="Sequences per batch.", rich_help_panel=_DATA)] = 8,
    calib_packing: Annotated[
        bool, typer.Option(help="Pack documents into full sequences, or use one sequence per document.", rich_help_panel=_DATA)
    ] = True,
    eval_size: Annotated[
        int, typer.Option(min=0, help="Number of held-out sequences to measure fidelity on; 0 to skip.", rich_help_panel=_DATA)
    ] = 8,
    unseen_size: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Number of sequences of a kind of text that never calibrates, to measure fidelity on.",
            show_default="--eval-size, or 0 for a recipe without calibration",
            rich_help_panel=_DATA,
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Random seed for choosing documents.", rich_help_panel=_DATA)] = 0,
    activation_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Keep hidden states in memory up to this size, otherwise in a file.",
            show_default="a quarter of free memory",
            rich_help_panel=_DATA,
        ),
    ] = None,
    sensitivity: Annotated[
        bool,
        typer.Option(
            "--sensitivity",
            help="Measure what quantizing each group of linears does to the hidden states.",
            rich_help_panel=_DATA,
        ),
    ] = False,
    keep_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT",
            help="Keep the groups of linears that cost most in source precision, up to this share of the bytes.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    moe_min_tokens: Annotated[
        int,
        typer.Option(
            min=0, help="Experts with fewer calibration tokens use their layer's static scales.", rich_help_panel=_DATA
        ),
    ] = 16,
    max_kl: Annotated[
        float | None,
        typer.Option(min=0, help="Exit with code 3 if the mean KL divergence (nats) exceeds this.", rich_help_panel=_DATA),
    ] = None,
    max_ppl_increase: Annotated[
        str | None,
        typer.Option(
            metavar="PERCENT", help="Exit with code 3 if perplexity increases by more than this.", rich_help_panel=_DATA
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code", help="Let a tokenizer run the Python code in its directory.", rich_help_panel=_DATA
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing mptq output.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run, if there is one.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or the plan) as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print only errors and --json output.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print one line per tensor.")] = False,
) -> None:
    """Quantize a Megatron checkpoint to FP8 and write a model that inference engines can load."""
    from mptq import report
    from mptq.calibration.datasets.options import DataOptions
    from mptq.cli import tables
    from mptq.cli.progress import LiveProgress
    from mptq.distributed import is_first
    from mptq.model.source import SourceOptions
    from mptq.pipeline import preflight
    from mptq.pipeline.options import Options
    from mptq.plan.plan import make_plan
    from mptq.recipes.recipe import load_recipe

    terminated = _terminated()
    data = DataOptions(
        datasets=tuple(calib_dataset or ()),
        calib_size=calib_size,
        eval_size=eval_size,
        unseen_size=unseen_size,
        seq_length=calib_seq_length,
        packed=calib_packing,
        seed=seed,
        trust_remote_code=trust_remote_code,
    )
    settings = Options(
        tokenizer=tokenizer,
        max_shard_bytes=parse_size(max_shard_size),
        overwrite=overwrite,
        resume=resume,
        stop=terminated,
        device=device,
        data=data,
        batch_size=calib_batch_size,
        activation_memory=None if activation_memory is None else parse_size(activation_memory),
        moe_min_tokens=moe_min_tokens,
        sensitivity=sensitivity,
        gates=report.QualityLimits(max_kl, parse_percent(max_ppl_increase)),
    )
    chosen = SourceOptions(iteration, tuple(config or ()), hf_config, tokenizer)
    forms = tuple(form.strip() for form in formats.split(","))
    plan = make_plan(checkpoint, load_recipe(recipe).changed(ignore or (), kv_cache, rounding), forms, chosen)
    out = output or preflight.default_output(plan, checkpoint)
    quiet = quiet or not is_first()
    if keep_bytes is not None:
        if dry_run:
            raise OptionError("--keep-bytes measures the model, which --dry-run does not run: pass only one of them")
        keep = _costliest(plan, out, settings, keep_bytes, None if quiet else LiveProgress(verbose))
        plan = make_plan(checkpoint, plan.recipe.changed(keep), forms, chosen)
    if dry_run:
        _show_plan(plan, out, settings, as_json, quiet)
        return
    document = _run(plan, out, settings, None if quiet else LiveProgress(verbose))
    if not is_first():
        return
    if not quiet:
        console.show(tables.summary(document), console.err)
        console.err.print(f"written to  {out}", markup=False)
    if as_json:
        console.document(document)
    missed = [gate for gate in document["gates"] if not gate["met"]]
    if missed:
        raise GateError(f"{out} was written, but {'; '.join(map(tables.gate, missed))}")


def _show_plan(plan: Plan, out: Path, settings: Options, as_json: bool, quiet: bool) -> None:
    """Prints what a run would do, on rank 0."""
    from mptq import report
    from mptq.cli import tables
    from mptq.distributed import is_first
    from mptq.pipeline import preflight

    if not is_first():
        return
    checked = preflight.check(plan, out.resolve(), settings)
    document = report.describe(plan, checked.work) | {"warnings": checked.notes, "output": str(out)}
    if as_json:
        console.document(document)
    elif not quiet:
        console.show(tables.plan(document))


def _run(plan: Plan, out: Path, options: Options, live: LiveProgress | None) -> dict[str, Any]:
    from mptq.cli.progress import Freezing
    from mptq.pipeline import run
    from mptq.report.run_log import Silent

    try:
        with live or nullcontext(Silent()) as progress:
            return run.run(plan, out, options, Freezing(progress))
    except KeyboardInterrupt as error:
        kept = hasattr(error, "__notes__")
        raise typer.Exit(console.fail(error, "interrupted" if kept else "interrupted: nothing was written", 130)) from error


def _costliest(plan: Plan, out: Path, options: Options, keep_bytes: str, live: LiveProgress | None) -> tuple[str, ...]:
    """Returns patterns of the linears that cost most, up to that percentage of the bytes."""
    from mptq.cli.progress import Freezing
    from mptq.pipeline.sensitivity import kept
    from mptq.report.run_log import Silent

    share = parse_percent(keep_bytes)
    assert share is not None
    with live or nullcontext(Silent()) as progress:
        return kept(plan, out.resolve(), options, share / 100, Freezing(progress))


def _terminated() -> Callable[[], bool]:
    """Returns a check for SIGTERM, which Slurm sends before a time limit; the run finishes its layer and stops."""
    asked = Event()
    signal.signal(signal.SIGTERM, lambda *_: asked.set())
    return asked.is_set
