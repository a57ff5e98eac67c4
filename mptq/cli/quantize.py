"""`mptq quantize`."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from mptq.cli import console, tables
from mptq.cli.progress import LiveProgress


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500 MB", "1073741824": decimal units, and binary ones as in "5GiB"."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)[bB]?\s*", text)
    count = 0
    if match is not None:
        value, unit, binary = match.groups()
        count = int(float(value) * (1024 if binary else 1000) ** " KMGT".index(unit.upper() or " "))
    if count <= 0:
        raise typer.BadParameter(f"{text!r} is no size: write 5GB, 500MB or a number of bytes")
    return count


def quantize(  # noqa: PLR0913, PLR0917 (every option of the command)
    checkpoint: Annotated[Path, typer.Argument(metavar="CKPT", help="Checkpoint root or iter_* directory.")],
    recipe: Annotated[str, typer.Option(help="Recipe name (see `mptq recipes`) or YAML file.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Output directory.", show_default="CKPT-RECIPE, beside CKPT")
    ] = None,
    formats: Annotated[str, typer.Option("--format", help="hf, megatron, or both: hf,megatron.")] = "hf",
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Tokenizer directory to copy into the output.", show_default="the checkpoint's"),
    ] = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest safetensors file.")] = "5GB",
    device: Annotated[str, typer.Option(help="Where to quantize: auto, cpu, cuda or cuda:N.")] = "auto",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output of mptq.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report (or the plan) as JSON on stdout.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print nothing but errors and --json.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for every tensor.")] = False,
) -> None:
    """Quantize a Megatron checkpoint to FP8 and write a model that engines load."""
    from mptq import pipeline, report
    from mptq.plan import make_plan
    from mptq.record import Silent

    max_bytes = parse_size(max_shard_size)
    plan = make_plan(checkpoint, recipe, tuple(formats.split(",")))
    out = output or pipeline.default_output(plan, checkpoint)
    options = pipeline.Options(tokenizer, max_bytes, overwrite, device)
    if dry_run:
        _, notes = pipeline.check(plan, out.resolve(), options)
        document = report.describe(plan) | {"warnings": notes, "output": str(out)}
        if as_json:
            console.document(document)
        elif not quiet:
            console.show(tables.plan(document))
        return
    try:
        with LiveProgress(verbose) if not quiet else nullcontext(Silent()) as progress:
            document = pipeline.run(plan, out, options, progress)
    except KeyboardInterrupt as error:
        raise typer.Exit(console.fail(error, "interrupted: nothing was written", 130)) from error
    if not quiet:
        console.show(tables.summary(document), console.err)
        console.err.print(f"written to  {out}", markup=False)
    if as_json:
        console.document(document)
