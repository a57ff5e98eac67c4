"""`mptq inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mptq.cli import console, tables


def inspect(
    path: Annotated[Path, typer.Argument(metavar="CKPT_OR_OUTPUT", help="A checkpoint, or an output of mptq or others.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what a checkpoint or an output holds, from its metadata alone."""
    from mptq.inspection import SCHEMA
    from mptq.inspection import inspect as look

    models = look(path)
    if as_json:
        console.document({"schema": SCHEMA, "models": models})
        return
    for index, model in enumerate(models):
        if index:
            console.result("")
        console.show(tables.inspection(model))
