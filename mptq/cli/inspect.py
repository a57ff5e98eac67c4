"""`mptq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptq.cli import console, options


def inspect(
    path: Annotated[
        Path,
        typer.Argument(
            metavar="CKPT_OR_OUTPUT",
            help="Checkpoint, or a model written by mptq or another tool.",
            callback=options.local_input,
        ),
    ],
    iteration: options.Iteration = None,
    config: options.Config = None,
    hf_config: options.HfConfig = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the contents of a checkpoint or model, reading only metadata."""
    from mptq.cli import inspection_tables
    from mptq.inspection import SCHEMA
    from mptq.inspection import inspect as look
    from mptq.model.source import SourceOptions

    models = look(path, SourceOptions(iteration, tuple(config or ()), hf_config))
    if as_json:
        console.document({"schema": SCHEMA, "models": models})
        return
    for index, model in enumerate(models):
        if index:
            console.result("")
        console.show(inspection_tables.inspection(model), width=inspection_tables.WIDEST)
